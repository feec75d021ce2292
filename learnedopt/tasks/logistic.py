"""Linear classification of badly scaled features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from learnedopt.tasks.base import Batch, Params, Split, TaskFamily
from learnedopt.tasks.draws import IntRange, Range, integer, log_integer, log_uniform, log_uniform_tensor, uniform
from learnedopt.tasks.layers import ClassificationTask, init_mlp, mlp, weight


@dataclass(frozen=True, eq=False)
class LogisticTask(ClassificationTask):
    """Softmax regression of Gaussian features ``scales · z`` on the argmax of a noisy linear map of ``z``.

    Each copy has scales and a map of its own. Examples never repeat, so the splits are equally distributed.
    """

    copies: int
    features: int
    classes: int
    gain: float
    noise: float
    batch_size: int
    scales: Tensor = field(repr=False)
    teacher: Tensor = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return init_mlp(generator, self.copies, (self.features, self.classes), self.gain)

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        z = torch.randn(self.copies, self.batch_size, self.features, generator=generator)
        scores = z @ self.teacher
        scores = scores + self.noise * torch.randn(scores.shape, generator=generator)
        return z * self.scales, scores.argmax(-1)

    def logits(self, params: Params, x: Tensor) -> Tensor:
        return mlp(params, x, "relu")


@dataclass(frozen=True)
class Logistic(TaskFamily):
    """Softmax regression, the features' scales spread over up to ``2 * decades`` powers of ten.

    >>> task = Logistic(decades=(0.0, 0.0)).draw(torch.Generator().manual_seed(0), copies=2)
    >>> bool((task.scales == 1).all())
    True
    """

    features: IntRange = (5, 50)
    classes: IntRange = (2, 5)
    decades: Range = (0.0, 2.0)
    noises: Range = (0.0, 0.5)
    gains: Range = (0.01, 1.0)
    batch_sizes: IntRange = (8, 64)

    def draw(self, generator: Generator, copies: int) -> LogisticTask:
        features, classes = log_integer(generator, self.features), integer(generator, self.classes)
        spread = 10 ** uniform(generator, self.decades)
        return LogisticTask(
            copies=copies,
            features=features,
            classes=classes,
            gain=log_uniform(generator, self.gains),
            noise=uniform(generator, self.noises),
            batch_size=log_integer(generator, self.batch_sizes),
            scales=log_uniform_tensor(generator, (1 / spread, spread), (copies, 1, features)),
            teacher=weight(generator, copies, features, classes, fan_in=features),
        )
