"""Learners on sine waves (Finn et al. 2017, section 5.1): ten shots in training, tested with 5, 10 and 20."""

from learnedopt.fewshot import MLP, EpisodeShape, FewShotRecipe, FewShotTrainConfig, LearnerConfig
from learnedopt.fewshot.learners import FinetuneConfig, MAMLConfig, MetaLSTMLearnerConfig, MetaSGDConfig


def recipe(name: str, what: str, learner: LearnerConfig, steps: int) -> FewShotRecipe:
    """25 tasks at a time, as published."""
    training = FewShotTrainConfig(steps, 25, validate_every=2000, validation_episodes=200, checkpoint_every=1000)
    shape = EpisodeShape(shots=10, queries=10)
    return FewShotRecipe(
        f"sinusoid-{name}", f"{what} for sine waves", "sinusoid", learner, MLP(), shape, shape, training
    )


MAML_CONFIG = MAMLConfig(learning_rate=0.01, test_steps=1)

RECIPES = [
    recipe("maml", "MAML", MAML_CONFIG, 70000),
    recipe("meta-sgd", "Meta-SGD", MetaSGDConfig(test_steps=1), 70000),
    recipe("meta-lstm", "Meta-LSTM", MetaLSTMLearnerConfig(steps=5), 20000),
    recipe(
        "pretrained",
        "Network trained on all waves at once",
        FinetuneConfig(steps=1, learning_rates=(0.01,), decays=(0.0,), batch_size=250),
        70000,
    ),
]
