"""The rules an optimizer runs, kept out of its parameter groups and state."""

from __future__ import annotations

import copy
import os
from functools import reduce
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from learnedopt.optim.sharding import has_values
from learnedopt.rules import UpdateRule
from learnedopt.zoo import entry_info, former_fingerprint, list_entries, load_rule, rule_fingerprint

RuleLike = str | os.PathLike[str] | UpdateRule


class RuleRegistry:
    """Frozen copies of rules by fingerprint, and their copies per device and dtype.

    Parameter groups hold only plain values, so that ``state_dict`` needs no pickled code: they know a rule by the
    *identity* that :meth:`add` returns, its name and the sha256 under which it is found here.
    """

    def __init__(self) -> None:
        self._rules: dict[str, UpdateRule] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._probes: dict[str, tuple[str, int] | None] = {}
        self._placed: dict[tuple[str, torch.device, torch.dtype], UpdateRule] = {}

    def __contains__(self, sha256: str | None) -> bool:
        return sha256 in self._rules

    def __getitem__(self, sha256: str) -> UpdateRule:
        return self._rules[sha256]

    def add(self, rule: RuleLike, rule_class: type[UpdateRule]) -> dict[str, Any]:
        """Keep a copy of a rule, in float32 or wider, and return its identity.

        Raises:
            TypeError: ``rule`` is not a name, a path or a rule.
            ValueError: it cannot be loaded, or is not a ``rule_class``.
        """
        with _disable_current_modes():  # under FakeTensorMode weights would have no values
            return self._add(rule, rule_class)

    def _add(self, rule: RuleLike, rule_class: type[UpdateRule]) -> dict[str, Any]:
        if isinstance(rule, UpdateRule):
            if not all(has_values(weight) for weight in rule.state_dict().values()):
                raise ValueError(
                    f"the weights of the rule {rule.config.kind!r} have no values: it was made under FakeTensorMode or "
                    "on the device meta. Make it outside"
                )
            name, rule = rule.config.kind, copy.deepcopy(rule)
        elif isinstance(rule, str | os.PathLike):
            name, rule = entry_info(rule).path.resolve().name, load_rule(rule)
        else:
            raise TypeError(
                f"rule must be a name in the zoo, a folder, or an UpdateRule object, got {type(rule).__name__}"
            )
        if not isinstance(rule, rule_class):
            raise ValueError(
                f"this optimizer runs rules of kind {rule_class.config_class.kind!r}, and {name!r} is of kind "
                f"{rule.config.kind!r}; LearnedOptimizer runs rules of every kind"
            )
        dtype = reduce(torch.promote_types, (weight.dtype for weight in rule.parameters()), torch.float32)
        rule = rule.to("cpu", dtype).eval().requires_grad_(False)
        sha256 = rule_fingerprint(rule)
        self._rules[sha256], self._dtypes[sha256] = rule, dtype
        return {"rule": name, "rule_sha256": sha256}

    def came_before(self, sha256: str, other: str | None) -> bool:
        """Whether a rule here had another identity in version 0.1, and this is it."""
        with _disable_current_modes():
            return other is not None and other == former_fingerprint(self._rules[sha256])

    @staticmethod
    def entry_of(sha256: str | None) -> str | None:
        """The zoo's entry of this identity, or that had it in version 0.1."""
        with _disable_current_modes():
            for name in list_entries():
                rule = load_rule(name)
                if sha256 is not None and sha256 in (rule_fingerprint(rule), former_fingerprint(rule)):
                    return name
        return None

    def dtype(self, sha256: str, param_dtype: torch.dtype) -> torch.dtype:
        """What a rule computes in, and keeps state in, for parameters of a real dtype: the wider of the two."""
        return torch.promote_types(self._dtypes[sha256], param_dtype)

    def probe(self, sha256: str) -> tuple[str, int] | None:
        """An entry that every state by a rule has for each coordinate, and how many dimensions it has before those."""
        if sha256 not in self._probes:
            spec = self._rules[sha256].state_spec().items()
            found = ((name, len(its.shape)) for name, its in spec if its.scope == "coordinate")
            self._probes[sha256] = next(found, None)
        return self._probes[sha256]

    def placed(self, sha256: str, device: torch.device, dtype: torch.dtype) -> UpdateRule:
        """A rule on a device and in a dtype, made once."""
        key = (sha256, device, dtype)
        if key not in self._placed:
            with _disable_current_modes():
                self._placed[key] = copy.deepcopy(self._rules[sha256]).to(device, dtype)
        return self._placed[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": {}}
