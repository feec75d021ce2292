"""The meta-LSTM of Ravi & Larochelle 2017: an LSTM whose cell state is the learner's parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, Segments, State, StateSpec, UpdateRule
from learnedopt.rules.preprocessing import log_sign
from learnedopt.rules.recurrent import CoordinatewiseLSTM


class Row(IntEnum):
    """Of the statistics: the two channels of the loss, features that every coordinate has."""

    LOG_LOSS = 0
    SIGN_LOSS = 1
    FEATURES = LOG_LOSS  # where they begin


@dataclass(frozen=True)
class MetaLSTMConfig(RuleConfig):
    """Settings of :class:`MetaLSTMRule`; the defaults are the paper's. Where the authors' code differs, it is said."""

    kind: ClassVar[str] = "meta_lstm"
    hidden_size: int = 20
    preprocessing_p: float = 10.0
    gate_feedback: Literal["gate", "preactivation"] = "gate"
    """What a gate sees of its past: its value, as in the paper, or what went into its sigmoid, as in the code."""
    gradient_divisor: float = 1.0
    """Gradients are divided by this first. The authors' code divides the averaged gradient by the batch size again."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Ranges the gates' biases start in: the rule begins as gradient descent with a small step and little decay."""
    init_bound: float = 0.01
    """All other weights start uniform within plus or minus this."""
    learner_shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the learner's parameters where their starting values (c_0) are learned too; empty for none."""


class MetaLSTMRule(UpdateRule):
    r"""Gradient descent with learned, per-coordinate forget and input gates.

    .. math::
        h_t &= \mathrm{LSTM}(\mathrm{pre}(\nabla_t), \mathrm{pre}(\mathcal L_t)) \\
        i_t &= \sigma(W_I\,[h_t, \theta_{t-1}, i_{t-1}] + b_I) \\
        f_t &= \sigma(W_F\,[h_t, \theta_{t-1}, f_{t-1}] + b_F) \\
        \theta_t &= f_t \odot \theta_{t-1} - i_t \odot \nabla_t

    :math:`\mathrm{pre}` is :func:`~learnedopt.rules.preprocessing.log_sign`; :math:`\theta_0` may be learned (the
    cell's initial state :math:`c_0`), see :attr:`initial_params`. The gates' feedback starts at zero. A zero
    gradient still shrinks parameters by :math:`f_t`, like weight decay.

    Shapes: state ``h`` and ``c`` are ``(1, hidden_size, N)``, ``forget`` and ``input`` are ``(N,)``.

    Source: Ravi & Larochelle, "Optimization as a model for few-shot learning", ICLR 2017, section 3.

    >>> from learnedopt.rules import MetaLSTMConfig, Segments
    >>> rule, segments = MetaLSTMRule(MetaLSTMConfig()), Segments([3])
    >>> delta, _ = rule.update(torch.ones(3), torch.ones(3), rule.init_state(segments), segments, torch.tensor(2.0))
    >>> bool((delta < 0).all())
    True
    """

    config_class = MetaLSTMConfig
    config: MetaLSTMConfig
    needs_loss = True

    def __init__(self, config: MetaLSTMConfig | None = None) -> None:
        super().__init__(config or MetaLSTMConfig())
        config = self.config
        if config.gate_feedback not in ("gate", "preactivation"):
            raise ValueError(f"gate_feedback must be 'gate' or 'preactivation', got {config.gate_feedback!r}")
        for name in ("preprocessing_p", "gradient_divisor"):
            if not 0.0 < getattr(config, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
        if not 0.0 <= config.init_bound < math.inf:
            raise ValueError(f"init_bound must be finite and not negative, got {config.init_bound}")
        for name in ("forget_bias", "input_bias"):
            bounds = getattr(config, name)
            if len(bounds) != 2 or not -math.inf < bounds[0] <= bounds[1] < math.inf:
                raise ValueError(f"{name} must be a range (low, high), got {bounds}")
        if any(size < 0 for shape in config.learner_shapes for size in shape):
            raise ValueError(f"learner_shapes must not be negative, got {config.learner_shapes}")
        self.lstm = CoordinatewiseLSTM(4, config.hidden_size, 1)
        self.forget_gate = nn.Linear(config.hidden_size + 2, 1)
        self.input_gate = nn.Linear(config.hidden_size + 2, 1)
        for weight in self.parameters():
            nn.init.uniform_(weight, -config.init_bound, config.init_bound)
        nn.init.uniform_(self.forget_gate.bias, *config.forget_bias)
        nn.init.uniform_(self.input_gate.bias, *config.input_bias)
        if config.learner_shapes:
            self.c0 = nn.Parameter(torch.zeros(sum(math.prod(shape) for shape in config.learner_shapes)))
        else:
            self.register_parameter("c0", None)

    @property
    def initial_params(self) -> list[Tensor] | None:
        """The learned initial parameters in ``learner_shapes``, views of ``c0``; ``None`` where none are learned."""
        if self.c0 is None:
            return None
        shapes = self.config.learner_shapes
        return [part.view(shape) for part, shape in zip(self.c0.split([math.prod(s) for s in shapes]), shapes)]

    def state_spec(self) -> dict[str, StateSpec]:
        return {**self.lstm.state_spec(), "forget": StateSpec(), "input": StateSpec()}

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        if loss is None:
            raise ValueError("the meta-LSTM reads the training loss at every step, and none was given")
        if loss.numel() not in (1, segments.copies):
            raise ValueError(f"the loss must be a scalar or one per copy ({segments.copies}), got {tuple(loss.shape)}")
        per_copy = loss.to(grad).reshape(-1, 1).expand(segments.copies, len(segments.sizes))
        return log_sign(per_copy.reshape(-1), self.config.preprocessing_p), {}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        grad = grad / self.config.gradient_divisor
        x = torch.cat([log_sign(grad, self.config.preprocessing_p), statistics.expand(2, grad.numel())])
        top, h, c = self.lstm(x, state["h"], state["c"])
        forget, forget_feedback = self._gate(self.forget_gate, top, param, state["forget"])
        input_, input_feedback = self._gate(self.input_gate, top, param, state["input"])
        delta = (forget - 1.0) * param - input_ * grad
        return delta, {"h": h, "c": c, "forget": forget_feedback, "input": input_feedback}

    def _gate(self, gate: nn.Linear, top: Tensor, param: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.cat([top, param.unsqueeze(0), previous.unsqueeze(0)])
        preactivation = torch.addmm(gate.bias.unsqueeze(1), gate.weight, z).squeeze(0)
        value = torch.sigmoid(preactivation)
        return value, value if self.config.gate_feedback == "gate" else preactivation
