"""Prepared by Accelerate, whose optimizer takes no loss and reloads its state as soon as it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learnedopt import LearnedOptimizer
from tests.optim.reference import CASES, Case, same_bits, snapshot

accelerate = pytest.importorskip("accelerate", reason="needs the extra 'integration'")

pytestmark = pytest.mark.filterwarnings("ignore")  # advice about the machine


def parts(case: Case) -> tuple[nn.Module, LearnedOptimizer, DataLoader[Any], torch.optim.lr_scheduler.LRScheduler]:
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(3, 1)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    x = torch.randn(16, 3, generator=generator)
    optimizer = case.build(list(net.parameters()), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return net, optimizer, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4), scheduler


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_with_accumulation_equals_a_plain_loop(case: Case) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
    learner, plain, batches, schedule = parts(case)
    net, optimizer, loader, scheduler = accelerator.prepare(learner, plain, batches, schedule)
    for x, y in loader:
        with accelerator.accumulate(net):
            loss = nn.functional.mse_loss(net(x), y)
            plain.observe(loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            if accelerator.sync_gradients:
                scheduler.step()
            optimizer.zero_grad()

    net, optimizer, loader, scheduler = parts(case)
    for index, (x, y) in enumerate(loader):
        loss = nn.functional.mse_loss(net(x), y)
        (loss / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step(loss=loss)
            scheduler.step()
            optimizer.zero_grad()
    assert same_bits(snapshot(plain), snapshot(optimizer))


def test_state_stays_float32_beside_half_precision_parameters() -> None:
    net = nn.Linear(3, 1).bfloat16()
    plain = CASES["adam-lstm"].build(list(net.parameters()))
    net(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    plain.step()
    before = snapshot(plain)
    accelerate.Accelerator(cpu=True).prepare(plain)
    assert same_bits(snapshot(plain), before)


def test_a_saved_state_resumes_to_the_last_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net, plain, _, _ = parts(CASES["adam-lstm"])
    net, optimizer = accelerator.prepare(net, plain)

    def go_on() -> list[torch.Tensor]:
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(net(torch.ones(2, 3)).square().mean())
            optimizer.step()
        return snapshot(plain)

    go_on()
    accelerator.save_state(str(tmp_path))
    expected = go_on()
    accelerator.load_state(str(tmp_path))
    assert same_bits(go_on(), expected)
