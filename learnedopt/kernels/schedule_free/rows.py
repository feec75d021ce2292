"""What the rows of :class:`~learnedopt.rules.ScheduleFreeLSTMRule`'s statistics are."""

from enum import IntEnum


class Row(IntEnum):
    """Of the statistics: bias corrections, the averaging weight, one over the RMS of the offset, and then the features
    that every coordinate of a tensor shares."""

    MOMENTUM_CORRECTION = 0
    SQUARE_CORRECTION = 1
    AVERAGING = 2
    PER_OFFSET = 3
    LOG_PARAM = 4
    ALIGNMENT = 5
    CONSISTENCY = 6
    OFFSET_COSINE = 7
    LOG_OFFSET = 8
    TIME = 9
    WAY = 10
    TOGETHER = 11
    SMALLNESS = 12
    BEGINNING = 13
    FEATURES = LOG_PARAM  # where they begin


class Mean(IntEnum):
    """Of what the rule takes the means of: ``a`` and ``g`` are the momentum and the gradient over the running RMS."""

    PARAM_SQUARE = 0
    A_G = 1
    A_SQUARE = 2
    OFFSET_SQUARE = 3
    OFFSET_A = 4
    SLOPE_WAY = 5
    SLOPE_SQUARE = 6
    WAY_SQUARE = 7
