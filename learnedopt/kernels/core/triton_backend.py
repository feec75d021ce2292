"""One launch for a step on CUDA: preprocessing, LSTM, read-out and the update of parameters in one pass over the state.

Nothing waits for the device: a tensor ``lr`` and ``skip`` are read by the kernel. Addresses go to the device in a table
that is kept as long as they stay the same, as they do under CUDA graphs once a few steps have been taken before the
capture. A rule's folder has its kernels and a :class:`Program` that hands them the rule.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learnedopt.kernels.core import registry
from learnedopt.kernels.core.base import Backend, Case, StepOptions, Tensors
from learnedopt.kernels.core.means import TakesMeans, statistics_from_sums, statistics_without_coordinates
from learnedopt.kernels.core.tables import Work, triton_dtype
from learnedopt.rules.base import State, UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM

CHUNK = 1024
"""Coordinates of one program."""
LARGEST = 64
"""Units of a layer at most: its tiles must stay in registers."""


class TritonBackend(Backend):
    """Triton kernels for rules that have a program, on CUDA; on the CPU under Triton's interpreter, to test them."""

    name: ClassVar[str] = "triton"

    def refusal(self, case: Case) -> str | None:
        if case.device.type != "cuda" and not (case.device.type == "cpu" and _interpreted()):
            return f"it runs on CUDA, and the parameters are on {case.device}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if case.dtype != torch.float32:
            return f"it computes in float32, and this takes {case.dtype}"
        return registry.refusal(self.name, case.rule)

    def unprepared(self) -> str | None:
        return "Triton's interpreter is for tests" if _interpreted() else None

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        program: Program = registry.program(self.name, rule)
        return program.statistics(rule, tensors, loss)

    def update(self, rule: UpdateRule, tensors: Tensors, statistics: Tensor, options: StepOptions) -> None:
        program: Program = registry.program(self.name, rule)
        lr, skip = options.lr, options.skip
        with _on(tensors.device):
            work = Work(program.entries, tensors, CHUNK)
            # Without layers nothing is kept in that dtype.
            state = tensors.states[0]["h"].dtype if program.layers else torch.float32
            for launch in work.launches:
                program.step_kernel[(len(launch.chunks),)](
                    work.table,
                    launch.chunks,
                    statistics.contiguous(),
                    len(tensors.params),
                    lr if isinstance(lr, Tensor) else statistics,  # any address: it is not read
                    0.0 if isinstance(lr, Tensor) else float(lr),
                    float(options.weight_decay),
                    statistics if skip is None else skip.view(torch.uint8),
                    MAXIMIZE=tensors.maximize,
                    LR_IN_MEMORY=isinstance(lr, Tensor),
                    SKIP=skip is not None,
                    PARAM=launch.param,
                    GRAD=launch.grad,
                    STATE=triton_dtype(state),
                    CHUNK=CHUNK,
                    BLOCK=program.block,
                    num_warps=program.warps,
                    num_stages=1,  # tiles are loaded once: there is nothing to load ahead
                    enable_fp_fusion=True,
                    **program.arguments,
                )
            work.write_back()


class Program:
    """A rule as its kernels take it.

    Args:
        arguments: What its step kernel takes besides what all do, by name: tensors, numbers, and in capitals what is
            known when it is compiled.
        layers: Of an LSTM that the rule has.
        of_sums: What the other kernel takes besides what all do.
    """

    step_kernel: ClassVar[Any]
    sums_kernel: ClassVar[Any] = None
    """Adds up what the rule takes the means of; ``None`` where it takes none."""
    entries: ClassVar[tuple[str, ...]] = ()
    """State that is one number per coordinate, in the order in which the kernels know it."""
    num_means: ClassVar[int] = 0

    def __init__(self, arguments: dict[str, Any], layers: int = 0, of_sums: dict[str, Any] | None = None) -> None:
        self.arguments, self.layers, self.of_sums = arguments, layers, of_sums or {}

    @classmethod
    def refusal(cls, rule: UpdateRule) -> str | None:
        """Why it cannot serve a rule, as the end of a sentence; ``None`` where it can."""
        return None

    @property
    def block(self) -> int:
        """Coordinates that a program works on at once: tiles of units must stay in registers."""
        return 64 if self.layers else CHUNK

    @property
    def warps(self) -> int:
        return 8 if self.layers else 4

    def statistics(self, rule: UpdateRule, tensors: Tensors, loss: Tensor | None) -> tuple[Tensor, State]:
        """What the rule's ``statistics`` gives, its sums taken in one pass."""
        if self.sums_kernel is None:
            return statistics_without_coordinates(rule, tensors, loss)

        def sums(corrections: Tensor) -> Tensor:
            totals = corrections.new_zeros(self.num_means, corrections.shape[1])
            work = Work(self.entries, tensors, CHUNK)
            for launch in work.launches:
                parts = torch.empty(len(launch.chunks), self.num_means, device=tensors.device)
                self.sums_kernel[(len(parts),)](
                    work.table,
                    launch.chunks,
                    corrections,
                    len(tensors.params),
                    parts,
                    MAXIMIZE=tensors.maximize,
                    PARAM=launch.param,
                    GRAD=launch.grad,
                    OWN_GRAD=launch.own_grad,
                    CHUNK=CHUNK,
                    enable_fp_fusion=True,
                    **self.of_sums,
                )
                # unsafe: lengths are not checked, which would be to wait for the device.
                totals += torch.segment_reduce(parts, "sum", lengths=launch.lengths, unsafe=True).T
            return totals

        taking: TakesMeans = rule  # type: ignore[assignment]
        with _on(tensors.device):
            return statistics_from_sums(taking, tensors, sums)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# What programs make of weights -------------------------------------------------------------------------------------


