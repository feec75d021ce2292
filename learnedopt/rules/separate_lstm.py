"""The two LSTM optimizers of Andrychowicz et al. 2016 for convolutional networks: one for kernels, one for the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from learnedopt.rules.base import Segments, State, StateSpec, UpdateRule
from learnedopt.rules.lstm import LSTMConfig, LSTMRule

# Of how many dimensions a convolution's kernel is at least: outputs, inputs, and one of space or time.
_LEAST_DIMS = 3


@dataclass(frozen=True)
class SeparateLSTMConfig(LSTMConfig):
    """Settings of :class:`SeparateLSTMRule`: those of both its LSTMs."""

    kind: ClassVar[str] = "separate_lstm"


class SeparateLSTMRule(UpdateRule):
    """Two :class:`~learnedopt.rules.LSTMRule`, of the same form and with weights of their own.

    ``convolutions`` serves the tensors of three dimensions and more, which are the kernels of convolutions; ``others``
    serves matrices, biases and scales. Shapes and guarantees are those of :class:`~learnedopt.rules.LSTMRule`.

    Called by itself, on coordinates of both kinds, it computes both and picks; in an optimizer each computes its own
    tensors (:meth:`serving`).

    Source: Andrychowicz et al. 2016 (arXiv:1606.04474), section 3.3: "separate" optimizers, as those parameters are
    too different. That biases of convolutions go with the dense parameters is from the authors' code.

    >>> rule, segments = SeparateLSTMRule(), Segments([4, 2], shapes=[(1, 1, 2, 2), (2,)])
    >>> rule.convolutions.readout.bias.data.fill_(1.0)
    tensor([1.])
    >>> with torch.no_grad():
    ...     delta, _ = rule.update(torch.zeros(6), torch.ones(6), rule.init_state(segments), segments)
    >>> delta
    tensor([0.1000, 0.1000, 0.1000, 0.1000, 0.0000, 0.0000])
    """

    config_class = SeparateLSTMConfig
    config: SeparateLSTMConfig
    reads_param = False

    def __init__(self, config: SeparateLSTMConfig | None = None) -> None:
        super().__init__(config or SeparateLSTMConfig())
        settings = LSTMConfig(**dataclasses.asdict(self.config))
        self.convolutions = LSTMRule(settings)
        self.others = LSTMRule(settings)

    def serving(self, dims: int) -> LSTMRule:
        """The part that computes the updates of tensors with that many dimensions."""
        return self.convolutions if dims >= _LEAST_DIMS else self.others

    def state_spec(self) -> dict[str, StateSpec]:
        return self.others.state_spec()

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        # Filled on the device: a list would be copied to it, and the host would wait for that.
        kernels = torch.cat([grad.new_full((1,), float(len(shape) >= _LEAST_DIMS)) for shape in segments.shapes])
        return kernels.repeat(segments.copies).unsqueeze(0), {}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        here, there = (rule(param, grad, state, statistics) for rule in (self.convolutions, self.others))
        kernel = statistics[0] > 0.0
        after = {name: torch.where(kernel, here[1][name], there[1][name]) for name in here[1]}
        return torch.where(kernel, here[0], there[0]), after
