"""Fast paths of :class:`~learnedopt.rules.ScheduleFreeRule`."""

from learnedopt.kernels.core.registry import register
from learnedopt.rules import ScheduleFreeRule

register(
    ScheduleFreeRule,
    blocked="learnedopt.kernels.schedule_free.blocked:Program",
    native="learnedopt.kernels.schedule_free.native:Program",
    triton="learnedopt.kernels.schedule_free.triton:Program",
)