def too_large(lstm: CoordinatewiseLSTM) -> str | None:
    """A refusal of LSTMs with too many units."""
    units = lstm.hidden_size
    return f"it takes rules of up to {LARGEST} units, and this has {units}" if units > LARGEST else None


def padded_to(units: int) -> int:
    """What Triton takes as the side of a matrix."""
    return max(16, 1 << max(units - 1, 0).bit_length())


def lstm_arguments(lstm: CoordinatewiseLSTM, inputs: nn.Linear | None = None) -> dict[str, Any]:
    """What kernels with an LSTM take of it (:func:`learnedopt.kernels.core.triton.lstm`).

    Args:
        inputs: A layer before its first, of which the kernel is given the weights in the place of ``features``.
    """
    padded = padded_to(lstm.hidden_size)

    def gates(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (4, lstm.hidden_size))

    def split(weights: Sequence[Tensor]) -> Tensor:
        """Square weights of each layer, in two float16 that add up to them."""
        whole = torch.stack([_pad(gates(weight), padded, padded) for weight in weights])
        high = whole.half()
        if not bool(high.isfinite().all()):
            raise ValueError("the backend 'triton' takes weights below 65504 only; ask for backend='reference'")
        return torch.stack([high, (whole - high).half()])

    recurrent = split(list(lstm.recurrent_weights))
    above = list(lstm.input_weights)[1:]
    features = gates(lstm.input_weights[0]).transpose(1, 2)
    if inputs is not None:
        above = list(lstm.input_weights)
        features = torch.cat([inputs.weight.T, inputs.bias.unsqueeze(0)])
    return {
        "features": _pad(features, padded),
        "recurrent": recurrent,
        "below": split(above) if above else recurrent,  # any address: it is not read
        "biases": torch.stack([_pad(gates(bias), padded) for bias in lstm.biases]),
        "LAYERS": lstm.num_layers,
        "UNITS": lstm.hidden_size,
        "PADDED": padded,
    }


def adam_arguments(momentum_decay: float, square_decay: float, eps: float) -> dict[str, float]:
    """What kernels take that keep Adam's moments (:func:`learnedopt.kernels.core.triton.adam_directions`)."""
    rests = {"momentum_rest": 1.0 - momentum_decay, "square_rest": 1.0 - square_decay}
    return {"momentum_decay": momentum_decay, "square_decay": square_decay, **rests, "eps": eps}


def readout(units: Tensor, others: Tensor | None, bias: Tensor) -> Tensor:
    """A row for each output: units, padded; other inputs; bias."""
    parts = [_pad(units, padded_to(units.shape[1])), *([] if others is None else [others]), bias.unsqueeze(1)]
    return torch.cat(parts, dim=1).contiguous()


def _pad(weight: Tensor, *sizes: int) -> Tensor:
    """Zeros after the ends of the last dimensions, to these sizes."""
    for dim, size in zip((-1, -2), reversed(sizes)):
        shape = list(weight.shape)
        shape[dim] = size - shape[dim]
        weight = torch.cat([weight, weight.new_zeros(shape)], dim=dim)
    return weight.contiguous()
