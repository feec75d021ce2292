"""Tensors that have shapes alone: fake ones, by which memory is planned, and those on the device ``meta``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from learnedopt import LearnedOptimizer
from tests.optim.reference import KINDS, Case

each_case = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
SHAPES = ((7,), (5, 3), (2, 3, 4, 5), (), (3, 0))
Like = dict[str, tuple[torch.Size, torch.dtype, torch.device]]


def params_of(device: str = "cpu") -> list[Tensor]:
    return [torch.ones(shape, device=device).requires_grad_() for shape in SHAPES]


def stepped(build: Callable[..., LearnedOptimizer], params: list[Tensor], **options: Any) -> LearnedOptimizer:
    optimizer = build(params, **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step(loss=torch.ones(()))
    return optimizer


def layout(optimizer: LearnedOptimizer, *, on: str | None = None) -> list[Like]:
    def device(name: str, value: Tensor) -> torch.device:
        return torch.device(on) if on and name != "age" else value.device

    states = [optimizer.state[param] for param in optimizer.param_groups[0]["params"]]
    return [{name: (x.shape, x.dtype, device(name, x)) for name, x in state.items()} for state in states]


@each_case
@pytest.mark.parametrize("backend", ["auto", "reference", "blocked", "native"])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "raise", "state_dtype": torch.bfloat16}], ids=["", "options"])
def test_fake_parameters_get_the_state_that_real_ones_have(case: Case, backend: str, options: dict[str, Any]) -> None:
    rule = case.rule()
    if backend in ("blocked", "native") and "trace" in rule.config.kind:
        backend = "auto"  # which have no such rule

    def build(params: list[Tensor]) -> LearnedOptimizer:
        return case.optimizer(params, rule, backend=backend, **options)  # type: ignore[arg-type]

    with FakeTensorMode():
        fake = stepped(build, params_of())
        with fake.averaged_parameters():
            pass
        saved = fake.state_dict()
        fake.load_state_dict(saved)
    real = stepped(build, params_of())
    assert layout(fake) == layout(real)
    assert all(isinstance(value, FakeTensor) for state in fake.state.values() for value in state.values())
    # The real one, later and of the same rule, moves.
    assert all(bool((param != 1.0).any()) for param in real.param_groups[0]["params"] if param.numel() > 1)


@pytest.mark.parametrize("rule", [None, "light"])
def test_the_rules_of_the_zoo_are_loaded_under_fake_tensors_as_they_are(rule: str | None) -> None:
    with FakeTensorMode():
        params = params_of()
        fake = stepped(LearnedOptimizer, params, rule=rule)
    assert fake.param_groups[0]["rule_sha256"] == LearnedOptimizer([torch.ones(1)], rule).param_groups[0]["rule_sha256"]
    param = params[1]
    param.grad = param.detach().clone()
    fake.step()  # after the mode has ended
    assert all(isinstance(value, FakeTensor) for value in fake.state[param].values())


@each_case
def test_parameters_on_the_device_meta_get_the_state_that_others_have(case: Case) -> None:
    rule = case.rule()
    there, here = (stepped(lambda params: case.optimizer(params, rule), params_of(at)) for at in ("meta", "cpu"))
    assert layout(there) == layout(here, on="meta")


def test_a_rule_that_has_no_values_itself_is_refused() -> None:
    with FakeTensorMode():
        rule = KINDS["lstm"].rule()
        with pytest.raises(ValueError, match=r"the weights of the rule 'lstm' have no values.*Make it outside"):
            LearnedOptimizer([torch.ones(2)], rule)
    with pytest.raises(ValueError, match=r"have no values: .* on the device meta"):
        LearnedOptimizer([torch.ones(2)], KINDS["lstm"].rule().to("meta"))
