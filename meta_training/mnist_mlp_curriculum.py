"""The LSTM optimizer trained by curriculum and imitation: Chen et al. 2020 (arXiv:2010.09089), sections 3.1 and 3.2.

To make it: ``learnedopt meta-train mnist-mlp-curriculum --root DATA --out runs/mnist-mlp-curriculum --export zoo``

As in the paper and its code: the LSTM and the 784-20-10 sigmoid network of Andrychowicz et al. 2016, all parameters
starting with standard deviation 0.01, p = 5 and an output scale of 0.01 (the code of Andrychowicz et al., on which
theirs rests, has these in place of the paper's 10 and 0.1); gradients as constants; windows of 20 steps; episodes that
grow longer once the rule no longer gains on the next length; some episodes imitate Adam with a learning rate of 0.01.
Unlike there:

* Lengths end at 1,500 steps instead of 3,000; validation is every 250 updates, not every 100 episodes; and the first
  one without a gain ends a stage, where there it takes three. An hour of one CPU thread does not reach further.
* The meta-loss is the mean of the losses' logarithms. Over a thousand steps the sum is the first hundred's.
* Three of ten episodes imitate throughout. There the share grows from stage to stage, from 0 to 0.3.

DATA holds MNIST where torchvision keeps it, in MNIST/raw.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.data import mnist
from learnedopt.meta import AdamTeacher, Imitation, MetaTrainConfig, Recipe, Stages, TruncatedBPTT
from learnedopt.rules import LSTMConfig
from learnedopt.tasks import MLPClassification, TaskFamily


def family(root: Path | None) -> TaskFamily:
    if root is None:
        raise ValueError("this recipe trains on MNIST: say where it is with --root DIR")
    return MLPClassification(mnist(root))


RECIPE = Recipe(
    name="mnist-mlp-curriculum",
    description="Andrychowicz LSTM for a 784-20-10 sigmoid MLP on MNIST, by curriculum and imitation",
    tasks="cross entropy of a 784-20-10 sigmoid MLP on MNIST training images, batches of 128",
    rule=LSTMConfig(preprocessing="log_sign", preprocessing_p=5.0, output_scale=0.01),
    training=MetaTrainConfig(
        updates=4_000,
        unroll_length=20,
        curriculum=Stages((100, 200, 500, 1000, 1500), patience=1),
        pool=10,
        objective="log_ratio",
        estimator=TruncatedBPTT(second_order=False),
        imitation=Imitation(AdamTeacher(lr=0.01), share=0.3),
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        clip_norm=1.0,
        validate_every=250,
        validation_copies=6,
        backend="auto",
    ),
    family=family,
    checkpoint_every=20,
)
