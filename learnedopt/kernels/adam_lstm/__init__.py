"""Fast paths of :class:`~learnedopt.rules.AdamLSTMRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import AdamLSTMRule

register(
    AdamLSTMRule,
    blocked="learnedopt.kernels.adam_lstm.blocked:Program",
    native="learnedopt.kernels.adam_lstm.native:Program",
    triton="learnedopt.kernels.adam_lstm.triton:Program",
)
