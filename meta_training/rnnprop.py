"""RNNprop: Lv, Jiang & Li 2017 (arXiv:1703.03633).

To make it: ``learnedopt meta-train rnnprop --root DATA --out runs/rnnprop --export zoo``

As in the paper and its code: half of the episodes on the 784-20-10 sigmoid network on MNIST, all parameters starting
with standard deviation 0.1, half on the twenty-dimensional function of squares that stop growing; each coordinate
scaled at random, by exp U(-3, 3) on the network and exp U(-1, 1) on the function; episodes of 100 steps; windows of 20,
of which the last loss counts. Unlike there:

* The two tasks take turns by chance. There each update adds their meta-losses up.
* The learning rate falls from 1e-3 to 1e-4, where theirs is 1e-4: an hour of one CPU thread is fewer updates.

DATA holds MNIST where torchvision keeps it, in MNIST/raw.
"""

from __future__ import annotations

import math
from pathlib import Path

from learnedopt.data import mnist
from learnedopt.meta import MetaTrainConfig, Recipe, TruncatedBPTT
from learnedopt.rules import RNNpropConfig
from learnedopt.tasks import Mixture, MLPClassification, PiecewiseSquare, Reparametrized, TaskFamily


def family(root: Path | None) -> TaskFamily:
    if root is None:
        raise ValueError("this recipe trains on MNIST: say where it is with --root DIR")
    network = MLPClassification(mnist(root), initial_std=0.1)
    return Mixture(
        (
            Reparametrized(network, (1.0, 1.0), (math.exp(-3.0), math.exp(3.0))),
            Reparametrized(PiecewiseSquare(), (1.0, 1.0), (math.exp(-1.0), math.exp(1.0))),
        )
    )


RECIPE = Recipe(
    name="rnnprop",
    description="RNNprop (Lv et al. 2017) for networks, from a 784-20-10 sigmoid MLP on MNIST",
    tasks="cross entropy of a 784-20-10 sigmoid MLP on MNIST training images, and 20-d squares that stop growing",
    rule=RNNpropConfig(),
    training=MetaTrainConfig(
        updates=4_000,
        unroll_length=20,
        horizon=(100, 100),
        pool=8,
        weighting="last",
        estimator=TruncatedBPTT(second_order=False),
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        clip_norm=1.0,
        validate_every=400,
        validation_episodes=6,
        validation_copies=2,
        validation_horizon=200,
        backend="auto",
    ),
    family=family,
    checkpoint_every=20,
)
