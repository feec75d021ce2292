"""Fast paths of :class:`~learnedopt.rules.RNNpropRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import RNNpropRule

register(
    RNNpropRule,
    blocked="learnedopt.kernels.rnnprop.blocked:Program",
    native="learnedopt.kernels.rnnprop.native:Program",
    triton="learnedopt.kernels.rnnprop.triton:Program",
)
