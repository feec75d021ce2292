"""The default with a recurrent controller of each tensor, both trained by PES on long episodes: tried, not shipped.

After 1200 updates, best at 600, it is a little better than the default in validation (-6.830, default -6.804), and
level with it on the tasks for selection (``docs/benchmark.md``).

The controller is an LSTM that every tensor runs once a step. It sees what the read-out is told of the tensor as a
whole and corrects it, :math:`f' = f + \\tanh(C h)`, so that the read-out, its bounds and the cost of a coordinate stay
as they are. :math:`C` is zero at first and the read-out that of the default: it begins as the default.

The rule is registered where this file is loaded, and nowhere else. To make it, and to judge it on ``selection``::

    learnedopt meta-train meta_training/trials/default_controller.py --export my-zoo
    PYTHONPATH=meta_training/trials python -c "import default_controller, learnedopt.cli as c; c.main()" \\
        benchmark run --tasks selection --untuned --optimizers my-zoo/default-controller
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from learnedopt import zoo
from learnedopt.meta import MetaTrainConfig, load_recipe
from learnedopt.rules import (
    RULES,
    EigenbasisConfig,
    EigenbasisRule,
    ScheduleFreeLSTMConfig,
    ScheduleFreeLSTMRule,
    Segments,
    State,
    StateSpec,
)
from learnedopt.rules.recurrent import CoordinatewiseLSTM

SHARED = 10
"""Features that all coordinates of a tensor share: the last rows of the statistics."""


@dataclass(frozen=True)
class ControlledConfig(EigenbasisConfig):
    """Settings of :class:`ControlledRule`."""

    kind: ClassVar[str] = "controlled_eigenbasis"
    controller_size: int = 4
    """Units of the controller's LSTM, one layer."""


class Controlled(ScheduleFreeLSTMRule):
    """The rule in the bases, its features of tensors corrected by the controller."""

    def __init__(self, config: ScheduleFreeLSTMConfig, size: int) -> None:
        super().__init__(config)
        self.controller = CoordinatewiseLSTM(SHARED, size, num_layers=1)
        self.correction = nn.Linear(size, SHARED, bias=False)
        nn.init.zeros_(self.correction.weight)

    def state_spec(self) -> dict[str, StateSpec]:
        units = {
            f"controller_{name}": replace(spec, scope="tensor") for name, spec in self.controller.state_spec().items()
        }
        return super().state_spec() | units

    def statistics(
        self, param: Tensor, grad: Tensor, state: State, segments: Segments, loss: Tensor | None = None
    ) -> tuple[Tensor, State]:
        statistics, after = super().statistics(param, grad, state, segments, loss)
        others, shared = statistics[:-SHARED], statistics[-SHARED:]
        top, h, c = self.controller(shared, state["controller_h"], state["controller_c"])
        shared = shared + torch.tanh(self.correction.weight @ top)
        return torch.cat([others, shared]), after | {"controller_h": h, "controller_c": c}


class ControlledRule(EigenbasisRule):
    """:class:`~learnedopt.rules.EigenbasisRule` around :class:`Controlled`; it begins as the default."""

    config_class = ControlledConfig
    config: ControlledConfig

    def __init__(self, config: ControlledConfig | None = None) -> None:
        super().__init__(config or ControlledConfig())
        self.inner = Controlled(self.inner.config, self.config.controller_size)
        start = zoo.load_rule("default")
        assert isinstance(start, EigenbasisRule)
        self.inner.readout.load_state_dict(start.inner.readout.state_dict())


RULES[ControlledConfig.kind] = ControlledRule
_SETTINGS = {name: value for name, value in zoo.entry_info("default").config.to_dict().items() if name != "kind"}
_OTHER = load_recipe(Path(__file__).with_name("default_pes.py"))
assert isinstance(_OTHER.training, MetaTrainConfig)
RECIPE = replace(
    _OTHER,
    name="default-controller",
    description="The default with a recurrent controller of each tensor, by PES on long episodes",
    rule=ControlledConfig(**_SETTINGS),
    training=replace(_OTHER.training, validate_every=300),
    start="",
)
