"""An LSTM that modulates Adam's directions, trained on many kinds of small network: once the default.

To make it: ``learnedopt meta-train adam-lstm --out runs/adam-lstm --export zoo``
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.meta import Growing, MetaTrainConfig, Recipe
from learnedopt.rules import AdamLSTMConfig
from learnedopt.tasks import (
    Autoencoder,
    CharAttention,
    CharRNN,
    Conv,
    Logistic,
    MatrixFactorization,
    Mixture,
    MLPClassification,
    Regression,
    Reparametrized,
    ScaledLoss,
    TaskFamily,
)


def family(root: Path | None) -> TaskFamily:
    mlp = MLPClassification(
        hidden_sizes=((8,), (16,), (32,), (16, 16), (32, 32), (32, 16, 16)),
        activations=("sigmoid", "tanh", "relu", "gelu", "elu"),
        batch_sizes=(8, 32, 64),
        initial_std=None,
        gains=(0.5, 2.0),
    )
    others = (Regression(), Autoencoder(), Logistic(), CharRNN(), CharAttention(), MatrixFactorization(), Conv())
    return ScaledLoss(Reparametrized(Mixture((mlp, *others), (2.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.0, 1.0))))


RECIPE = Recipe(
    name="adam-lstm",
    description="LSTM that modulates Adam's directions; the first default",
    tasks=(
        "digits MLPs, regression, digits autoencoders, badly scaled logistic regression, character RNNs, character "
        "attention nets, matrix factorisation, small convolutional nets; random loss scale and per-tensor scale"
    ),
    rule=AdamLSTMConfig(hidden_size=8, max_time=2000.0),
    training=MetaTrainConfig(
        updates=14_000,
        unroll_length=20,
        horizon=(60, 2000),
        curriculum=Growing(8_000),
        pool=16,
        copies=4,
        objective="log_ratio",
        learning_rate=2e-3,
        final_learning_rate=5e-5,
        clip_norm=0.3,
        # Kept as it is at the end. Validations at step 500 prefer update 2,000, whose rule is slightly better there and
        # much worse at step 2,000.
        validate_every=14_000,
        validation_episodes=16,
        validation_copies=2,
        validation_horizon=500,
    ),
    family=family,
)
