"""The LSTM optimizer for a small MLP on MNIST: Andrychowicz et al. 2016 (arXiv:1606.04474), section 3.2.

To make it: ``learnedopt meta-train mnist-mlp --root DATA --out runs/mnist-mlp --export zoo``

As in the paper: 784-20-10 sigmoid network, batches of 128, windows of 20, preprocessing with p = 10, output scale 0.1.
Unlike the paper:

* Episodes are 100 to 200 steps long, not 100, since the paper looks at 200 too.
* The meta-loss is the mean of the losses' logarithms. With the mean of the losses, the first steps drown the last.
* Meta-gradients are of second order, which learn in fewer updates than those of first order and cost little more.
* Weights start normal with variance 1 / fan-in, biases at zero; the paper does not say how. Its authors' code starts
  all parameters with standard deviation 0.01, on a plateau where gradients grow with the weights: there gradients as
  constants mislead, and second order was not stable.

DATA holds MNIST where torchvision keeps it, in MNIST/raw.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.data import mnist
from learnedopt.meta import MetaTrainConfig, Recipe, TruncatedBPTT
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import MLPClassification, TaskFamily


def family(root: Path | None) -> TaskFamily:
    if root is None:
        raise ValueError("this recipe trains on MNIST: say where it is with --root DIR")
    return MLPClassification(mnist(root), initial_std=None)


RECIPE = Recipe(
    name="mnist-mlp",
    description="Andrychowicz LSTM for a 784-20-10 sigmoid MLP on MNIST",
    tasks="cross entropy of a 784-20-10 sigmoid MLP on MNIST training images, batches of 128",
    rule=LSTMConfig(preprocessing="log_sign", preprocessing_p=10.0, output_scale=0.1),
    training=MetaTrainConfig(
        updates=1_500,
        unroll_length=20,
        horizon=(100, 200),
        pool=7,
        copies=1,
        objective="log_ratio",
        estimator=TruncatedBPTT(second_order=True),
        learning_rate=2e-3,
        final_learning_rate=5e-5,
        clip_norm=0.3,
        validate_every=100,
        validation_copies=6,
        validation_horizon=200,
    ),
    family=family,
    checkpoint_every=20,
)
