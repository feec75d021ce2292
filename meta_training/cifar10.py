"""Two LSTM optimizers for a convolutional network on CIFAR-10: Andrychowicz et al. 2016 (arXiv:1606.04474), 3.3.

To make it: ``learnedopt meta-train cifar10 --root DATA --out runs/cifar10 --export zoo``

As in the paper: three convolutions with max pooling and a hidden layer of 32 units, ReLU and batch norm, batches of
128; one LSTM for the kernels of the convolutions and another for everything else; windows of 20, p = 10, output scale
0.1, gradients as constants. Unlike the paper:

* In three of four episodes the rule imitates SGD with Nesterov momentum 0.9 and a learning rate falling as
  0.1 / (1 + t / 150), and the meta-loss is the mean of the losses' logarithms, both for the reasons given in
  ``mnist_mlp.py``. Without the fall, a rate of 0.1 was faster than 0.03, the other one tried, for fifty steps, and
  slightly slower after two hundred.
* There are only 600 updates, for an hour of one CPU thread at most; it is the number to raise. Episodes are of 100 to
  200 steps.

DATA holds CIFAR-10 as ``learnedopt.data.cifar10`` reads it.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.data import cifar10
from learnedopt.meta import Imitation, MetaTrainConfig, Recipe, SGDTeacher, TruncatedBPTT
from learnedopt.rules import SeparateLSTMConfig
from learnedopt.tasks import ConvPool, TaskFamily


def family(root: Path | None) -> TaskFamily:
    if root is None:
        raise ValueError("this recipe trains on CIFAR-10: say where it is with --root DIR")
    return ConvPool(cifar10(root))


RECIPE = Recipe(
    name="cifar10",
    description="Andrychowicz LSTMs, one for convolutions and one for the rest, for a small convolutional net",
    tasks="cross entropy of a 16-16-16 convolutional net with batch norm on CIFAR-10 training images, batches of 128",
    rule=SeparateLSTMConfig(preprocessing="log_sign", preprocessing_p=10.0, output_scale=0.1),
    training=MetaTrainConfig(
        updates=600,
        unroll_length=20,
        horizon=(100, 200),
        pool=4,
        copies=1,
        objective="log_ratio",
        estimator=TruncatedBPTT(second_order=False),
        imitation=Imitation(SGDTeacher(lr=0.1, momentum=0.9, nesterov=True, decay_steps=150.0), share=0.75),
        learning_rate=5e-3,
        final_learning_rate=1e-4,
        clip_norm=0.3,
        ema_decay=0.95,
        validate_every=100,
        validation_episodes=1,
        validation_copies=2,
        validation_horizon=200,
        backend="auto",
    ),
    family=family,
    checkpoint_every=20,
)
