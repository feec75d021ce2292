"""The LSTM optimizer for random quadratics: Andrychowicz et al. 2016 (arXiv:1606.04474), section 3.1.

To make it: ``learnedopt meta-train quadratic --out runs/quadratic --export zoo``

As in the paper: Gaussian W and y, 10 dimensions, 128 problems at a time, episodes of 100 steps, windows of 20,
no pre- or postprocessing. Unlike it, meta-gradients are of second order, which learn in fewer updates and cost little
more.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.meta import MetaTrainConfig, Recipe, TruncatedBPTT
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics, TaskFamily


def family(root: Path | None) -> TaskFamily:
    return Quadratics(entries="gaussian")


RECIPE = Recipe(
    name="quadratic",
    description="Andrychowicz LSTM for 10-dimensional Gaussian quadratics",
    tasks="|W theta - y|^2, W (10 x 10) and y standard normal",
    rule=LSTMConfig(preprocessing="identity", output_scale=1.0),
    training=MetaTrainConfig(
        updates=10_000,
        unroll_length=20,
        horizon=(100, 100),
        pool=5,
        copies=128,
        estimator=TruncatedBPTT(second_order=True),
        learning_rate=5e-3,
        final_learning_rate=1e-4,
        clip_norm=1.0,
        validate_every=500,
        validation_copies=1000,
    ),
    family=family,
)
