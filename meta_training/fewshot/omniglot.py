"""Learners on Omniglot, in the split of Vinyals and Snell, one line per setting.

Step counts are the published ones, or near them: days on two cores. A run goes on from where it was stopped, and the
best weights so far can be judged at any time; ``benchmarks/results/fewshot_omniglot.md`` says how far each has come.
The exception is the prototypical network, whose learning rate falls along a cosine over few steps.
"""

from typing import Any

from learnedopt.fewshot import (
    BackboneConfig,
    Conv4,
    EpisodeShape,
    FewShotRecipe,
    FewShotTrainConfig,
    LearnerConfig,
)
from learnedopt.fewshot.learners import (
    ANILConfig,
    FinetuneConfig,
    MAMLConfig,
    MAMLPlusPlusConfig,
    MatchingConfig,
    MetaLSTMLearnerConfig,
    MetaSGDConfig,
    ProtoNetConfig,
    ReptileConfig,
)

POOLED, STRIDED, NARROW = Conv4(), Conv4(downsample="stride"), Conv4(width=32, downsample="stride")
"""The network of matching and prototypical networks; MAML's; MAML's with the width that the meta-LSTM had."""


def recipe(
    name: str,
    what: str,
    learner: LearnerConfig,
    backbone: BackboneConfig,
    train: tuple[int, int, int],
    test: tuple[int, int],
    steps: int,
    batch: int = 1,
    **settings: Any,
) -> FewShotRecipe:
    """``train`` is ways, shots and queries of each class; ``test`` ways and shots."""
    return FewShotRecipe(
        f"omniglot-{name}",
        f"{what} for Omniglot, trained on {train[0]}-way {train[1]}-shot episodes",
        "omniglot-vinyals",
        learner,
        backbone,
        EpisodeShape(*train),
        EpisodeShape(*test, queries=5),
        FewShotTrainConfig(steps, batch, **settings),
    )


MAML_20WAY = MAMLConfig(learning_rate=0.1, steps=5, test_steps=5)
FALLING: dict[str, Any] = {"learning_rate": 2e-3, "schedule": "cosine", "validate_every": 800}

RECIPES = [
    recipe("protonet-1shot", "Prototypical network", ProtoNetConfig(), POOLED, (30, 1, 3), (20, 1), 3200, **FALLING),
    recipe("protonet-5shot", "Prototypical network", ProtoNetConfig(), POOLED, (20, 5, 5), (20, 5), 3200, **FALLING),
    recipe(
        "finetune",
        "Network for fine-tuning and nearest neighbours",
        FinetuneConfig(),
        STRIDED,
        (5, 1, 5),
        (5, 1),
        30000,
        validate_every=2000,
        validation_episodes=30,
    ),
    recipe("maml-5way-1shot", "MAML", MAMLConfig(), STRIDED, (5, 1, 1), (5, 1), 60000, 16),
    recipe("maml-5way-5shot", "MAML", MAMLConfig(), STRIDED, (5, 5, 5), (5, 5), 60000, 16),
    recipe("maml-20way-1shot", "MAML", MAML_20WAY, STRIDED, (20, 1, 1), (20, 1), 60000, 16),
    recipe("maml-20way-5shot", "MAML", MAML_20WAY, STRIDED, (20, 5, 5), (20, 5), 60000, 16),
    recipe(
        "fomaml-5way-1shot", "First-order MAML", MAMLConfig(first_order=True), STRIDED, (5, 1, 1), (5, 1), 60000, 16
    ),
    recipe("meta-sgd-5way-1shot", "Meta-SGD", MetaSGDConfig(), STRIDED, (5, 1, 1), (5, 1), 60000, 16),
    recipe("anil-5way-1shot", "ANIL", ANILConfig(), STRIDED, (5, 1, 1), (5, 1), 60000, 16),
    recipe(
        "meta-lstm-5way-1shot",
        "Meta-LSTM",
        MetaLSTMLearnerConfig(steps=12),
        NARROW,
        (5, 1, 15),
        (5, 1),
        50000,
        clip_norm=0.25,
    ),
    recipe(
        "meta-lstm-5way-5shot",
        "Meta-LSTM",
        MetaLSTMLearnerConfig(steps=5),
        NARROW,
        (5, 5, 15),
        (5, 5),
        50000,
        clip_norm=0.25,
    ),
    *(
        recipe(
            f"matching-{shots}shot",
            "Matching network",
            MatchingConfig(learned_scale=True),
            STRIDED,
            (20, shots, 5),
            (20, shots),
            40000,
        )
        for shots in (1, 5)
    ),
    *(
        recipe(
            f"maml-pp-{ways}way-{shots}shot",
            "MAML++",
            MAMLPlusPlusConfig(),
            STRIDED,
            (ways, shots, 5),
            (ways, shots),
            75000,
            8,
            schedule="cosine",
        )
        for ways, shots in ((5, 1), (5, 5), (20, 1), (20, 5))
    ),
    *(
        recipe(
            f"reptile-5way-{shots}shot",
            "Reptile",
            ReptileConfig(),
            STRIDED,
            (5, 5, 5),
            (5, shots),
            100000,
            5,
            optimizer="sgd",
            learning_rate=1.0,
            schedule="linear",
            validate_every=5000,
        )
        for shots in (1, 5)
    ),
]
