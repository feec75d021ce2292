"""Learners on sine waves (Finn et al. 2017, section 5.1): ten shots in training, tested with 5, 10 and 20."""

from typing import Any

from learnedopt.fewshot import MLP, EpisodeShape, FewShotRecipe, FewShotTrainConfig, LearnerConfig
from learnedopt.fewshot.learners import FinetuneConfig, MAMLConfig, MetaLSTMLearnerConfig, MetaSGDConfig


def recipe(name: str, what: str, learner: LearnerConfig, steps: int, batch: int = 25, **settings: Any) -> FewShotRecipe:
    """25 tasks at a time, as published."""
    settings = {"validate_every": 2000, "validation_episodes": 200, "checkpoint_every": 1000} | settings
    shape = EpisodeShape(shots=10, queries=10)
    return FewShotRecipe(
        f"sinusoid-{name}",
        f"{what} for sine waves",
        "sinusoid",
        learner,
        MLP(),
        shape,
        shape,
        FewShotTrainConfig(steps, batch, **settings),
    )


MAML_CONFIG = MAMLConfig(learning_rate=0.01, test_steps=1)

# The LSTM makes a task forty times as expensive: fewer of them, and a learning rate that falls.
SHORT: dict[str, Any] = {"learning_rate": 3e-3, "schedule": "cosine", "clip_norm": 1.0, "validate_every": 1000}

RECIPES = [
    recipe("maml", "MAML", MAML_CONFIG, 70000),
    recipe("meta-sgd", "Meta-SGD", MetaSGDConfig(test_steps=1), 70000),
    recipe("meta-lstm", "Meta-LSTM", MetaLSTMLearnerConfig(steps=5), 4000, batch=5, **SHORT),
    recipe(
        "pretrained",
        "Network trained on all waves at once",
        FinetuneConfig(steps=1, learning_rate=0.01, learning_rates=(0.01,), decays=(0.0,), batch_size=250),
        70000,
    ),
]
