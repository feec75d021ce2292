"""Learners on mini-ImageNet, in the split of Ravi and Larochelle: the methods of their table, and MAML.

Networks of 32 channels, as the meta-LSTM's; the prototypical network also with the 64 it was published with. That of
32, pretraining and what begins with it are what one core does in ten minutes to half an hour, with a learning rate that
falls to zero along a cosine. The others have the published counts, days on two cores, to be stopped at any time;
``--steps`` makes any of them shorter. ``benchmarks/results/fewshot_mini_imagenet.md`` says how far each has come.
"""

from dataclasses import replace
from typing import Any

from learnedopt.fewshot import BackboneConfig, Conv4, EpisodeShape, FewShotRecipe, FewShotTrainConfig, LearnerConfig
from learnedopt.fewshot.learners import (
    FinetuneConfig,
    MAMLConfig,
    MatchingConfig,
    MetaLSTMLearnerConfig,
    ProtoNetConfig,
)
from learnedopt.rules import MetaLSTMConfig

NARROW, WIDE = Conv4(width=32), Conv4()


def recipe(
    name: str,
    what: str,
    learner: LearnerConfig,
    train: tuple[int, int],
    steps: int,
    batch: int = 1,
    backbone: BackboneConfig = NARROW,
    queries: int = 15,
    start: str = "",
    **settings: Any,
) -> FewShotRecipe:
    """``train`` is ways and shots; tested with 5 ways and as many shots, 15 queries of each class."""
    ways, shots = train
    return FewShotRecipe(
        f"mini-imagenet-{name}",
        f"{what} for mini-ImageNet, trained on {ways}-way {shots}-shot episodes" + ", pretrained" * bool(start),
        "mini-imagenet-ravi",
        learner,
        backbone,
        EpisodeShape(ways, shots, queries),
        EpisodeShape(5, shots),
        FewShotTrainConfig(steps, batch, **settings),
        start,
    )


MAML = MAMLConfig(learning_rate=0.01, steps=5, test_steps=10)
MATCHING = MatchingConfig(scale=10.0, learned_scale=True)
HALVED: dict[str, Any] = {"halve_every": 2000, "backbone": WIDE}
# As on Omniglot: judged at its end only; an input gate that starts near 0.4, and near 0.08 for all parameters.
PRETRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "validate_every": 5000,
    "validation_episodes": 30,
}
FALLING: dict[str, Any] = {"learning_rate": 2e-3, "schedule": "cosine"}
PRETRAINED: dict[str, Any] = {"schedule": "cosine", "clip_norm": 1.0, "start": "mini-imagenet-finetune"}
# Trained on twenty ways, from which features learn more than from five.
READOUT: dict[str, Any] = PRETRAINED | {"queries": 5, "validate_every": 250}
# Where all parameters are adapted the start is good already (MAML from the pretrained network has 42 % before any
# training, the meta-LSTM with features that the read-out's training has made 43 %), and large steps ruin it.
WHOLE: dict[str, Any] = PRETRAINED | {"learning_rate": 3e-5, "validate_every": 50, "queries": 5}
COMPARED: dict[str, Any] = {
    "learning_rate": 5e-4,
    "schedule": "cosine",
    "validate_every": 250,
    "start": "mini-imagenet-finetune",
}
OPEN = MetaLSTMConfig(input_bias=(-1.0, 0.0))
AJAR = {1: MetaLSTMConfig(input_bias=(-3.0, -2.0)), 5: MetaLSTMConfig(input_bias=(-4.0, -4.0))}


def readout(steps: int) -> LearnerConfig:
    """The meta-LSTM of the read-out, for any number of ways."""
    return MetaLSTMLearnerConfig(adapted="head", readout="shared", steps=steps, rule=OPEN)


def whole(shots: int) -> LearnerConfig:
    """The meta-LSTM of all parameters, for any number of ways."""
    return MetaLSTMLearnerConfig(readout="shared", steps=12 if shots == 1 else 5, rule=AJAR[shots])


RECIPES = [
    # Trained on labelled images; episodes are for validation alone.
    replace(
        recipe("finetune", "", FinetuneConfig(), (5, 1), 5000, **PRETRAINING),
        description="Network for mini-ImageNet, trained to tell all training classes apart",
    ),
    *(
        recipe(f"meta-lstm-head-{k}shot", "Meta-LSTM of the read-out", readout(steps), (20, k), updates, 2, **READOUT)
        for k, steps, updates in ((1, 12, 1500), (5, 8, 800))
    ),
    *(recipe(f"matching-{k}shot", "Matching network", MATCHING, (20, k), 2000, queries=5, **COMPARED) for k in (1, 5)),
    *(
        recipe(
            f"meta-lstm-pretrained-{k}shot",
            "Meta-LSTM",
            whole(k),
            (5, k),
            100,
            4,
            **(WHOLE | {"start": f"mini-imagenet-meta-lstm-head-{k}shot"}),
        )
        for k in (1, 5)
    ),
    *(recipe(f"maml-pretrained-{k}shot", "MAML", MAML, (5, k), 100, 4, **WHOLE) for k in (1, 5)),
    recipe(
        "protonet-narrow", "Prototypical network of 32 channels", ProtoNetConfig(), (20, 1), 5000, queries=5, **FALLING
    ),
    recipe("meta-lstm-1shot", "Meta-LSTM", MetaLSTMLearnerConfig(steps=12), (5, 1), 75000, clip_norm=0.25),
    recipe("meta-lstm-5shot", "Meta-LSTM", MetaLSTMLearnerConfig(steps=5), (5, 5), 50000, clip_norm=0.25),
    recipe("protonet-1shot", "Prototypical network", ProtoNetConfig(), (30, 1), 20000, **HALVED),
    recipe("protonet-5shot", "Prototypical network", ProtoNetConfig(), (20, 5), 20000, **HALVED),
    recipe("maml-1shot", "MAML", MAML, (5, 1), 60000, 4, clip_value=10.0),
    recipe("maml-5shot", "MAML", MAML, (5, 5), 60000, 2, clip_value=10.0),
]
