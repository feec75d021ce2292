"""Batch normalization that says whose statistics it uses, and changes nothing on the way.

In an episode the question is what a query may be normalized with. There are three answers
(:data:`Normalization`), and a method's figures can depend on which was given:

* ``"transductive"``: the statistics of all queries that are predicted together, and of the support set where it passes
  through the network with them. The prediction of one query then depends on the others.
* ``"support"``: the statistics of the support set.
* ``"running"``: averages over meta-training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from learnedopt.fewshot.fast.batch_norm import batch_norm

Normalization = Literal["transductive", "support", "running"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)

Statistics = dict["EpisodicBatchNorm", tuple[Tensor, Tensor]]
"""Mean and unbiased variance that each batch normalization has used."""


@dataclass(frozen=True)
class _Scope:
    rows: int | None
    running: bool
    record: Statistics | None
    twice: bool


_SCOPE: ContextVar[_Scope | None] = ContextVar("_SCOPE", default=None)


@contextmanager
def statistics(
    rows: int | None = None,
    *,
    running: bool = False,
    record: Statistics | None = None,
    twice: bool = False,
) -> Iterator[None]:
    """Within, :class:`EpisodicBatchNorm` uses the statistics of the first ``rows`` examples, by default of all.

    Args:
        rows: How many examples, counted from the first, the statistics are taken over.
        running: Use the running averages instead.
        record: Receives the mean and the unbiased variance that each module has used, as constants.
        twice: Whether gradients will be differentiated again: the same values, and faster second derivatives.
    """
    token = _SCOPE.set(_Scope(rows, running, record, twice))
    try:
        yield
    finally:
        _SCOPE.reset(token)


class EpisodicBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d``, ``2d`` or ``3d`` that within :func:`statistics` leaves its running averages alone.

    Outside it is the module that it replaces. Inside, gradients flow through whatever statistics were taken over
    examples, and the forward pass has no side effect, so that it may run inside ``torch.func`` transforms.
    """

    def forward(self, x: Tensor) -> Tensor:
        scope = _SCOPE.get()
        if scope is None:
            return super().forward(x)
        values = {"running_mean": self.running_mean, "running_var": self.running_var}
        x, used = _normalized(x, scope, self.eps, weight=self.weight, bias=self.bias, **values)
        if scope.record is not None and used is not None:
            scope.record[self] = used
        # Under vmap an output of a custom operation is a view, which a ReLU in place must not write to.
        return x.clone() if scope.twice else x

    def episodes(self, x: Tensor, episodes: int, values: Mapping[str, Tensor], prefix: str) -> Tensor:
        """What :meth:`forward` does to each of a batch of episodes, within :func:`statistics`.

        Args:
            x: ``(n, E * channels, ...)``.
            episodes: E.
            values: Weight, bias and running averages to use in place of the module's own: ``(E, channels)``, or
                ``(channels,)`` for all episodes.
            prefix: Of their names.

        Returns:
            As ``x``. Statistics are recorded as ``(E, channels)``.
        """
        scope = _SCOPE.get()
        assert scope is not None

        def found(name: str) -> Tensor | None:
            value = values.get(prefix + name, getattr(self, name))
            # Contiguous, because torch's gradient for channels last takes a weight that was expanded to be so.
            return None if value is None else in_channels(value, 1, episodes).contiguous()

        names = ("weight", "bias", "running_mean", "running_var") if scope.running else ("weight", "bias")
        x, used = _normalized(x, scope, self.eps, **{name: found(name) for name in names})
        if scope.record is not None and used is not None:
            mean, variance = (value.view(episodes, -1) for value in used)
            scope.record[self] = (mean, variance)
        return x

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch normalization needs (n, channels, ...), got {tuple(input.shape)}")

    def track(self, mean: Tensor, variance: Tensor, row: int | None = None) -> None:
        """Move the running averages as ``nn.BatchNorm2d`` does in training, if there are any.

        Args:
            mean, variance: Statistics ``(channels,)``.
            row: Which averages, where there is a table of several.
        """
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        tracked = self.num_batches_tracked if row is None else self.num_batches_tracked[row]
        tracked.add_(1)
        momentum = 1.0 / float(tracked) if self.momentum is None else self.momentum
        for average, value in ((self.running_mean, mean), (self.running_var, variance)):
            (average if row is None else average[row]).lerp_(value, momentum)


