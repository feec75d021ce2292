"""What a frame such as :class:`~learnedopt.rules.ScheduleFreeRule` asks: modulators, from features to a few outputs.

The frame computes features of each coordinate and of its tensor, and makes of a modulator's outputs a move that is
bounded whatever these are. A modulator of one's own is a configuration with :meth:`ModulatorConfig.build` and a
:class:`Modulator`; kernels know those of this file and leave others to the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from learnedopt.rules.base import RuleConfig, State, StateSpec
from learnedopt.rules.recurrent import CoordinatewiseLSTM


class Modulator(nn.Module):
    """Outputs of each coordinate, from its features; at first they are zero."""

    def state_spec(self) -> dict[str, StateSpec]:
        """What it remembers."""
        return {}

    def of_tensors(self, shared: Tensor, state: State) -> tuple[Tensor, State]:
        """The features that every coordinate of a tensor shares, ``(K, S)``, as they go on; new tensor-scope state."""
        return shared, {}

    def forward(self, seen: Tensor, state: State) -> tuple[Tensor, State]:
        """The outputs, ``(outputs, n)``, for features ``(features, n)``, and new coordinate-scope state."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModulatorConfig(RuleConfig):
    """Settings of a modulator."""

    def build(self, own: int, shared: int, outputs: int) -> Modulator:
        """The modulator, for so many features of each coordinate and of each tensor."""
        raise NotImplementedError


class LinearReadout(Modulator):
    """:math:`o = W f + w`, and :math:`V\\,\\mathrm{LSTM}(f)` more where there is an LSTM.

    State: ``h`` and ``c``, ``(num_layers, hidden_size, N)``; none without an LSTM.
    """

    def __init__(self, features: int, outputs: int, lstm: CoordinatewiseLSTM | None) -> None:
        super().__init__()
        self.lstm = lstm
        self.readout = nn.Linear(features + (lstm.hidden_size if lstm is not None else 0), outputs)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def state_spec(self) -> dict[str, StateSpec]:
        return self.lstm.state_spec() if self.lstm is not None else {}

    def forward(self, seen: Tensor, state: State) -> tuple[Tensor, State]:
        after: State = {}
        if self.lstm is not None:
            top, after["h"], after["c"] = self.lstm(seen, state["h"], state["c"])
            seen = torch.cat([seen, top])
        return torch.addmm(self.readout.bias.unsqueeze(1), self.readout.weight, seen), after


@dataclass(frozen=True)
class PowerLaws(ModulatorConfig):
    """The outputs are linear in the features, among them logarithms: step sizes are power laws of time, size and so on.

    It remembers nothing. The zoo's default has this one.
    """

    kind: ClassVar[str] = "power_laws"

    def build(self, own: int, shared: int, outputs: int) -> LinearReadout:
        return LinearReadout(own + shared, outputs, None)


@dataclass(frozen=True)
class CoordinateLSTM(ModulatorConfig):
    """An LSTM that every coordinate runs adds to the power laws what depends on the past."""

    kind: ClassVar[str] = "lstm_of_coordinates"
    hidden_size: int = 8
    num_layers: int = 2

    def build(self, own: int, shared: int, outputs: int) -> LinearReadout:
        lstm = CoordinatewiseLSTM(own + shared, self.hidden_size, self.num_layers)
        return LinearReadout(own + shared, outputs, lstm)


class ControlledReadout(LinearReadout):
    """A read-out of features that a controller has corrected, :math:`f' = f + \\tanh(C h)`.

    State: ``controller_h`` and ``controller_c``, ``(1, units, S)``, and that of the read-out.
    """

    def __init__(self, readout: LinearReadout, features: int, shared: int, units: int) -> None:
        super().__init__(features, readout.readout.out_features, readout.lstm)
        self.controller = CoordinatewiseLSTM(shared, units, num_layers=1)
        self.correction = nn.Linear(units, shared, bias=False)
        nn.init.zeros_(self.correction.weight)

    def state_spec(self) -> dict[str, StateSpec]:
        of_tensors = {
            f"controller_{name}": replace(spec, scope="tensor") for name, spec in self.controller.state_spec().items()
        }
        return super().state_spec() | of_tensors

    def of_tensors(self, shared: Tensor, state: State) -> tuple[Tensor, State]:
        top, h, c = self.controller(shared, state["controller_h"], state["controller_c"])
        return shared + torch.tanh(self.correction.weight @ top), {"controller_h": h, "controller_c": c}


@dataclass(frozen=True)
class TensorController(ModulatorConfig):
    """An LSTM that every tensor runs once a step corrects the features that its coordinates share.

    It costs nothing per coordinate. Its corrections are zero at first.
    """

    kind: ClassVar[str] = "controller_of_tensors"
    units: int = 4
    of_coordinates: PowerLaws | CoordinateLSTM = PowerLaws()
    """What the corrected features go to."""

    def build(self, own: int, shared: int, outputs: int) -> ControlledReadout:
        readout = self.of_coordinates.build(own, shared, outputs)
        return ControlledReadout(readout, own + shared, shared, self.units)
