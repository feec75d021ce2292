"""The LSTM that every coordinate runs: shared weights, a separate hidden state per coordinate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learnedopt.rules.base import StateSpec


class CoordinatewiseLSTM(nn.Module):
    r"""A stack of LSTM layers applied to each coordinate by itself, coordinates last.

    Layer :math:`l` with input :math:`x` (the features, or the layer below):

    .. math::
        (i, f, g, o) &= W_l x + R_l h_l + b_l \\
        c_l' &= \sigma(f) \odot c_l + \sigma(i) \odot \tanh(g) \\
        h_l' &= \sigma(o) \odot \tanh(c_l')

    Weights start uniform in :math:`\pm H^{-1/2}`, biases at zero, except the forget gate's at one.

    Args:
        input_size: Features per coordinate, d.
        hidden_size: Units per layer, H.
        num_layers: Layers, L.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("input_size", input_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        bound = hidden_size**-0.5
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.input_weights = nn.ParameterList(
            torch.empty(4 * hidden_size, size).uniform_(-bound, bound) for size in sizes
        )
        self.recurrent_weights = nn.ParameterList(
            torch.empty(4 * hidden_size, hidden_size).uniform_(-bound, bound) for _ in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(4 * hidden_size) for _ in sizes)
        with torch.no_grad():
            for bias in self.biases:
                bias[hidden_size : 2 * hidden_size] = 1.0

    def state_spec(self) -> dict[str, StateSpec]:
        """What a rule that runs it remembers of it, ``h`` and ``c``: ``(L, H)`` each."""
        shape = (self.num_layers, self.hidden_size)
        return {"h": StateSpec(shape), "c": StateSpec(shape, accumulates=True)}

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            x: Features, ``(d, N)``.
            h, c: Hidden and cell state, ``(L, H, N)``.

        Returns:
            The top layer's output ``(H, N)``, and the new ``h`` and ``c``.
        """
        hidden, cells = [], []
        for layer in range(self.num_layers):
            gates = torch.addmm(self.biases[layer].unsqueeze(1), self.input_weights[layer], x)
            gates = torch.addmm(gates, self.recurrent_weights[layer], h[layer])
            i, f, g, o = gates.chunk(4)
            cell = torch.sigmoid(f) * c[layer] + torch.sigmoid(i) * torch.tanh(g)
            x = torch.sigmoid(o) * torch.tanh(cell)
            hidden.append(x)
            cells.append(cell)
        return x, torch.stack(hidden), torch.stack(cells)
