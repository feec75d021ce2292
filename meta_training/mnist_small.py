"""First stage of ``mnist_mlp.py``: the same network on MNIST at a seventh of the cost.

To make it: ``learnedopt meta-train mnist-small --root DATA --out runs/mnist-small --export zoo``

The images are the inner 20 x 20 pixels, which hold the digits, averaged over 2 x 2: 100 inputs instead of 784, so that an
update costs a seventh and thousands of them are affordable on a CPU. All else is as in ``mnist_mlp.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from learnedopt.data import mnist
from learnedopt.meta import MetaTrainConfig, Recipe
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import MLPClassification, TaskFamily


def small(split: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    images, labels = split
    return F.avg_pool2d(images[..., 4:24, 4:24], 2), labels


def family(root: Path | None) -> TaskFamily:
    if root is None:
        raise ValueError("this recipe trains on MNIST: say where it is with --root DIR")
    data = mnist(root)
    shrunk = replace(
        data, name="mnist-10x10", train=small(data.train), validation=small(data.validation), test=small(data.test)
    )
    return MLPClassification(shrunk, initial_std=None)


RECIPE = Recipe(
    name="mnist-small",
    description="Andrychowicz LSTM for a 100-20-10 sigmoid MLP on shrunken MNIST; the start of mnist-mlp",
    tasks="cross entropy of a 100-20-10 sigmoid MLP on MNIST at 10 x 10 pixels, batches of 128",
    rule=LSTMConfig(preprocessing="log_sign", preprocessing_p=10.0, output_scale=0.1),
    training=MetaTrainConfig(
        updates=7_000,
        unroll_length=20,
        horizon=(100, 200),
        pool=7,
        copies=1,
        objective="log_ratio",
        second_order=True,
        learning_rate=2e-3,
        final_learning_rate=5e-5,
        clip_norm=0.3,
        validate_every=500,
        validation_copies=10,
        validation_horizon=200,
    ),
    family=family,
)
