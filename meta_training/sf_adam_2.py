"""``light``: normalized gradients, step sizes and averaging by learned laws; the default without bases.

To make it: ``learnedopt meta-train sf-adam-2 --out runs/sf-adam-2 --export zoo``
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.meta import Recipe, SearchConfig, load_recipe
from learnedopt.rules import ChainConfig, LawsConfig, NormalizedGradientConfig

# The families of tasks are those of its predecessor.
_FORMER = load_recipe(Path(__file__).with_name("sf_adam_1.py"))

RECIPE = Recipe(
    name="sf-adam-2",
    description="Normalized gradients, learned step sizes and averaging: the default without bases, cheaper per step",
    tasks=_FORMER.tasks,
    rule=ChainConfig(first=NormalizedGradientConfig(square_decay=0.999), then=LawsConfig()),
    training=SearchConfig(
        updates=1,
        # The start is what the search for its predecessor found: the maths is nearly the same.
        coordinates=(
            ("then.step_size[0]", 2.081, 0.06),  # log step size
            ("then.step_size[1]", -0.1715, 0.019),  # ... exponent of time
            ("then.step_size[2]", 0.609, 0.12),  # ... with the way: smaller where back is downhill
            ("then.step_size[3]", -0.589, 0.05),  # ... exponent of the number of tensors
            ("then.step_size[4]", 0.998, 0.1),  # ... exponent of smallness
            ("then.step_size[5]", -1.180, 0.15),  # ... at the beginning
            ("then.averaging[0]", 0.0495, 0.05),  # log averaging weight
        ),
        population=8,
        horizon=600,
        copies=1,
    ),
    family=_FORMER.family,
    checkpoint_every=1,
)
