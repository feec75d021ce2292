"""The options of a parameter group, and what a step is given: checked, and refused in a sentence."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnedopt.kernels import StateDtype
from learnedopt.optim.registry import RuleRegistry
from learnedopt.optim.sharding import anywhere, has_values, local, sent, whole
from learnedopt.rules import UpdateRule

Loss = Tensor | float
NonFinite = Literal["propagate", "skip", "raise"]
Group = dict[str, Any]

LATER: dict[str, Any] = {
    "maximize": False,
    "nonfinite": "propagate",
    "state_dtype": "float32",
    "together": None,
    "mask_zero_gradients": False,
}
"""Options that optimizers pickled before these existed are given."""


def checked(options: Group) -> Group:
    """A copy of a group's options as they are kept; those that no group may have are refused, in torch's words."""
    lr, weight_decay = options.get("lr", 0.0), options.get("weight_decay", 0.0)
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    for flag in ("maximize", "mask_zero_gradients"):
        if not isinstance(options.get(flag, False), bool):
            raise ValueError(f"{flag} must be True or False, got {options[flag]!r}")
    nonfinite = options.get("nonfinite", "propagate")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
    together = options.get("together")
    if together is not None and (not isinstance(together, int) or isinstance(together, bool) or together < 1):
        raise ValueError(f"together must be None or a number of tensors, at least 1, got {together!r}")
    if "state_dtype" not in options:
        return dict(options)
    # By name, so that a state_dict holds plain values only; a group of another optimizer already has the name.
    state_dtype = str(options["state_dtype"]).removeprefix("torch.")
    if state_dtype not in get_args(StateDtype):
        raise ValueError(f"state_dtype must be one of {get_args(StateDtype)} of torch, got {options['state_dtype']!r}")
    return {**options, "state_dtype": state_dtype}


SMALL_LR = 0.01
"""A rate in Adam's range. As a multiplier of learned updates it trains next to nothing."""


def warn_of_options_meant_for_adam(group: Group, before: Sequence[Group]) -> None:
    """Warn of a rate that trains next to nothing, and where a step takes more than a thousandth off every weight.

    Args:
        before: The groups before it. Of their rates a warning was given already.
    """
    lr = float(group["lr"])
    if 0.0 < lr <= SMALL_LR and not any(0.0 < float(other["lr"]) <= SMALL_LR for other in before):
        warnings.warn(
            f"lr={lr:g} multiplies a learned update, whose step sizes are learned too: with so small a multiplier next "
            "to nothing is trained. If it was chosen for Adam, leave lr out: 1 is the rule as it was trained",
            stacklevel=_to_the_user(),
        )
    decay = float(group["lr"]) * group["weight_decay"]
    if decay > 1e-3:
        warnings.warn(
            f"weight_decay={group['weight_decay']:g} at lr={float(group['lr']):g} takes {100 * decay:.2g} % off every "
            "weight in every step. If it was chosen for AdamW, multiply it by the learning rate that AdamW had: lr "
            "multiplies a learned update, and is 1 by default",
            stacklevel=_to_the_user(),
        )


_SINGLE: WeakSet[Optimizer] = WeakSet()
"""Optimizers of one tensor each that have to count."""
_MANY = 3
"""So many of those are likely to belong to one network."""


def warn_of_uncounted_tensors(optimizer: Optimizer) -> None:
    """Warn where several optimizers have one tensor each and have to guess how many tensors are trained together."""
    _SINGLE.discard(optimizer)
    groups = optimizer.param_groups
    if len(groups) > 1 or len(groups[0]["params"]) > 1 or groups[0].get("together") is not None:
        return
    _SINGLE.add(optimizer)
    if len(_SINGLE) == _MANY:
        warnings.warn(
            f"there are {_MANY} learned optimizers of one tensor each. If these are of one network, as where each "
            "steps in a hook of backward, say how many tensors are trained together: step sizes depend on that "
            "number, and an optimizer counts only its own. LearnedOptimizer(..., together=number)",
            stacklevel=_to_the_user(),
        )


def _to_the_user() -> int:
    """The ``stacklevel`` by which a warning names the first line that is neither of torch nor of this package."""
    ours = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules["learnedopt"]))
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level


def param_names(group: Group) -> list[str]:
    """How to speak of a group's parameters: by their names, else by their places."""
    return group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]


