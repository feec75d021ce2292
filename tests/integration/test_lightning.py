"""Under Lightning's automatic optimization, which passes a closure to every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.optim.reference import CASES, Case, same_bits, snapshot

lightning = pytest.importorskip("lightning", reason="needs the extra 'integration'")

# Lightning's advice about loaders and loggers, and its own use of what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(0.5 * torch.randn(param.shape, generator=generator))
    return net


class Regression(lightning.LightningModule):  # type: ignore[name-defined]
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self.case = network(), case

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.case.build(list(self.net.parameters()), lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


def fit(case: Case, folder: Path, epochs: int, resume: str | None = None, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(Regression(case), batches(), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_training_equals_a_plain_loop(case: Case, tmp_path: Path) -> None:
    trainer = fit(case, tmp_path, 2, gradient_clip_val=0.5, enable_checkpointing=False)
    net = network()
    optimizer = case.build(list(net.parameters()), lr=0.5)
    for _ in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step(loss=loss)
        optimizer.param_groups[0]["lr"] *= 0.5
    assert same_bits(snapshot(trainer.optimizers[0]), snapshot(optimizer))


def test_a_run_resumed_from_a_checkpoint_ends_the_same(tmp_path: Path) -> None:
    case = CASES["adam-lstm"]
    whole = fit(case, tmp_path / "whole", 2, enable_checkpointing=False)
    half = fit(case, tmp_path / "half", 1)
    resumed = fit(case, tmp_path / "resumed", 2, resume=half.checkpoint_callback.best_model_path)
    assert same_bits(snapshot(resumed.optimizers[0]), snapshot(whole.optimizers[0]))
