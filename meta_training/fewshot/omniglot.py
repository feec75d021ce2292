"""Learners on Omniglot, in the split of Vinyals and Snell, one line per setting.

Step counts are the published ones, or near them: days on two cores. A run goes on from where it was stopped, and the
best weights so far can be judged at any time; ``benchmarks/results/fewshot_omniglot.md`` says how far each has come.
The exception is the prototypical network, whose learning rate falls along a cosine over few steps.
"""

from collections.abc import Callable
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


MATCHING = MatchingConfig(learned_scale=True)


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


Make = Callable[[int, int], LearnerConfig]
"""A learner's configuration from ways and shots."""


def family(
    name: str,
    what: str,
    make: Make,
    backbone: BackboneConfig,
    queries: int,
    steps: int,
    batch: int = 1,
    **settings: Any,
) -> list[FewShotRecipe]:
    """One recipe for each of the four settings, of methods that are made for one number of ways.

    ``queries`` of each class, but at least as many as shots, and 5 with 20 ways.
    """
    return [
        recipe(
            f"{name}-{ways}way-{shots}shot",
            what,
            make(ways, shots),
            backbone,
            (ways, shots, 5 if ways == 20 else max(queries, shots)),
            (ways, shots),
            steps,
            batch,
            **settings,
        )
        for ways, shots in ((5, 1), (5, 5), (20, 1), (20, 5))
    ]


def maml(first_order: bool) -> Make:
    """As published: one large step on five ways, five small ones on twenty."""
    return lambda ways, shots: (
        MAMLConfig(first_order=first_order)
        if ways == 5
        else MAMLConfig(first_order=first_order, learning_rate=0.1, steps=5, test_steps=5)
    )


FALLING: dict[str, Any] = {"learning_rate": 2e-3, "schedule": "cosine", "validate_every": 800}
PRETRAINING: dict[str, Any] = {"validate_every": 2000, "validation_episodes": 30}
REPTILE: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "schedule": "linear",
    "validate_every": 5000,
    "validation_episodes": 50,
}

# Trained on ten shots whatever the test has; queries play no part in it.
REPTILE_5 = ReptileConfig()
REPTILE_20 = ReptileConfig(learning_rate=5e-4, steps=10, batch_size=20, test_batch_size=10)

RECIPES = [
    recipe("protonet-1shot", "Prototypical network", ProtoNetConfig(), POOLED, (30, 1, 3), (20, 1), 3200, **FALLING),
    recipe("protonet-5shot", "Prototypical network", ProtoNetConfig(), POOLED, (20, 5, 5), (20, 5), 3200, **FALLING),
    recipe("finetune", "Pretrained network", FinetuneConfig(), STRIDED, (5, 1, 5), (5, 1), 30000, **PRETRAINING),
    *(recipe(f"matching-{k}shot", "Matching network", MATCHING, STRIDED, (20, k, 5), (20, k), 40000) for k in (1, 5)),
    *family("maml", "MAML", maml(first_order=False), STRIDED, 1, 60000, 16),
    *family("fomaml", "First-order MAML", maml(first_order=True), STRIDED, 1, 60000, 16),
    *family("meta-sgd", "Meta-SGD", lambda ways, shots: MetaSGDConfig(), STRIDED, 1, 60000, 16),
    *family("anil", "ANIL", lambda ways, shots: ANILConfig(), STRIDED, 1, 60000, 16),
    *family("maml-pp", "MAML++", lambda ways, shots: MAMLPlusPlusConfig(), STRIDED, 5, 75000, 8, schedule="cosine"),
    *family(
        "meta-lstm",
        "Meta-LSTM",
        lambda ways, shots: MetaLSTMLearnerConfig(steps=12 if shots == 1 else 5),
        NARROW,
        15,
        75000,
        clip_norm=0.25,
    ),
    *(
        recipe(
            f"reptile-{ways}way-{shots}shot",
            "Reptile",
            found,
            STRIDED,
            (ways, 10, 1),
            (ways, shots),
            steps,
            5,
            **REPTILE,
        )
        for ways, found, steps in ((5, REPTILE_5, 100000), (20, REPTILE_20, 200000))
        for shots in (1, 5)
    ),
]
