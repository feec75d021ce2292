"""Learners on Omniglot, in the split of Vinyals and Snell, one line per setting.

Most step counts are what one core does in an hour or less, with a learning rate that is larger than the published
one and falls to zero along a cosine. Published are 60000 steps of 32 episodes for MAML, 75000 episodes for the
meta-LSTM; ``--steps`` makes any of these longer. MAML++, Reptile and matching networks have the published counts, or
near them: days on two cores, to be stopped at any time. ``benchmarks/results/fewshot_omniglot.md`` says how far each
has come.
"""

from collections.abc import Callable
from dataclasses import replace
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
from learnedopt.rules import MetaLSTMConfig

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
    start: str = "",
    **settings: Any,
) -> FewShotRecipe:
    """``train`` is ways, shots and queries of each class; ``test`` ways and shots."""
    return FewShotRecipe(
        f"omniglot-{name}",
        f"{what} for Omniglot, trained on {train[0]}-way {train[1]}-shot episodes" + ", pretrained" * bool(start),
        "omniglot-vinyals",
        learner,
        backbone,
        EpisodeShape(*train),
        EpisodeShape(*test, queries=5),
        FewShotTrainConfig(steps, batch, **settings),
        start,
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
    """One large step on five ways, five small ones on twenty.

    As published, but for a rate of 0.1 in place of 0.4 on five ways, with which few steps of training go further.
    """
    return lambda ways, shots: (
        MAMLConfig(first_order=first_order, learning_rate=0.1)
        if ways == 5
        else MAMLConfig(first_order=first_order, learning_rate=0.1, steps=5, test_steps=5)
    )


def anil(ways: int, shots: int) -> LearnerConfig:
    """One step as in training where more lead away again (chosen on validation episodes), else three as published."""
    return ANILConfig() if (ways, shots) == (5, 1) else ANILConfig(test_steps=1)


def gentle(ways: int) -> float:
    """A rate of five inner steps that suits the features of a prototypical network (chosen on validation episodes)."""
    return 0.06 if ways == 5 else 0.04


def gentle_maml(ways: int, shots: int) -> LearnerConfig:
    return MAMLConfig(learning_rate=gentle(ways), steps=5, test_steps=5)


def gentle_meta_sgd(ways: int, shots: int) -> LearnerConfig:
    return MetaSGDConfig(initial_rates=(gentle(ways), gentle(ways)), steps=5)


def gentle_maml_pp(ways: int, shots: int) -> LearnerConfig:
    return MAMLPlusPlusConfig(learning_rate=ways * gentle(ways))  # its inner loss is a mean, the others' a sum


FALLING: dict[str, Any] = {"learning_rate": 2e-3, "schedule": "cosine", "validate_every": 800}
# Pretraining is judged at its end only: which rate adapts best is chosen then, and changes while features grow.
PRETRAINING: dict[str, Any] = FALLING | {"validate_every": 8000, "validation_episodes": 30}
# Begins with a network that tells all base classes apart, and needs far fewer episodes.
PRETRAINED: dict[str, Any] = FALLING | {"learning_rate": 1e-3, "validate_every": 500, "start": "omniglot-finetune"}
# An input gate that starts near 0.4; the published start near 0.01 is for runs of 75000 episodes.
OPEN = MetaLSTMConfig(input_bias=(-1.0, 0.0))
# With features that the read-out's training has made, all parameters are adapted well before any further training, if
# the gate starts right (chosen on validation episodes), and large steps ruin that.
AJAR = {(5, 1): (-3.0, -2.0), (5, 5): (-3.5, -3.5), (20, 1): (-3.0, -2.0), (20, 5): (-2.0, -1.0)}
WHOLE: dict[str, Any] = PRETRAINED | {"learning_rate": 3e-5, "validate_every": 50}


def whole(ways: int, shots: int) -> LearnerConfig:
    """The meta-LSTM of all parameters, with a gate that starts where the setting wants it."""
    return MetaLSTMLearnerConfig(steps=12 if shots == 1 else 5, rule=MetaLSTMConfig(input_bias=AJAR[ways, shots]))


SHORT: dict[str, Any] = FALLING | {"learning_rate": 5e-3, "validate_every": 500}
# Begins with features for comparing, with which it is good before any further training; large steps ruin that.
COMPARING: dict[str, Any] = FALLING | {
    "learning_rate": 5e-5,
    "validate_every": 25,
    "start": "omniglot-protonet-strided",
}
REPTILE: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "schedule": "linear",
    "validate_every": 5000,
    "validation_episodes": 50,
}

