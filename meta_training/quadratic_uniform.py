"""The LSTM optimizer for quadratics as the authors of Andrychowicz et al. 2016 (arXiv:1606.04474) coded them.

To make it: ``learnedopt meta-train quadratic-uniform --out runs/quadratic-uniform --export zoo``

Unlike the paper, W and y are uniform in [0, 1). As in it: 10 dimensions, 128 problems at a time, episodes of 100 steps,
windows of 20, no pre- or postprocessing. Meta-gradients are of second order, as in ``quadratic.py``.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.meta import MetaTrainConfig, Recipe, TruncatedBPTT
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import Quadratics, TaskFamily


def family(root: Path | None) -> TaskFamily:
    return Quadratics(entries="uniform")


RECIPE = Recipe(
    name="quadratic-uniform",
    description="Andrychowicz LSTM for 10-dimensional uniform quadratics",
    tasks="|W theta - y|^2, W (10 x 10) and y uniform in [0, 1)",
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
