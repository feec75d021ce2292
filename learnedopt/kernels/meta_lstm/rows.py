"""What the rows of :class:`~learnedopt.rules.MetaLSTMRule`'s statistics are."""

from enum import IntEnum


class Row(IntEnum):
    """Of the statistics: the two channels of the loss, features that every coordinate has."""

    LOG_LOSS = 0
    SIGN_LOSS = 1
    FEATURES = LOG_LOSS  # where they begin