def check_params(groups: Iterable[Group], state: Mapping[Tensor, Any], rules: RuleRegistry, optimizer: str) -> None:
    """Raise ``RuntimeError`` where a gradient, a parameter or its state cannot be worked on."""
    for group in groups:
        probe = rules.probe(group["rule_sha256"])
        for index, param in enumerate(group["params"]):
            if (grad := param.grad) is None:
                continue
            if grad.layout is not torch.strided:
                raise RuntimeError(f"{optimizer} does not support sparse gradients")
            if param.is_conj():
                raise RuntimeError(
                    f"{optimizer} cannot update a conjugate view, here of shape {tuple(param.shape)}: make it a "
                    "parameter of its own with resolve_conj()"
                )
            if not param.is_contiguous() and any(
                stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape)
            ):
                raise RuntimeError(
                    f"{optimizer} cannot update an expanded parameter, here of shape {tuple(param.shape)}: several of "
                    "its elements are one number in memory; make it a parameter of its own with clone()"
                )
            if its := state.get(param):
                _check_state(group, index, its, probe)


def _check_state(group: Group, index: int, state: Mapping[str, Tensor], probe: tuple[str, int] | None) -> None:
    """Kernels trust that state has the shape of its parameter. One entry tells: they are made and loaded together."""
    param = group["params"][index]
    if probe is None:
        return
    entry, lead = probe
    shape = (*param.shape, 2) if param.is_complex() else param.shape
    if entry not in state or state[entry].shape[lead:] != shape:
        found = tuple(state[entry].shape[lead:]) if entry in state else None
        name = param_names(group)[index]
        raise RuntimeError(
            f"a state does not have the shape of its parameter: {name} has shape {tuple(shape)}, and its state was "
            f"made for {found}. A parameter cannot change its shape under an optimizer: construct another one, and "
            "move the state as docs/drop_in.md says"
        )


def check_not_flat(group: Group, rule: UpdateRule) -> None:
    """Raise ``ValueError`` where FSDP1 has cut parameters and a rule has to see whole tensors."""
    if type(rule).statistics is UpdateRule.statistics and rule.coordinates is None:
        return  # each coordinate is by itself
    if any(getattr(param, "_fsdp_flattened", False) for param in group["params"]):
        raise ValueError(
            "these are the flat parameters of FullyShardedDataParallel (FSDP1), which hides how tensors are cut, and "
            f"the rule {group['rule']!r} looks at whole tensors: results would silently be others. Shard with FSDP2, "
            "torch.distributed.fsdp.fully_shard"
        )


def read_loss(loss: Loss | None, groups: Sequence[Group], rules: RuleRegistry) -> Tensor | None:
    """The loss as a 0-d tensor, where any rule needs it.

    Raises:
        RuntimeError: a rule needs it, and there is none.
        ValueError: it has more than one element.
    """
    needy = [group for group in groups if rules[group["rule_sha256"]].needs_loss]
    if not needy:
        return None
    if loss is None:
        if all(group["lr"] == 0 for group in needy):
            return None
        raise RuntimeError(
            f"the rule {needy[0]['rule']!r} reads the training loss at every step, and none was given: call "
            "step(closure) with a closure that returns the loss, or step(loss=loss), or observe(loss) before step()"
        )
    loss = whole(loss.detach()) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
    if loss.numel() != 1:
        raise ValueError(f"the training loss must have one element, got shape {tuple(loss.shape)}")
    return loss.reshape(())


def check_finite(loss: Tensor | None, groups: Sequence[Group], rules: RuleRegistry) -> Tensor | None:
    """Raise where a group asks for it; else say, without waiting, whether to skip the step where groups skip."""
    read: dict[str, list[tuple[str, Tensor]]] = {"skip": [], "raise": []}
    for group in groups:
        if group["nonfinite"] == "propagate":
            continue
        if loss is not None and rules[group["rule_sha256"]].needs_loss:
            read[group["nonfinite"]].append(("the loss", loss))
        read[group["nonfinite"]] += [
            (f"the gradient of {name}", param.grad)
            for name, param in zip(param_names(group), group["params"])
            if param.grad is not None
        ]
    if read["raise"]:
        names, values = zip(*read["raise"])
        flags = _nonfinite(values)
        if has_values(flags) and (found := [name for name, flag in zip(names, flags.tolist()) if flag]):
            raise RuntimeError(f"not finite: {', '.join(found)}. No parameter and no state has changed")
    return _nonfinite([value for _, value in read["skip"]]).any() if read["skip"] else None


def _nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each tensor holds a value that is infinite or NaN: ``(len(tensors),)``, on one device."""
    flags = [local(tensor).isfinite().all().logical_not() for tensor in tensors]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return anywhere(torch.stack([sent(flag, device) for flag in flags]), tensors)
