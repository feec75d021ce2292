"""How rules are learned."""

from learnedopt.meta.objectives import OBJECTIVES
from learnedopt.meta.recipe import MetaTrainingRun, Recipe, load_recipe
from learnedopt.meta.trainer import MetaTrainConfig, MetaTrainer, MetaTrainingError
from learnedopt.meta.unroll import Episode, FlatTask, start_episode, unroll

__all__ = [
    "OBJECTIVES",
    "Episode",
    "FlatTask",
    "MetaTrainConfig",
    "MetaTrainer",
    "MetaTrainingError",
    "MetaTrainingRun",
    "Recipe",
    "load_recipe",
    "start_episode",
    "unroll",
]
