"""Fast paths of :class:`~learnedopt.rules.LawsRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import LawsRule

register(
    LawsRule,
    blocked="learnedopt.kernels.laws.blocked:Program",
    native="learnedopt.kernels.laws.native:Program",
    triton="learnedopt.kernels.laws.triton:Program",
)
