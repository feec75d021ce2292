"""What the rows of :class:`~learnedopt.rules.AdamLSTMRule`'s statistics are."""

from enum import IntEnum


class Row(IntEnum):
    """Of the statistics: bias corrections, then the features that every coordinate of a tensor shares."""

    FAST_CORRECTION = 0
    SLOW_CORRECTION = 1
    SQUARE_CORRECTION = 2
    LOG_PARAM = 3
    ALIGNMENT = 4
    CONSISTENCY = 5
    TIME = 6
    FEATURES = LOG_PARAM  # where they begin


class Mean(IntEnum):
    """Of what the rule takes the means of."""

    PARAM_SQUARE = 0
    FAST_GRAD = 1
    SLOW_SQUARE = 2
