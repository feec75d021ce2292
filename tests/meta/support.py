"""What the tests of meta-training share: small families, every rule with random weights, comparisons bit for bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from learnedopt.rules import RULES, UpdateRule, build_rule
from learnedopt.tasks import Batch, MLPClassification, Params, Quadratics, Split, Task, TaskFamily

# Those that there is something to learn of.
KINDS = sorted(kind for kind in RULES if any(True for _ in build_rule({"kind": kind}).parameters()))
SMALL_MLP = MLPClassification(hidden_sizes=((3,),), activations=("tanh",), batch_sizes=(4,), initial_std=None)
FAMILIES: dict[str, TaskFamily] = {"quadratic": Quadratics(dimension=3), "mlp": SMALL_MLP}


def random_rule(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> UpdateRule:
    """A small rule all of whose weights, read-outs included, are random."""
    frame = {"kind": "schedule_free", "modulator": {"kind": "lstm_of_coordinates", "hidden_size": 3}}
    composed: dict[str, dict[str, Any]] = {
        "schedule_free": frame,
        "in_eigenbases": {"kind": "in_eigenbases", "inner": frame | {"square_decay": 0.99}},
    }
    has_units = any(field.name == "hidden_size" for field in dataclasses.fields(RULES[kind].config_class))
    alone = {"kind": kind, "hidden_size": 3} if has_units else {"kind": kind}
    rule = build_rule(composed.get(kind, alone)).to(dtype)
    generator = Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return rule


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Equal bit for bit, through nested containers of tensors and plain values."""
    assert type(actual) is type(expected), where
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, where
        assert torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, pair in enumerate(zip(actual, expected)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert actual == expected, where


@dataclass(frozen=True)
class Broken(TaskFamily):
    """Tasks whose loss is not a number, for a share of the draws."""

    share: float = 1.0

    def draw(self, generator: Generator, copies: int) -> Task:
        return BrokenTask(copies, bool(torch.rand((), generator=generator) < self.share))


@dataclass(frozen=True)
class BrokenTask(Task):
    copies: int
    broken: bool

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.randn(self.copies, 2, generator=generator)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return (torch.full((self.copies,), float("nan") if self.broken else 1.0),)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return batch[0] * params["theta"].square().sum()
