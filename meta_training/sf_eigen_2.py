"""The default optimizer: gradients normalized in eigenbases, step sizes and averaging by learned laws.

To make it: ``learnedopt meta-train sf-eigen-2 --out runs/sf-eigen-2 --export zoo``
"""

from __future__ import annotations

from pathlib import Path

from learnedopt.meta import Recipe, SearchConfig, load_recipe
from learnedopt.rules import ChainConfig, InEigenbasesConfig, LawsConfig, NormalizedGradientConfig

# The families of tasks are those of its predecessor.
_FORMER = load_recipe(Path(__file__).with_name("sf_eigen_1.py"))

RECIPE = Recipe(
    name="sf-eigen-2",
    description="Gradients normalized in eigenbases, learned step sizes and averaging; for any network, no tuning",
    tasks=_FORMER.tasks,
    rule=ChainConfig(
        first=InEigenbasesConfig(
            NormalizedGradientConfig(square_decay=0.99, relative_eps=0.01), blocks=True, threshold=0.0
        ),
        then=LawsConfig(),
    ),
    training=SearchConfig(
        updates=1,
        # The start is what the search for its predecessor found: the maths is nearly the same.
        coordinates=(
            ("then.step_size[0]", 2.121, 0.09),  # log step size
            ("then.step_size[1]", -0.1847, 0.019),  # ... exponent of time
            ("then.step_size[2]", 0.619, 0.12),  # ... with the way: smaller where back is downhill
            ("then.step_size[3]", -0.583, 0.05),  # ... exponent of the number of tensors
            ("then.step_size[4]", 1.063, 0.1),  # ... exponent of smallness
            ("then.step_size[5]", -1.189, 0.15),  # ... at the beginning
            ("then.averaging[0]", 0.072, 0.05),  # log averaging weight
        ),
        population=8,
        horizon=600,
        copies=1,
    ),
    family=_FORMER.family,
    checkpoint_every=1,
)
