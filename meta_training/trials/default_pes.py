"""The default, its whole read-out fine-tuned by persistent evolution strategies on long episodes: tried, not shipped.

``learnedopt meta-train meta_training/trials/default_pes.py --export my-zoo`` ends with the default itself: its start is
validated first, and the one validation there is finds it a little better (-6.804 against -6.778). The weights that
``docs/benchmark.md`` has a row of are the last ones, of a run of these settings at commit 930a830, before starts were
validated.
"""

from __future__ import annotations

from pathlib import Path

from learnedopt import zoo
from learnedopt.meta import PES, MetaTrainConfig, Recipe, load_recipe
from learnedopt.tasks import Mixture, TaskFamily

_START = load_recipe(Path(__file__).parents[1] / "sf_eigen_1.py")


def family(root: Path | None) -> TaskFamily:
    whole = _START.family(root)
    assert isinstance(whole, Mixture)
    return Mixture(whole.families[:11])


RECIPE = Recipe(
    name="default-pes",
    description="The default, all of its read-out fine-tuned by PES on long episodes",
    tasks=f"{_START.tasks}; without the four largest families",
    rule=zoo.entry_info("sf-eigen-1").config,
    training=MetaTrainConfig(
        updates=1200,
        unroll_length=50,
        horizon=(200, 2000),
        pool=30,
        copies=4,
        objective="log_ratio",
        estimator=PES(std=0.02),
        learning_rate=1e-3,
        final_learning_rate=3e-5,
        clip_norm=1.0,
        validate_every=1200,
        validation_copies=1,
        validation_horizon=500,
    ),
    family=family,
    start="sf-eigen-1",
)
