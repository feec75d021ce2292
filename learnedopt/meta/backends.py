"""What computes the rule while it is being trained."""

from __future__ import annotations

import copy

import torch

from learnedopt.kernels.core import extension
from learnedopt.kernels.lstm_training import fused
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.rules import UpdateRule
from learnedopt.rules.recurrent import CoordinatewiseLSTM


def computed(rule: UpdateRule, config: MetaTrainConfig) -> tuple[UpdateRule, str]:
    """The rule as ``config.backend`` has it computed, and the name of what was chosen.

    The result shares the parameters of ``rule``: gradients through it, and changes to it, are the rule's own.

    Raises:
        ValueError: the native backend was asked for and cannot be had here.
    """
    if config.backend == "compiled":
        return compiled(rule), "compiled"
    if config.backend == "native" or (config.backend == "auto" and not config.estimator.perturbs_weights):
        reason = _why_not_native(rule)
        if reason is None:
            return fused(rule), "native"
        if config.backend == "native":
            raise ValueError(f"the native backend was asked for and cannot be had: {reason}")
    return rule, "reference"


def _why_not_native(rule: UpdateRule) -> str | None:
    """As the end of a sentence; ``None`` where the kernels can serve. Compiles them if they might."""
    if not any(isinstance(module, CoordinatewiseLSTM) for module in rule.modules()):
        return f"it computes LSTMs, and {type(rule).__name__} has none here"
    device = next(rule.parameters()).device
    if device.type != "cpu":
        return f"it runs on the CPU, and the rule is on {device}"
    return extension.why_unavailable()


def compiled(rule: UpdateRule) -> UpdateRule:
    """A copy that shares all parameters and runs its ``update`` through ``torch.compile``; on CUDA, as CUDA graphs.

    Compiling takes half a minute for each new shape of the tasks, up to torch's limit of recompilations: this is for
    families whose tasks have one structure.
    """
    clone = copy.copy(rule)
    on_cuda = next(rule.parameters()).device.type == "cuda"
    # An attribute of the copy, which the method of the class gives way to.
    clone.update = torch.compile(rule.update, dynamic=False, mode="reduce-overhead" if on_cuda else None)  # type: ignore[method-assign]
    return clone
