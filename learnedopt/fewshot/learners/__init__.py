"""The few-shot methods, and their registry."""

from learnedopt.fewshot.learner import LearnerConfig
from learnedopt.fewshot.learners.finetune import Finetune, FinetuneConfig, NearestNeighbour, NearestNeighbourConfig
from learnedopt.fewshot.learners.maml import MAML, ANILConfig, MAMLConfig, MetaSGD, MetaSGDConfig
from learnedopt.fewshot.learners.maml_pp import MAMLPlusPlus, MAMLPlusPlusConfig
from learnedopt.fewshot.learners.matching import MatchingConfig, MatchingNetwork
from learnedopt.fewshot.learners.meta_lstm import MetaLSTMLearner, MetaLSTMLearnerConfig
from learnedopt.fewshot.learners.protonet import ProtoNet, ProtoNetConfig
from learnedopt.fewshot.learners.reptile import Reptile, ReptileConfig

LEARNERS: dict[str, type[LearnerConfig]] = {
    config.kind: config
    for config in (
        MetaLSTMLearnerConfig,
        FinetuneConfig,
        NearestNeighbourConfig,
        MatchingConfig,
        ProtoNetConfig,
        MAMLConfig,
        ANILConfig,
        MetaSGDConfig,
        MAMLPlusPlusConfig,
        ReptileConfig,
    )
}
"""The configuration of every method by name; each is constructed without arguments."""

__all__ = [
    "LEARNERS",
    "MAML",
    "ANILConfig",
    "Finetune",
    "FinetuneConfig",
    "MAMLConfig",
    "MAMLPlusPlus",
    "MAMLPlusPlusConfig",
    "MatchingConfig",
    "MatchingNetwork",
    "MetaLSTMLearner",
    "MetaLSTMLearnerConfig",
    "MetaSGD",
    "MetaSGDConfig",
    "NearestNeighbour",
    "NearestNeighbourConfig",
    "ProtoNet",
    "ProtoNetConfig",
    "Reptile",
    "ReptileConfig",
]
