"""Settings that can be written down and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from learnedopt.rules import RuleConfig


@dataclass(frozen=True)
class Config:
    """Frozen settings of one kind; ``kind`` is its name in a registry. Settings may hold a rule's configuration.

    >>> from learnedopt.fewshot.backbones import MLP
    >>> MLP(hidden=(8,)).to_dict()
    {'kind': 'mlp', 'hidden': (8,), 'batch_norm': False}
    >>> MLP.from_dict({"kind": "mlp", "hidden": [8]}) == MLP(hidden=(8,))
    True
    """

    kind: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, ``kind`` included."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        nested = {name: value.to_dict() for name, value in values.items() if isinstance(value, RuleConfig)}
        return {"kind": self.kind, **values, **nested}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s output, with lists back to tuples.

        Raises:
            ValueError: ``kind`` is another's, or a key is unknown.
        """
        values = dict(values)
        kind = values.pop("kind", cls.kind)
        if kind != cls.kind:
            raise ValueError(f"these are settings of kind {kind!r}, not {cls.kind!r}")
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown setting(s) {unknown} for kind {cls.kind!r}; known: {sorted(known)}")
        for name, value in values.items():
            if isinstance(default := known[name], RuleConfig):
                values[name] = type(default).from_dict(value)
            elif isinstance(value, list):
                values[name] = tuple(value)
        return cls(**values)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_count(config: Config, *names: str) -> None:
    """Raise ``ValueError`` unless these settings are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_positive(config: Config, *names: str) -> None:
    """Raise ``ValueError`` unless these settings are above zero and finite."""
    for name in names:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, got {value}")
