"""An optimizer's state: made at a parameter's first step, loaded, and kept in another precision."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from learnedopt.kernels import StateDtype, StoredSpec, keep_state, read_state, state_layout
from learnedopt.optim.options import Group, checked, param_names
from learnedopt.optim.registry import RuleRegistry
from learnedopt.optim.sharding import copy_beside, local, whole, zeros_beside
from learnedopt.rules import State, UpdateRule
from learnedopt.rules.coordinates import AGE
from learnedopt.rules.legacy import modern_state

Shapes = dict[str, tuple[int, ...]]


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_coordinates(rule: UpdateRule, param: Tensor) -> bool:
    """Whether a tensor has coordinates of its own: then every process has all of its state."""
    return rule.coordinates is not None and rule.coordinates.serve(param.shape)


def init_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype, state_dtype: StateDtype) -> State:
    """The state of a parameter before its first step; of a fake one it is fake."""
    with getattr(local(param), "fake_mode", nullcontext()):
        return _init_state(rule, param, dtype, state_dtype)


def _init_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype, state_dtype: StateDtype) -> State:
    layout, spec = state_layout(rule, dtype, state_dtype), rule.state_spec()
    state: State = {} if rule.coordinates is None else rule.coordinates.initial(param.shape, dtype, param.device)
    gathered = bool(state)
    for name, kept in layout.items():
        if name in spec and spec[name].starts_at == "param":
            start = whole(param) if gathered else param
            state[name] = copy_beside(start, start.detach(), kept.dtype)
        elif kept.scope == "coordinate" and not gathered:
            state[name] = zeros_beside(param, kept.shape, kept.dtype)
        else:
            shape = _shape(kept, param)
            state[name] = torch.zeros(shape, dtype=kept.dtype, device=param.device)
    return state


@torch.no_grad()
def load_state(
    rule: UpdateRule, param: Tensor, saved: State, dtype: torch.dtype, saved_as: StateDtype, state_dtype: StateDtype
) -> State:
    """A copy of saved state as it should be for a parameter: precision, device, and spread over processes."""
    param = as_real(param)
    layout, own, gathered = state_layout(rule, dtype, saved_as), _own(rule, param), has_coordinates(rule, param)
    placed: State = {}
    for name, values in saved.items():
        if name == AGE:
            placed[name] = whole(values).to("cpu", torch.int64, copy=True)
        elif name in layout and layout[name].scope == "coordinate" and not gathered:
            placed[name] = copy_beside(param, values, layout[name].dtype)
        elif name not in layout and name not in own:  # what a wrapper keeps there
            placed[name] = copy.deepcopy(values)
        else:
            kept = layout[name].dtype if name in layout else dtype
            placed[name] = whole(values).to(param.device, kept, copy=True, memory_format=torch.contiguous_format)
    if saved_as == state_dtype or not placed:
        return placed
    flat = {name: local(placed[name]).reshape(*spec.shape, -1) for name, spec in layout.items()}
    state = init_state(rule, param, dtype, state_dtype)
    converted = keep_state(read_state(flat, rule.state_spec(), dtype), state_layout(rule, dtype, state_dtype))
    for name, value in converted.items():
        local(state[name]).copy_(value.view(local(state[name]).shape))
    return {**state, **{name: values for name, values in placed.items() if name not in layout}}


def up_to_date(groups: list[Group], saved: StateDict, rules: RuleRegistry) -> StateDict:
    """What was saved as it would be saved today.

    Raises:
        ValueError: state was made with another rule than a group runs.
    """
    state, saved_groups = dict(saved["state"]), []
    for index, (group, saved_group) in enumerate(zip(groups, saved["param_groups"])):
        saved_group = _checked(saved_group, index)
        if rules.came_before(group["rule_sha256"], saved_group.get("rule_sha256")):
            for param, key in zip(group["params"], saved_group["params"]):
                if key in state:
                    state[key] = modern_state(state[key], whole(as_real(param)))
            saved_group = {**saved_group, **{name: group[name] for name in ("rule", "rule_sha256")}}
        elif saved_group.get("rule_sha256") != group["rule_sha256"]:
            entry = rules.entry_of(saved_group.get("rule_sha256"))
            which = "the rule that the state belongs to" if entry is None else f"rule={entry!r}, to which it belongs"
            raise ValueError(
                f"parameter group {index}: this state was made with rule {saved_group.get('rule')!r} (sha256 "
                f"{saved_group.get('rule_sha256')}), and the optimizer runs {group['rule']!r} (sha256 "
                f"{group['rule_sha256']}): construct the optimizer with {which}"
            )
        saved_groups.append(saved_group)
    return {**saved, "state": state, "param_groups": saved_groups + saved["param_groups"][len(groups) :]}


def _checked(saved: Group, index: int) -> Group:
    """A saved group; refused in a sentence where it is not one of a learned optimizer, or is damaged."""
    if "rule_sha256" not in saved:
        raise ValueError(
            f"parameter group {index}: this is not the state of a learned optimizer (it names no rule, and has the "
            f"options {sorted(saved.keys() - {'params'})}): load what the state_dict() of one gave"
        )
    if missing := [name for name in ("lr", "weight_decay", "params") if name not in saved]:
        raise ValueError(f"parameter group {index}: the state to load lacks {missing}")
    try:
        checked(saved)
    except ValueError as error:
        raise ValueError(f"parameter group {index} of the state to load: {error}") from error
    return saved


def check_same_shapes(groups: list[Group], saved: StateDict, rules: RuleRegistry) -> None:
    """Raise ``ValueError`` where state to load is not of a parameter's shape."""
    for group, saved_group in zip(groups, saved["param_groups"]):
        rule = rules[group["rule_sha256"]]
        for name, param, key in zip(param_names(group), group["params"], saved_group["params"]):
            found = {
                entry: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                for entry, value in saved["state"].get(key, {}).items()
            }
            dtype = rules.dtype(group["rule_sha256"], param.dtype.to_real())
            layout = state_layout(rule, dtype, saved_group.get("state_dtype", "float32"))
            expected = _state_shapes(rule, layout, as_real(param))
            if found and any(found.get(entry) != shape for entry, shape in expected.items()):
                raise ValueError(
                    f"{name} has shape {tuple(param.shape)} and its state the shapes {expected}, but the state to "
                    f"load has {found}: its parameters must be those of this optimizer, in the same order"
                )


def _own(rule: UpdateRule, param: Tensor) -> Shapes:
    """The shapes of the entries that a tensor has of its own for its coordinates."""
    if rule.coordinates is None:
        return {}
    own = rule.coordinates.initial(param.shape, None, torch.device("meta"))
    return {name: tuple(values.shape) for name, values in own.items()}


def _shape(kept: StoredSpec, param: Tensor) -> tuple[int, ...]:
    return kept.shape + (tuple(param.shape) if kept.scope == "coordinate" else ())


def _state_shapes(rule: UpdateRule, layout: dict[str, StoredSpec], param: Tensor) -> Shapes:
    return {name: _shape(kept, param) for name, kept in layout.items()} | _own(rule, param)
