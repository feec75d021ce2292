"""What computes the rule while it is being trained."""

from __future__ import annotations

import copy

import torch

from learnedopt.kernels import extension
from learnedopt.kernels.training import fused
from learnedopt.meta.config import MetaTrainConfig
from learnedopt.rules import UpdateRule


def computed(rule: UpdateRule, config: MetaTrainConfig) -> tuple[UpdateRule, str]:
    """The rule as ``config.backend`` has it computed, and the name of what was chosen.

    The result shares the parameters of ``rule``: gradients through it, and changes to it, are the rule's own.

    Raises:
        RuntimeError: the native backend was asked for and cannot be had here.
    """
    suits = next(rule.parameters()).device.type == "cpu" and not config.estimator.perturbs_weights
    if config.backend == "native" or (config.backend == "auto" and suits and extension.why_unavailable() is None):
        return fused(rule), "native"
    if config.backend == "compiled":
        return compiled(rule), "compiled"
    return rule, "reference"


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