def _normalized(
    x: Tensor,
    scope: _Scope,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Normalize channels, which are axis 1. Also the statistics, if they were taken."""
    if scope.running:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps), None
    part = x if scope.rows is None else x[: scope.rows]
    if part.numel() == part.shape[1]:
        raise ValueError(
            "batch normalization cannot take statistics of one value: give it more examples together, or choose "
            "normalization='support' or 'running'"
        )
    if len(part) == len(x):
        if scope.twice:
            x, mean, variance = batch_norm(x, weight, bias, eps)
            return x, (mean, variance)
        if scope.record is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), None
        # With a momentum of one, what torch puts into the running averages is this batch's statistics.
        dtype = x.dtype if weight is None else weight.dtype
        mean, variance = (x.new_zeros(x.shape[1], dtype=dtype) for _ in range(2))
        return F.batch_norm(x, mean, variance, weight, bias, True, 1.0, eps), (mean, variance)
    variance, mean = torch.var_mean(part, [axis for axis in range(x.ndim) if axis != 1], correction=0)
    count = part.numel() // part.shape[1]
    used = (mean.detach(), variance.detach() * count / max(count - 1, 1))
    shape = (-1, *[1] * (x.ndim - 2))
    scale = torch.rsqrt(variance + eps)
    if weight is None or bias is None:
        return (x - mean.view(shape)) * scale.view(shape), used
    return torch.addcmul(bias.view(shape), x - mean.view(shape), (scale * weight).view(shape)), used


def in_channels(value: Tensor, ndim: int, episodes: int) -> Tensor:
    """``(E, channels, ...)`` to ``(E * channels, ...)``; a value of ``ndim`` axes is the same for all episodes."""
    if value.ndim > ndim:
        return value.squeeze(0) if episodes == 1 else value.flatten(0, 1)
    return value if episodes == 1 else value.repeat(episodes, *[1] * (ndim - 1))


def episodic(module: nn.Module, track: bool) -> nn.Module:
    """``module`` with every batch normalization replaced by :class:`EpisodicBatchNorm`, on the same parameters.

    Args:
        module: Changed in place, unless it is itself a batch normalization.
        track: Whether there shall be running averages.

    Raises:
        ValueError: a batch normalization is not one of torch's own classes, or has hooks: the replacement would leave
            out what they do.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in replaced:
            if isinstance(module, _BatchNorm) and not isinstance(module, EpisodicBatchNorm):
                replaced[module] = _replacement(module, track)
            else:
                replaced[module] = module
            # Not named_children, which leaves out a module's second place.
            for name, child in module._modules.items():
                if child is not None:
                    module.add_module(name, visit(child))
        return replaced[module]

    return visit(module)


def _replacement(module: _BatchNorm, track: bool) -> EpisodicBatchNorm:
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        raise ValueError(
            f"{type(module).__name__} is a batch normalization of its own kind, and only torch's BatchNorm1d, 2d, 3d "
            "and SyncBatchNorm can be given an episode's statistics: use one of these in the backbone"
        )
    if has_hooks(module):
        raise ValueError("a batch normalization of the backbone has hooks, which would be lost: remove them")
    found = EpisodicBatchNorm(module.num_features, module.eps, module.momentum, False, track)
    found.weight, found.bias, found.affine = module.weight, module.bias, module.affine
    if module.weight is not None:
        found.to(module.weight)
    if track and module.running_mean is not None:
        found.running_mean, found.running_var = module.running_mean, module.running_var
        found.num_batches_tracked = module.num_batches_tracked
    return found.train(module.training)


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens when the module is called that its class does not say."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds)


def batch_norms(module: nn.Module) -> dict[str, EpisodicBatchNorm]:
    """The batch normalizations in a module by name."""
    return {name: found for name, found in module.named_modules() if isinstance(found, EpisodicBatchNorm)}
