"""Fast paths of :class:`~learnedopt.rules.MetaLSTMRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import MetaLSTMRule

register(
    MetaLSTMRule,
    blocked="learnedopt.kernels.meta_lstm.blocked:Program",
    native="learnedopt.kernels.meta_lstm.native:Program",
    triton="learnedopt.kernels.meta_lstm.triton:Program",
)
