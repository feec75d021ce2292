"""Hand-written optimizers that learned ones are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Baseline:
    """An optimizer of ``torch.optim`` with everything fixed but the learning rate.

    >>> BASELINES["nag"]([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    SGD (...
        nesterov: True
    ...)
    """

    make: Callable[..., Optimizer]
    default_lr: float | None = None
    """What ``torch.optim`` uses if none is given, where that is meant as advice: ``None`` for the SGD family."""

    def __call__(self, params: Iterable[Tensor], lr: float) -> Optimizer:
        return self.make(params, lr=lr)


BASELINES: dict[str, Baseline] = {
    "sgd": Baseline(torch.optim.SGD),
    "sgd_momentum": Baseline(partial(torch.optim.SGD, momentum=0.9)),
    "nag": Baseline(partial(torch.optim.SGD, momentum=0.9, nesterov=True)),
    "rmsprop": Baseline(torch.optim.RMSprop, default_lr=0.01),
    "adam": Baseline(torch.optim.Adam, default_lr=0.001),
    "adamw": Baseline(torch.optim.AdamW, default_lr=0.001),
}
"""Every baseline by name. All are elementwise: what one coordinate does depends on its own gradients alone."""
