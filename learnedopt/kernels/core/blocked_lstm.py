"""An LSTM in the blocked backend: a layer is one matrix product, and cells are updated where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from learnedopt.kernels.core.blocked import Block
from learnedopt.rules.recurrent import CoordinatewiseLSTM


class Layers:
    """An LSTM made ready: weights and bias side by side, to be multiplied with inputs, hidden state and ones."""

    def __init__(self, lstm: CoordinatewiseLSTM) -> None:
        i, f, g, o = torch.arange(4 * lstm.hidden_size).chunk(4)
        order = torch.cat([i, f, o, g])  # the sigmoids together
        layers = zip(lstm.input_weights, lstm.recurrent_weights, lstm.biases)
        self._weights = [torch.cat([w, r, b.unsqueeze(1)], dim=1)[order] for w, r, b in layers]

    def run(self, block: Block) -> None:
        """All layers, from the features to ``top``."""
        v = block.views
        for layer, weights in enumerate(self._weights):
            block.read("h", layer, v.hidden[layer])
            torch.mm(weights, v.inputs[layer], out=v.gates)
            v.sigmoids.sigmoid_()
            v.tanhs.tanh_()
            cell = block.open("c", layer, v.cell)
            cell.mul_(v.forget).addcmul_(v.input, v.tanhs)
            torch.mul(v.output, torch.tanh(cell, out=v.scratch), out=v.outputs[layer])
            block.write("c", layer, cell)
            block.write("h", layer, v.outputs[layer])


def with_bias(linear: torch.nn.Linear) -> Tensor:
    """A linear layer's weight and bias side by side, ``(outputs, inputs + 1)``."""
    return torch.cat([linear.weight, linear.bias.unsqueeze(1)], dim=1)
