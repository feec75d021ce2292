"""Fast paths of :class:`~learnedopt.rules.NormalizedGradientRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import NormalizedGradientRule

register(
    NormalizedGradientRule,
    blocked="learnedopt.kernels.normalized.blocked:Program",
    native="learnedopt.kernels.normalized.native:Program",
    triton="learnedopt.kernels.normalized.triton:Program",
)
