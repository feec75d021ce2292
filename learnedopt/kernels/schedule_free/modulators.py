"""Which modulators the fast paths of :class:`~learnedopt.rules.ScheduleFreeRule` know."""

from __future__ import annotations

from learnedopt.rules import ScheduleFreeRule, UpdateRule
from learnedopt.rules.modulators import ControlledReadout, LinearReadout


def unknown_modulator(rule: UpdateRule) -> str | None:
    """Why a rule's modulator cannot be served, as the end of a sentence; ``None`` where it can."""
    assert isinstance(rule, ScheduleFreeRule)
    # By exact type: a subclass may compute something else. A controller is no matter of coordinates.
    if type(rule.modulator) in (LinearReadout, ControlledReadout):
        return None
    return f"it knows the modulators of this package, and this is {type(rule.modulator).__name__}"
