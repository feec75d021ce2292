"""What the rows of :class:`~learnedopt.rules.RNNpropRule`'s statistics are."""

from enum import IntEnum


class Row(IntEnum):
    """Of the statistics: bias corrections."""

    MOMENTUM_CORRECTION = 0
    SQUARE_CORRECTION = 1