# Trained on ten shots, for one shot and for five, and judged in validation on one; queries play no part in it.
REPTILE_5 = ReptileConfig()
REPTILE_20 = ReptileConfig(learning_rate=5e-4, steps=10, batch_size=20, test_batch_size=10)

RECIPES = [
    recipe("protonet-1shot", "Prototypical network", ProtoNetConfig(), POOLED, (60, 1, 5), (20, 1), 6000, **FALLING),
    recipe("protonet-5shot", "Prototypical network", ProtoNetConfig(), POOLED, (60, 5, 5), (20, 5), 9000, **FALLING),
    # The network of MAML, which can begin with it.
    recipe(
        "protonet-strided",
        "Prototypical network with strides",
        ProtoNetConfig(),
        STRIDED,
        (60, 1, 5),
        (20, 1),
        20000,
        **FALLING,
    ),
    # Trained on labelled images; episodes are for validation alone. The longer one is for the baselines at their best.
    *(
        replace(
            recipe(name, "", FinetuneConfig(), STRIDED, (5, 1, 5), (5, 1), steps, **PRETRAINING),
            description="Network for Omniglot, trained to tell all training classes apart",
        )
        for name, steps in (("finetune", 8000), ("finetune-long", 40000))
    ),
    *(recipe(f"matching-{k}shot", "Matching network", MATCHING, STRIDED, (20, k, 5), (20, k), 40000) for k in (1, 5)),
    *family("maml", "MAML", maml(first_order=False), STRIDED, 5, 2500, 8, **SHORT),
    *family("maml-pretrained", "MAML", gentle_maml, STRIDED, 5, 100, 8, **COMPARING),
    *family("fomaml", "First-order MAML", maml(first_order=True), STRIDED, 5, 2500, 8, **SHORT),
    *family("meta-sgd", "Meta-SGD", lambda ways, shots: MetaSGDConfig(), STRIDED, 5, 2500, 8, **SHORT),
    *family("meta-sgd-pretrained", "Meta-SGD", gentle_meta_sgd, STRIDED, 5, 100, 8, **COMPARING),
    *family("anil", "ANIL", anil, STRIDED, 5, 2500, 8, **SHORT),
    *family("maml-pp", "MAML++", lambda ways, shots: MAMLPlusPlusConfig(), STRIDED, 5, 75000, 8, schedule="cosine"),
    *family("maml-pp-pretrained", "MAML++", gentle_maml_pp, STRIDED, 5, 100, 8, **COMPARING),
    *family(
        "meta-lstm",
        "Meta-LSTM",
        lambda ways, shots: MetaLSTMLearnerConfig(steps=12 if shots == 1 else 5, rule=OPEN),
        NARROW,
        15,
        4000,
        clip_norm=1.0,
        **SHORT,
    ),
    # For any number of ways. Twelve steps on one shot as published, eight on five as the authors' code has it.
    *(
        recipe(
            f"meta-lstm-head-{shots}shot",
            "Meta-LSTM of the read-out",
            MetaLSTMLearnerConfig(adapted="head", readout="shared", steps=steps, rule=OPEN),
            STRIDED,
            (20, shots, 5),
            (20, shots),
            updates,
            4,
            clip_norm=1.0,
            **PRETRAINED,
        )
        for shots, steps, updates in ((1, 12, 10000), (5, 8, 5000))
    ),
    # All parameters, after the read-out alone has been trained.
    *(
        replace(r, start=f"omniglot-meta-lstm-head-{r.test.shots}shot")
        for r in family("meta-lstm-pretrained", "Meta-LSTM", whole, STRIDED, 5, 100, 2, clip_norm=1.0, **WHOLE)
    ),
    *(
        recipe(f"reptile-{ways}way", "Reptile", found, STRIDED, (ways, 10, 1), (ways, 1), steps, 5, **REPTILE)
        for ways, found, steps in ((5, REPTILE_5, 100000), (20, REPTILE_20, 200000))
    ),
]
