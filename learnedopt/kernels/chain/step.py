"""A step of two rules in a row."""

from __future__ import annotations

from dataclasses import replace

import torch

from learnedopt.kernels.chain import blocked, native
from learnedopt.kernels.core import blocks, dispatch
from learnedopt.kernels.core.base import Backend, StepOptions, Tensors
from learnedopt.rules import ChainRule, UpdateRule

AT_ONCE = 4 << 20
"""Coordinates whose directions are kept at once, 16 MiB in float32, unless a single tensor has more."""


def parts(rule: ChainRule) -> tuple[UpdateRule, UpdateRule]:
    """What backends are given."""
    return rule.first, rule.then


def step(backend: Backend, rule: ChainRule, tensors: Tensors, options: StepOptions) -> None:
    """As :func:`learnedopt.kernels.step`: at once what can be taken so, else rule by rule."""
    if backend.name not in ("native", "blocked") or tensors.total is not None or not native.serves(rule):
        _step_apart(backend, rule, tensors, options)
        return
    rest = list(range(len(tensors.params)))
    if backend.name == "native":
        rest = native.step(rule, tensors, options)
    if rest:
        blocked.step(rule, tensors if len(rest) == len(tensors.params) else tensors.select(rest), options)


def _step_apart(backend: Backend, rule: ChainRule, tensors: Tensors, options: StepOptions) -> None:
    # Before the first rule moves: what both count, such as steps, both have counted once in the end.
    statistics, tensor_state = backend.statistics(rule.then, tensors, options.loss)
    statistics, changed = dispatch.with_lr(rule.then, tensors, statistics, options.lr)
    tensor_state |= changed
    for indices in blocks.bundles([param.numel() for param in tensors.params], AT_ONCE):
        some = tensors.select(indices)
        here = statistics if len(indices) == statistics.shape[1] else statistics[:, indices].contiguous()
        moved = [torch.zeros(param.shape, dtype=some.dtype, device=param.device) for param in some.params]
        if rule.first.reads_param:
            torch._foreach_add_(moved, list(some.params))
        dispatch.step(backend, rule.first, replace(some, params=moved), replace(options, lr=1.0, weight_decay=0.0))
        if rule.first.reads_param:
            torch._foreach_sub_(moved, list(some.params))
        if not tensors.maximize:  # else the second reverses them
            torch._foreach_neg_(moved)
        backend.update(rule.then, replace(some, grads=moved, own_grads=None), here, options)
    dispatch.keep_tensor_state(tensors.states, tensor_state, options.skip)
