"""Learners on mini-ImageNet, in the split of Ravi and Larochelle: the methods of their table, and MAML.

Networks of 32 channels, as the meta-LSTM's; the prototypical network has the 64 it was published with.
"""

from typing import Any

from learnedopt.fewshot import BackboneConfig, Conv4, EpisodeShape, FewShotRecipe, FewShotTrainConfig, LearnerConfig
from learnedopt.fewshot.learners import (
    FinetuneConfig,
    MAMLConfig,
    MatchingConfig,
    MetaLSTMLearnerConfig,
    ProtoNetConfig,
)

NARROW, WIDE = Conv4(width=32), Conv4()


def recipe(
    name: str,
    what: str,
    learner: LearnerConfig,
    train: tuple[int, int],
    steps: int,
    batch: int = 1,
    backbone: BackboneConfig = NARROW,
    **settings: Any,
) -> FewShotRecipe:
    """``train`` is ways and shots; tested with 5 ways and as many shots, 15 queries of each class everywhere."""
    ways, shots = train
    return FewShotRecipe(
        f"mini-imagenet-{name}",
        f"{what} for mini-ImageNet, trained on {ways}-way {shots}-shot episodes",
        "mini-imagenet-ravi",
        learner,
        backbone,
        EpisodeShape(ways, shots),
        EpisodeShape(5, shots),
        FewShotTrainConfig(steps, batch, **settings),
    )


MAML = MAMLConfig(learning_rate=0.01, steps=5, test_steps=10)
MATCHING = MatchingConfig(learned_scale=True)
HALVED: dict[str, Any] = {"halve_every": 2000, "backbone": WIDE}

RECIPES = [
    recipe("finetune", "Pretrained network", FinetuneConfig(), (5, 1), 30000, validate_every=5000),
    recipe("matching-1shot", "Matching network", MATCHING, (5, 1), 75000, learning_rate=1e-4),
    recipe("matching-5shot", "Matching network", MATCHING, (5, 5), 75000, learning_rate=1e-4),
    recipe("meta-lstm-1shot", "Meta-LSTM", MetaLSTMLearnerConfig(steps=12), (5, 1), 75000, clip_norm=0.25),
    recipe("meta-lstm-5shot", "Meta-LSTM", MetaLSTMLearnerConfig(steps=5), (5, 5), 50000, clip_norm=0.25),
    recipe("protonet-1shot", "Prototypical network", ProtoNetConfig(), (30, 1), 20000, **HALVED),
    recipe("protonet-5shot", "Prototypical network", ProtoNetConfig(), (20, 5), 20000, **HALVED),
    recipe("maml-1shot", "MAML", MAML, (5, 1), 60000, 4, clip_value=10.0),
    recipe("maml-5shot", "MAML", MAML, (5, 5), 60000, 2, clip_value=10.0),
]
