"""Fast paths of :class:`~learnedopt.rules.LSTMRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import LSTMRule

register(
    LSTMRule,
    blocked="learnedopt.kernels.lstm.blocked:Program",
    native="learnedopt.kernels.lstm.native:Program",
    triton="learnedopt.kernels.lstm.triton:Program",
)
