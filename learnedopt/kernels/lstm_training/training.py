"""Meta-training faster: the LSTM of a rule as one differentiable operator."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from learnedopt.kernels.core import extension
from learnedopt.rules.base import UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM

RuleT = TypeVar("RuleT", bound=UpdateRule)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class NativeLSTM(CoordinatewiseLSTM):
    r"""A :class:`~learnedopt.rules.recurrent.CoordinatewiseLSTM` as one compiled operator on the CPU.

    It shares the parameters of the module it is made from. Of a step it keeps for the backward pass only the state,
    and computes the activations again, a tile of coordinates at a time: plain torch keeps nine arrays the size of
    the cells and reads them from memory. Gradients with respect to everything but of first order only. Results are
    those of torch up to rounding, and the same at every run with one number of threads.

    Args:
        lstm: The module whose parameters to use.

    Raises:
        RuntimeError: the compiled kernels are not available here; or, at a step, a tensor is not on the CPU, dtypes
            differ or are neither float32 nor float64, or shapes do not fit; or second derivatives are asked for.
    """

    def __init__(self, lstm: CoordinatewiseLSTM) -> None:
        extension.operators()
        nn.Module.__init__(self)
        self.hidden_size = lstm.hidden_size
        self.num_layers = lstm.num_layers
        self.input_weights = lstm.input_weights
        self.recurrent_weights = lstm.recurrent_weights
        self.biases = lstm.biases

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = zip(self.input_weights, self.recurrent_weights, self.biases)
        weights = [weight for layer in layers for weight in layer]
        if devices := sorted({str(tensor.device) for tensor in (x, h, c, *weights) if tensor.device.type != "cpu"}):
            raise RuntimeError(f"the compiled kernels run on the CPU, and a tensor is on {devices[0]}")
        top, h, c = _LSTMStep.apply(x, h, c, *weights)
        return top, h, c


class _LSTMStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        new_h, new_c = extension.operators().lstm_forward(x, h, c, weights)
        ctx.save_for_backward(x, h, c, new_h, *weights)
        ctx.set_materialize_grads(False)
        # The same memory, but to autograd a tensor of its own: the gradient of new_h[-1] would be an array as large as
        # new_h, zero in all other layers, to be added to that of new_h.
        top = new_h.new_empty(0).set_(new_h.untyped_storage(), new_h[:-1].numel(), new_h.shape[1:])
        return top, new_h, new_c

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # What create_graph=True asks for. Without a graph, second derivatives would be wrong and nobody told.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the compiled LSTM has first derivatives only, and create_graph=True asks for a graph of them: use "
                "the rule as it was before fused()"
            )
        x, h, c, new_h, *weights = ctx.saved_tensors
        dx, dh, dc, d_weights = extension.operators().lstm_backward(
            x, h, c, new_h, weights, *gradients, ctx.needs_input_grad[0]
        )
        return dx, dh, dc, *d_weights


def fused(rule: RuleT) -> RuleT:
    """The same rule, its LSTM compiled: a copy that shares all parameters, for meta-training on the CPU.

    Gradients through the copy reach the parameters of ``rule``, and an optimizer that steps these changes both.

    Args:
        rule: Any rule; its own modules stay as they are.

    Returns:
        A rule of the same class in which every ``CoordinatewiseLSTM`` is a :class:`NativeLSTM`; ``rule`` itself, if it
        has none.

    Raises:
        RuntimeError: the compiled kernels are not available here; the message says why
            (:func:`~learnedopt.kernels.core.extension.why_unavailable`).

    >>> from learnedopt.kernels.core import extension
    >>> from learnedopt.rules import AdamLSTMRule
    >>> rule = AdamLSTMRule()
    >>> fast = fused(rule) if extension.why_unavailable() is None else rule
    >>> all(mine is its for mine, its in zip(rule.parameters(), fast.parameters()))
    True
    """
    return _replace_lstms(rule)


def _replace_lstms(module: ModuleT) -> ModuleT:
    if isinstance(module, CoordinatewiseLSTM):
        return NativeLSTM(module)  # type: ignore[return-value]
    if not any(isinstance(child, CoordinatewiseLSTM) for child in module.modules()):
        return module
    clone = copy.copy(module)
    clone._modules = {
        name: child if child is None else _replace_lstms(child) for name, child in module._modules.items()
    }
    return clone
