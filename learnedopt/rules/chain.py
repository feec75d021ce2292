"""Two rules, one after the other: the second takes the first's moves for gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from learnedopt.rules.base import Advance, RuleConfig, Segments, State, StateSpec, UpdateRule, build_rule
from learnedopt.rules.laws import LawsConfig
from learnedopt.rules.normalized import NormalizedGradientConfig


@dataclass(frozen=True)
class ChainConfig(RuleConfig):
    """Settings of :class:`ChainRule`."""

    kind: ClassVar[str] = "chain"
    first: RuleConfig = field(default_factory=NormalizedGradientConfig)
    """Chooses directions. It has no weights of its own to train."""
    then: RuleConfig = field(default_factory=LawsConfig)
    """Chooses how far to go along them."""


class ChainRule(UpdateRule):
    r"""Two rules in a row: the first makes moves of gradients, the second takes those moves, reversed, for gradients.

    .. math:: \Delta\theta = \mathrm{then}(-\mathrm{first}(g))

    What the second asks about whole tensors it asks of the gradients themselves. If the first works in coordinates of
    its own, the second does not: its state is in the tensors' own.

    Shapes: the states of both, side by side. Of entries that both have there is one: ``step`` counts for both.

    Raises:
        ValueError: the first has weights, the second coordinates of its own, or both have an entry other than ``step``.

    >>> import torch
    >>> rule, segments = ChainRule(), Segments([2])
    >>> param, grad = torch.ones(2), torch.tensor([5.0, -2.0])
    >>> delta, _ = rule.update(param, grad, rule.init_state(segments, param=param), segments)
    >>> delta.detach()
    tensor([-0.0200,  0.0200])
    """

    config_class = ChainConfig
    config: ChainConfig

    def __init__(self, config: ChainConfig | None = None) -> None:
        super().__init__(config or ChainConfig())
        self.first, self.then = build_rule(self.config.first), build_rule(self.config.then)
        if any(True for _ in self.first.parameters()):
            raise ValueError(f"the first rule of a chain has no weights, and {self.config.first.kind!r} has")
        if self.then.coordinates is not None:
            raise ValueError(f"the second rule of a chain has no bases, and {self.config.then.kind!r} has")
        both = self.first.state_spec().keys() & self.then.state_spec().keys() - {"step"}
        if both:
            raise ValueError(f"both rules of a chain have the state {sorted(both)}, which would be one")
        self.coordinates = self.first.coordinates
        self.counts_tensors = self.first.counts_tensors or self.then.counts_tensors
        self.needs_loss = self.first.needs_loss or self.then.needs_loss
        self.zero_gradient_is_noop = self.first.zero_gradient_is_noop and self.then.zero_gradient_is_noop

    def state_spec(self) -> dict[str, StateSpec]:
        return {**self.first.state_spec(), **self.then.state_spec()}

    def update_bound(self) -> float:
        """What the second's ``update_bound`` is for moves of the first that are as large as they can be.

        Raises:
            AttributeError: one of the two has no bound.
        """
        first: Any = self.first.update_bound
        then: Any = self.then.update_bound
        return float(then() * first())

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        return self.then.statistics(param, grad, state, segments, loss, own_grad)

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        """The second rule's, ``grad`` being a direction."""
        delta, after = self.then(param, grad, state, statistics)
        return delta, after

    def with_lr(self, statistics: Tensor, state: State, lr: float | Tensor) -> tuple[Tensor, State]:
        return self.then.with_lr(statistics, state, lr)

    def average(self, param: Tensor, state: State) -> Tensor:
        return self.then.average(param, state)

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        *,
        advance: Advance | None = None,
    ) -> tuple[Tensor, State]:
        move, of_first = self.first.update(param, grad, state, segments, loss)
        # From the state as it was: what both count, both have counted once.
        delta, of_second = (advance or self.advance)(param, -move, state, segments, loss, own=(param, grad))
        return delta, {**of_first, **of_second}
