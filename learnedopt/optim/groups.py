"""Parameter groups that run rules: what an optimizer keeps of them, saves and loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from learnedopt.kernels import BackendName
from learnedopt.optim.averages import averaged
from learnedopt.optim.options import (
    LATER,
    Loss,
    check_not_flat,
    checked,
    warn_of_options_meant_for_adam,
    warn_of_uncounted_tensors,
)
from learnedopt.optim.placement import Backends
from learnedopt.optim.registry import RuleLike, RuleRegistry
from learnedopt.optim.state import check_same_shapes, load_state, up_to_date
from learnedopt.rules import UpdateRule


class RuleGroups(Optimizer):
    """An optimizer each of whose groups runs a rule; :class:`~learnedopt.LearnedOptimizer` says how it steps.

    Args:
        params, rule, backend: As of :class:`~learnedopt.LearnedOptimizer`.
        options: The options that groups have unless they set their own, checked.
    """

    _observed_loss: Loss | None
    _averaged: bool = False
    """Whether the parameters are the average at the moment."""
    default_rule: ClassVar[str | None] = "default"
    """The zoo entry that ``rule=None`` means; ``None`` where a rule must be given."""
    rule_class: ClassVar[type[UpdateRule]] = UpdateRule
    """The kind of rule this class runs."""

    def __init__(self, params: ParamsT, rule: RuleLike | None, options: dict[str, Any], backend: BackendName) -> None:
        self._backends = Backends(backend)
        self._rules = RuleRegistry()
        # The default is loaded when the first group asks for it: each may bring its own rule.
        identity = {"rule": None, "rule_sha256": None} if rule is None else self._rules.add(rule, self.rule_class)
        super().__init__(params, {**options, **identity})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Options that it does not set, ``rule`` included, are the optimizer's.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if isinstance(param_group, dict):
            # A copy, because the rule gives way to its identity and the caller may use the dictionary again.
            param_group = checked(param_group)
            if param_group.get("rule_sha256") not in self._rules:
                param_group.update(self._identity(param_group.get("rule")))
        super().add_param_group(param_group)
        try:
            check_not_flat(self.param_groups[-1], self._rules[self.param_groups[-1]["rule_sha256"]])
        except ValueError:
            self.param_groups.pop()
            raise
        warn_of_options_meant_for_adam(self.param_groups[-1], self.param_groups[:-1])
        if self._rules[self.param_groups[-1]["rule_sha256"]].counts_tensors:
            warn_of_uncounted_tensors(self)
        self._backends.place(self.param_groups[-1], self._rules)

    @property
    def backend(self) -> str:
        """What computes the step of these parameters where they are now; for each device if that differs.

        For parameters that are spread over processes it is the same in all of these from the first step on.

        >>> from learnedopt import LearnedOptimizer
        >>> from learnedopt.rules import LSTMRule
        >>> import torch
        >>> LearnedOptimizer([torch.ones(2)], rule=LSTMRule(), backend="blocked").backend
        'blocked'
        """
        return self._backends.names(self.param_groups, self._rules)

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """Within this context the parameters are the average that the rule keeps: to evaluate, and to save.

        Rules that average take gradients near their average, where there is some noise still; without it, losses are a
        little lower late in a run. Afterwards the parameters are bit for bit what they were. Of other rules, before the
        first step, and of groups with ``mask_zero_gradients``, the parameters are the average.

        Raises:
            RuntimeError: ``step`` was called within.

        >>> import torch
        >>> from learnedopt import LearnedOptimizer
        >>> weights = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = LearnedOptimizer([weights])
        >>> with optimizer.averaged_parameters():
        ...     weights.sum().item()
        3.0
        """
        self._averaged = True
        try:
            with averaged(self.param_groups, self.state, self._rules):
                yield
        finally:
            self._averaged = False

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` gave. State keeps its precision and shares no memory with ``state_dict``.

        Options become those of ``state_dict``, except for ``state_dtype``: state that was kept in another dtype is
        converted to this optimizer's. What wrappers keep there, in ``state`` or in the state of a parameter, is kept.

        Raises:
            ValueError: the state belongs to another rule than this optimizer runs, or to another optimizer; its groups
                or shapes do not match; or an option is missing or is none that a group may have.
        """
        saved: StateDict = {}
        state_dtypes = [group["state_dtype"] for group in self.param_groups]

        # The base class would cast state to the dtype of its parameter, so it is given the groups alone. The first
        # hook runs after the user's own and the second before them: they see, and may change, everything.
        def take_state(_: Optimizer, state_dict: StateDict) -> StateDict:
            state_dict = up_to_date(self.param_groups, state_dict, self._rules)
            check_same_shapes(self.param_groups, state_dict, self._rules)
            saved.update(state_dict)
            of_params = {index for group in state_dict["param_groups"] for index in group["params"]}
            of_others = {key: value for key, value in state_dict["state"].items() if key not in of_params}
            return {**state_dict, "state": of_others}

        def restore_state(_: Optimizer) -> None:
            for group, saved_group, kept in zip(self.param_groups, saved["param_groups"], state_dtypes):
                sha256 = group["rule_sha256"]
                dtypes = saved_group.get("state_dtype", "float32"), kept
                group["state_dtype"] = kept
                for param, index in zip(group["params"], saved_group["params"]):
                    if index in saved["state"]:
                        dtype = self._rules.dtype(sha256, param.dtype.to_real())
                        found = saved["state"][index]
                        self.state[param] = load_state(self._rules[sha256], param, found, dtype, *dtypes)

        handles = [
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(restore_state, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            **{key: getattr(self, key) for key in ("_rules", "_observed_loss", "_backends")},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What is loaded brings no backend, and that of an optimizer that is there already stays.
        self.__dict__.setdefault("_backends", state.get("_backends") or Backends("auto"))
        super().__setstate__({key: value for key, value in state.items() if key != "_backends"})
        for key, value in LATER.items():
            self.defaults.setdefault(key, value)
            for group in self.param_groups:
                group.setdefault(key, self.defaults[key])
        for group in self.param_groups:
            self._backends.place(group, self._rules)

    def _identity(self, rule: RuleLike | None) -> dict[str, Any]:
        """The entries of a group that asks for ``rule``."""
        if rule is not None:
            return self._rules.add(rule, self.rule_class)
        if self.defaults["rule"] is None:
            if self.default_rule is None:
                raise ValueError(
                    f"{type(self).__name__} has no default rule: pass rule=, a name in the zoo "
                    "(learnedopt.list_entries()), a folder, or a rule object"
                )
            self.defaults.update(self._rules.add(self.default_rule, self.rule_class))
        return {key: self.defaults[key] for key in ("rule", "rule_sha256")}
