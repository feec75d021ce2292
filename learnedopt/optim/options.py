"""The options of a parameter group, and what a step is given: checked, and refused in a sentence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from learnedopt.kernels import StateDtype
from learnedopt.optim.registry import RuleRegistry
from learnedopt.optim.sharding import anywhere, local, sent, whole

Loss = Tensor | float
NonFinite = Literal["propagate", "skip", "raise"]
Group = dict[str, Any]

LATER: dict[str, Any] = {"maximize": False, "nonfinite": "propagate", "state_dtype": "float32"}
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
    nonfinite = options.get("nonfinite", "propagate")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
    if "state_dtype" not in options:
        return dict(options)
    # By name, so that a state_dict holds plain values only; a group of another optimizer already has the name.
    state_dtype = str(options["state_dtype"]).removeprefix("torch.")
    if state_dtype not in get_args(StateDtype):
        raise ValueError(f"state_dtype must be one of {get_args(StateDtype)} of torch, got {options['state_dtype']!r}")
    return {**options, "state_dtype": state_dtype}


def warn_of_decay_meant_for_another_lr(group: Group) -> None:
    """Warn where a step takes more than a thousandth off every weight."""
    decay = float(group["lr"]) * group["weight_decay"]
    if decay > 1e-3:
        warnings.warn(
            f"weight_decay={group['weight_decay']:g} at lr={float(group['lr']):g} takes {100 * decay:.2g} % off every "
            "weight in every step. If it was chosen for AdamW, multiply it by the learning rate that AdamW had: lr "
            "multiplies a learned update, and is 1 by default",
            stacklevel=4,
        )


def param_names(group: Group) -> list[str]:
    """How to speak of a group's parameters: by their names, else by their places."""
    return group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]


def check_layouts(params: Iterable[Tensor], optimizer: str) -> None:
    """Raise ``RuntimeError`` where a gradient or a parameter cannot be worked on."""
    for param in params:
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            raise RuntimeError(f"{optimizer} does not support sparse gradients")
        if param.is_complex() and param.is_conj():  # in this order, because compilers do not know the second
            raise RuntimeError(
                f"{optimizer} cannot update a conjugate view, here of shape {tuple(param.shape)}: make it a parameter "
                "of its own with resolve_conj()"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape)):
            raise RuntimeError(
                f"{optimizer} cannot update an expanded parameter, here of shape {tuple(param.shape)}: several of its "
                "elements are one number in memory; make it a parameter of its own with clone()"
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
        if found := [name for name, flag in zip(names, _nonfinite(values).tolist()) if flag]:
            raise RuntimeError(f"not finite: {', '.join(found)}. No parameter and no state has changed")
    return _nonfinite([value for _, value in read["skip"]]).any() if read["skip"] else None


def _nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each tensor holds a value that is infinite or NaN: ``(len(tensors),)``, on one device."""
    flags = [local(tensor).isfinite().all().logical_not() for tensor in tensors]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return anywhere(torch.stack([sent(flag, device) for flag in flags]), tensors)
