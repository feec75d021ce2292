"""In the Trainer of Hugging Face, by class and by object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from tests.optim.reference import CASES, same_bits, snapshot

transformers = pytest.importorskip("transformers", reason="needs the extra 'integration'")
pytest.importorskip("accelerate", reason="needs the extra 'integration'")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the machine, and of how the Trainer uses torch


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.norm = nn.LayerNorm(1)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[0.5, -0.5, 1.0]]))
            self.net.bias.zero_()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": nn.functional.mse_loss(y + self.norm(y), labels), "logits": y}


def examples() -> list[dict[str, Tensor]]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": row.sum().reshape(1)} for row in x]


def trainer(folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=options.pop("model", None) or Regression(), args=arguments, train_dataset=examples(), **options
    )


def plain(run: Any) -> LearnedOptimizer:
    """The optimizer inside what the Trainer has made of it."""
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    assert isinstance(optimizer, LearnedOptimizer)
    return optimizer


def test_by_class_and_keywords_with_a_group_that_decays_and_one_that_does_not(tmp_path: Path) -> None:
    run = trainer(tmp_path, optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": CASES["adam-lstm"].rule(), "lr": 0.5}))
    before = [param.detach().clone() for param in run.model.parameters()]
    run.train()
    groups = plain(run).param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.1]
    assert {group["rule"] for group in groups} == {"adam_lstm"}
    assert all(group["initial_lr"] == 0.5 and group["lr"] < 0.5 for group in groups)  # the Trainer's own schedule
    assert not same_bits(list(run.model.parameters()), before)


@pytest.mark.parametrize("by", ["class", "object"])
def test_a_run_resumed_from_a_checkpoint_ends_the_same(by: str, tmp_path: Path) -> None:
    def build(folder: Path) -> Any:
        rule, model = CASES["adam-lstm"].rule(), Regression()
        if by == "class":
            return trainer(folder, model=model, optimizer_cls_and_kwargs=(LearnedOptimizer, {"rule": rule, "lr": 0.5}))
        optimizer = LearnedOptimizer(model.parameters(), rule, lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return trainer(folder, model=model, optimizers=(optimizer, scheduler))

    whole = build(tmp_path)
    whole.train()
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert same_bits(snapshot(plain(resumed)), snapshot(plain(whole)))
