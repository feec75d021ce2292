"""Few-shot learning: episodes, learners, evaluation, training."""

from learnedopt.fewshot.backbones import BACKBONES, MLP, BackboneConfig, Conv4
from learnedopt.fewshot.datasets import DATASETS, Split, check_frozen, load_classes, load_split
from learnedopt.fewshot.entries import (
    LearnerEntry,
    check_known,
    learner_info,
    list_learners,
    load_learner,
    save_learner,
)
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import Evaluation, evaluate
from learnedopt.fewshot.learner import Adapted, Learner, LearnerConfig, LearnerShape
from learnedopt.fewshot.learners import LEARNERS
from learnedopt.fewshot.sampling import EpisodeIndices
from learnedopt.fewshot.sources import ClassSet, EpisodeList, EpisodeSource, FewShotTask, Sinusoid, TrainingSource
from learnedopt.fewshot.training import (
    EpisodeShape,
    FewShotRecipe,
    FewShotTrainConfig,
    FewShotTrainer,
    TrainingError,
    episode_source,
    load_fewshot_recipe,
    load_recipes,
)

__all__ = [
    "BACKBONES",
    "DATASETS",
    "LEARNERS",
    "MLP",
    "Adapted",
    "BackboneConfig",
    "ClassSet",
    "Conv4",
    "EpisodeIndices",
    "EpisodeList",
    "EpisodeShape",
    "EpisodeSource",
    "Episodes",
    "Evaluation",
    "FewShotRecipe",
    "FewShotTask",
    "FewShotTrainConfig",
    "FewShotTrainer",
    "Learner",
    "LearnerConfig",
    "LearnerEntry",
    "LearnerShape",
    "Sinusoid",
    "Split",
    "TrainingError",
    "TrainingSource",
    "check_frozen",
    "check_known",
    "episode_source",
    "evaluate",
    "learner_info",
    "list_learners",
    "load_classes",
    "load_fewshot_recipe",
    "load_learner",
    "load_recipes",
    "load_split",
    "save_learner",
]
