"""The table of optimizers that the tests run over, and the plain loop their steps are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from learnedopt import LearnedOptimizer, LSTMOptimizer, MetaLSTMOptimizer
from learnedopt.rules import (
    AdamLSTMConfig,
    AdamLSTMRule,
    ChainConfig,
    ChainRule,
    CoordinateLSTM,
    InEigenbases,
    InEigenbasesConfig,
    LawsConfig,
    LSTMConfig,
    LSTMRule,
    MetaLSTMConfig,
    MetaLSTMRule,
    NormalizedGradientConfig,
    PowerLaws,
    RNNpropConfig,
    RNNpropRule,
    RuleConfig,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    Segments,
    SeparateLSTMConfig,
    SeparateLSTMRule,
    State,
    StateSpec,
    UpdateRule,
)
from learnedopt.rules.coordinates import AGE

Rule = TypeVar("Rule", bound=UpdateRule)


@dataclass(frozen=True)
class TraceConfig(RuleConfig):
    kind: ClassVar[str] = "trace"


class TraceRule(UpdateRule):
    """No weights, and a state of every form: entries with and without a shape, per coordinate and per tensor."""

    config_class = TraceConfig
    zero_gradient_is_noop = True

    def __init__(self) -> None:
        super().__init__(TraceConfig())

    def state_spec(self) -> dict[str, StateSpec]:
        return {
            "traces": StateSpec((2, 1), accumulates=True),
            "last": StateSpec(),
            "means": StateSpec((3,), scope="tensor"),
            "steps": StateSpec(scope="tensor"),
        }

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        means = state["means"] + segments.mean(torch.stack([grad, grad.square(), param]))
        steps = state["steps"] + 1
        return torch.cat([means, steps.unsqueeze(0)]), {"means": means, "steps": steps}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        traces = 0.5 * state["traces"] + torch.stack([grad, grad * param]).unsqueeze(1)
        delta = -0.1 * (traces.sum((0, 1)) + 0.1 * state["last"]) * (1 + statistics[1]) / statistics[3]
        return delta, {"traces": traces, "last": grad}


def trained(rule: Rule, seed: int = 0, scale: float = 0.5) -> Rule:
    """The rule with drawn weights: reproducible, and none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return rule


def descending_lstm() -> LSTMRule:
    """An LSTM that goes downhill: its cell is ``tanh`` of the gradient, and the read-out's weight is negative."""
    rule = LSTMRule(LSTMConfig(hidden_size=1, num_layers=1, preprocessing="identity", output_scale=0.01))
    with torch.no_grad():
        for weight in rule.parameters():
            weight.zero_()
        rule.lstm.biases[0].copy_(torch.tensor([10.0, -10.0, 0.0, 10.0]))
        rule.lstm.input_weights[0][2] = 1.0
        rule.readout.weight.fill_(-1.0)
    return rule


def in_bases(layers: int = 0, **settings: Any) -> InEigenbases:
    """The default's form, with so many layers of an LSTM of four units."""
    modulator = CoordinateLSTM(hidden_size=4, num_layers=layers) if layers else PowerLaws()
    return InEigenbases(InEigenbasesConfig(ScheduleFreeConfig(modulator, square_decay=0.99), **settings))


def chain() -> ChainRule:
    """Directions in bases, then laws for sizes."""
    directions = InEigenbasesConfig(NormalizedGradientConfig(square_decay=0.99), settling=2, interval=2)
    return ChainRule(ChainConfig(directions, LawsConfig()))


@dataclass(frozen=True)
class Case:
    optimizer: type[LearnedOptimizer]
    rule: Callable[[], UpdateRule]

    def build(self, params: Sequence[Tensor], **options: object) -> LearnedOptimizer:
        return self.optimizer(list(params), self.rule(), **options)  # type: ignore[arg-type]


