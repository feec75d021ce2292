"""How rules are learned."""

from learnedopt.meta.config import (
    CURRICULA,
    ESTIMATORS,
    TEACHERS,
    Growing,
    MetaTrainConfig,
    SearchConfig,
    Stages,
)
from learnedopt.meta.estimators import Estimate, Estimator, FullBPTT, MetaObjective, TruncatedBPTT
from learnedopt.meta.evolution import ES, PES, FullES, VarianceMixture
from learnedopt.meta.imitation import AdamTeacher, Imitation, SGDTeacher, Teacher
from learnedopt.meta.memory import copies_that_fit
from learnedopt.meta.objectives import OBJECTIVES, WEIGHTINGS, meta_losses
from learnedopt.meta.ranks import Ranks, launched
from learnedopt.meta.recipe import Recipe, load_recipe, overridden
from learnedopt.meta.search import Search
from learnedopt.meta.trainer import MetaTrainer, MetaTrainingError
from learnedopt.meta.unroll import Episode, FlatTask, start_episode, unroll

__all__ = [
    "CURRICULA",
    "ES",
    "ESTIMATORS",
    "OBJECTIVES",
    "PES",
    "TEACHERS",
    "WEIGHTINGS",
    "AdamTeacher",
    "Episode",
    "Estimate",
    "Estimator",
    "FlatTask",
    "FullBPTT",
    "FullES",
    "Growing",
    "Imitation",
    "MetaObjective",
    "MetaTrainConfig",
    "MetaTrainer",
    "MetaTrainingError",
    "Ranks",
    "Recipe",
    "SGDTeacher",
    "Search",
    "SearchConfig",
    "Stages",
    "Teacher",
    "TruncatedBPTT",
    "VarianceMixture",
    "copies_that_fit",
    "launched",
    "load_recipe",
    "meta_losses",
    "overridden",
    "start_episode",
    "unroll",
]
