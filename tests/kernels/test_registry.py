"""A rule gets a fast path, or is taken apart, without a change anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from learnedopt import LearnedOptimizer
from learnedopt.kernels import Backend, Case, ReferenceBackend, StepOptions, Tensors, choose, refusal, register, step
from learnedopt.kernels.core import blocked, registry
from learnedopt.kernels.core.workspace import Sizes
from learnedopt.rules import LSTMRule, RuleConfig, SeparateLSTMConfig, SeparateLSTMRule, State, StateSpec, UpdateRule
from tests.optim.reference import LAYOUTS, draw_grads, draw_params, snapshot

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MomentumConfig(RuleConfig):
    kind: ClassVar[str] = "momentum_of_a_test"
    decay: float = 0.9


class MomentumRule(UpdateRule):
    """A user's own: gradient descent with momentum and a learned step size."""

    config_class = MomentumConfig
    config: MomentumConfig

    def __init__(self) -> None:
        super().__init__(MomentumConfig())
        self.log_step = nn.Parameter(torch.tensor(-3.0))

    def state_spec(self) -> dict[str, StateSpec]:
        return {"momentum": StateSpec()}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        momentum = self.config.decay * state["momentum"] + grad
        return -self.log_step.exp() * momentum, {"momentum": momentum}


class MomentumProgram(blocked.Program):
    """The same in place."""

    def __init__(self, rule: MomentumRule) -> None:
        super().__init__(rule, Sizes(features=0, outputs=1, scalars=1))
        self._decay, self._step = rule.config.decay, float(rule.log_step.exp())

    def delta(self, block: blocked.Block, statistics: Tensor) -> Tensor:
        momentum = block.open("momentum", 0, block.views.scalars)
        momentum.mul_(self._decay).add_(block.views.grad)
        block.write("momentum", 0, momentum)
        return torch.mul(momentum, -self._step, out=block.views.out)


class DerivedRule(MomentumRule):
    """Might compute anything."""


register(MomentumRule, blocked=MomentumProgram)


def trajectory(rule: UpdateRule, backend: str) -> tuple[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = draw_params(generator, list(LAYOUTS))
    optimizer = LearnedOptimizer(params, rule, 0.7, 0.1, backend=backend)  # type: ignore[arg-type]
    for _ in range(5):
        draw_grads(generator, params)
        optimizer.step()
    return optimizer.backend, snapshot(optimizer)


def test_a_users_rule_with_a_program_of_its_own_takes_the_fast_path() -> None:
    (fast, actual), (plain, expected) = (trajectory(MomentumRule(), name) for name in ("auto", "reference"))
    assert (fast, plain) == ("blocked", "reference")
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_program_serves_no_subclass() -> None:
    backend, reasons = choose(Case(DerivedRule(), CPU, torch.float32, "float32"))
    assert backend.name == "reference"
    assert "this is DerivedRule" in reasons["blocked"] and "MomentumRule" in reasons["blocked"]


def test_every_folder_registers_by_name_alone() -> None:
    """What is imported with the package registers; programs are imported when they are first used."""
    folders = {path.parent.name for path in Path(registry.__file__).parents[1].glob("*/blocked.py")}
    names = {kind.__name__ for kind in registry._PROGRAMS["blocked"]}
    assert {"lstm", "meta_lstm", "adam_lstm", "schedule_free", "rnnprop", "normalized", "laws"} <= folders
    assert len(names) >= len(folders - {"core", "chain"})  # the one has no rule, the other is made of rules


class TwoRules(UpdateRule):
    """Made of two, for matrices and for the rest."""

    config_class = MomentumConfig

    def __init__(self, one: UpdateRule, other: UpdateRule) -> None:
        super().__init__(MomentumConfig())
        self.one, self.other = one, other

    def state_spec(self) -> dict[str, StateSpec]:
        return self.one.state_spec()


class DerivedTwoRules(TwoRules):
    """Taken apart as its base is."""


def step_two(backend: Backend, rule: TwoRules, tensors: Tensors, options: StepOptions) -> None:
    for part, is_for in ((rule.one, True), (rule.other, False)):
        indices = [index for index, param in enumerate(tensors.params) if (param.dim() == 2) == is_for]
        step(backend, part, tensors.select(indices), options)


register(TwoRules, stepper=step_two, parts=lambda rule: [rule.one, rule.other])


@pytest.mark.parametrize("kind", [TwoRules, DerivedTwoRules])
def test_a_rule_made_of_others_is_served_by_what_serves_them_all(kind: type[TwoRules]) -> None:
    for other, expected in ((MomentumRule(), "blocked"), (DerivedRule(), "reference")):
        case = Case(kind(MomentumRule(), other), CPU, torch.float32, "float32")
        assert choose(case)[0].name == expected
    reason = refusal(choose(Case(MomentumRule(), CPU, torch.float32, "float32"))[0], case)
    assert reason is not None and "this is DerivedRule" in reason


def test_each_part_moves_its_own_tensors() -> None:
    rule = TwoRules(MomentumRule(), MomentumRule()).requires_grad_(False)
    rule.other.log_step.fill_(-torch.inf)  # type: ignore[operator]
    params = [torch.ones(2, 3), torch.ones(4), torch.ones(1, 1)]
    states = [{"momentum": torch.zeros_like(param)} for param in params]
    grads = [torch.ones_like(param) for param in params]
    tensors = Tensors(params, grads, states, torch.float32, "float32", [6, 4, 1])
    step(ReferenceBackend(), rule, tensors, StepOptions(skip=torch.tensor(True)))
    assert all((param == 1.0).all() for param in params)
    step(ReferenceBackend(), rule, tensors, StepOptions())
    assert [bool((param < 1.0).all()) for param in params] == [True, False, True]


def test_the_rule_of_two_lstms_is_made_of_lstms() -> None:
    rule = SeparateLSTMRule(SeparateLSTMConfig(hidden_size=3))
    assert [type(part) for part in registry.whole_parts(rule)] == [LSTMRule, LSTMRule]
    assert choose(Case(rule, CPU, torch.float32, "float32"), "blocked")[0].name == "blocked"


def test_half_a_composite_is_refused() -> None:
    with pytest.raises(ValueError, match="both stepper= and parts="):
        register(TwoRules, stepper=step_two)