CASES = {
    "lstm": Case(LSTMOptimizer, lambda: trained(LSTMRule(LSTMConfig(hidden_size=4)))),
    "meta-lstm": Case(MetaLSTMOptimizer, lambda: trained(MetaLSTMRule(MetaLSTMConfig(hidden_size=4)))),
    "adam-lstm": Case(LearnedOptimizer, lambda: trained(AdamLSTMRule(AdamLSTMConfig(hidden_size=4)))),
    "schedule-free": Case(
        LearnedOptimizer, lambda: trained(ScheduleFreeRule(ScheduleFreeConfig(modulator=CoordinateLSTM(hidden_size=4))))
    ),
    "rnnprop": Case(LearnedOptimizer, lambda: trained(RNNpropRule(RNNpropConfig(hidden_size=4)))),
    "separate-lstm": Case(LearnedOptimizer, lambda: trained(SeparateLSTMRule(SeparateLSTMConfig(hidden_size=4)))),
    "eigenbasis": Case(
        LearnedOptimizer,
        lambda: trained(in_bases(layers=2, settling=2, interval=2), scale=0.1),
    ),
    "trace": Case(LearnedOptimizer, TraceRule),
}
KINDS = CASES | {"chain": Case(LearnedOptimizer, lambda: trained(chain(), scale=0.1))}
"""With a chain: ``lr`` is no plain factor of its moves, and strided parameters are rounded in another way."""


def _draw(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


LAYOUTS: dict[str, Callable[[Generator], Tensor]] = {
    "vector": lambda g: _draw(g, 7),
    "matrix": lambda g: _draw(g, 5, 3),
    "0-d": lambda g: _draw(g),
    "empty": lambda g: _draw(g, 3, 0),
    "transposed": lambda g: _draw(g, 4, 6).t(),
    "strided": lambda g: _draw(g, 12)[::2],
    "channels-last": lambda g: _draw(g, 2, 3, 4, 5).to(memory_format=torch.channels_last),
    "5-d": lambda g: _draw(g, 2, 1, 3, 2, 2),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def draw_params(generator: Generator, layouts: list[str], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters with the strides of their layout."""
    return [LAYOUTS[layout](generator).to(dtype).requires_grad_() for layout in layouts]


def draw_grads(generator: Generator, params: list[Tensor]) -> None:
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and all state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    state = [values for entries in states for _, values in sorted(entries.items())]
    return [tensor.detach().clone() for tensor in params + state]


def devices_of_state(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> set[str]:
    """But for the age of bases, which the host keeps."""
    return {value.device.type for param in params for name, value in optimizer.state[param].items() if name != AGE}


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    """Equal to the last bit; -0.0 is not 0.0, and NaN is NaN."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and bytes(_raw(a)) == bytes(_raw(b)) for a, b in zip(left, right)
    )


def _raw(tensor: Tensor) -> list[int]:
    data = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return data.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


class ReferenceLoop:
    """Parameter by parameter, out of place, without blocks: what the optimizers must compute."""

    def __init__(self, rule: UpdateRule, params: list[Tensor]) -> None:
        self.dtype = torch.promote_types(torch.float32, params[0].dtype)
        self.rule = rule.to(self.dtype)
        self.params = [param.detach().clone() for param in params]
        self.states = [
            rule.init_state(
                Segments([param.numel()], shapes=[param.shape]),
                self.dtype,
                param=param.detach().to(self.dtype).flatten(),
            )
            for param in params
        ]

    @torch.no_grad()
    def step(self, grads: list[Tensor], loss: float, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        for i, grad in enumerate(grads):
            param, segments = self.params[i].to(self.dtype).reshape(-1), Segments([grad.numel()], shapes=[grad.shape])
            segments.together = sum(each.numel() > 0 for each in self.params)
            delta, self.states[i] = self.rule.update(
                param,
                grad.to(self.dtype).reshape(-1),
                self.states[i],
                segments,
                torch.tensor(loss, dtype=self.dtype),
            )
            moved = (1 - lr * weight_decay) * param + lr * delta
            self.params[i] = moved.reshape(grad.shape).to(grad.dtype)
