"""What was written before rules were composed (version 0.1): its configurations, weights and states as they are now.

Then ``schedule_free_lstm`` was the frame and its modulator in one, and ``eigenbasis`` the same in bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from learnedopt.rules.base import State

_OF_LSTM = ("hidden_size", "num_layers")
_OF_BASES = ("factor_decay", "settling", "interval", "shift", "max_side")
_HIDDEN = 8
"""The setting of rules without an LSTM, which meant nothing."""


def modern_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's configuration as it is written now, from one of any time.

    >>> modern_config({"kind": "schedule_free_lstm", "hidden_size": 4, "num_layers": 0, "warmup": 5.0})
    {'kind': 'schedule_free', 'warmup': 5.0, 'modulator': {'kind': 'power_laws'}}
    """
    kind, values = values.get("kind"), dict(values)
    if kind == "eigenbasis":
        own = {name: values.pop(name) for name in _OF_BASES if name in values}
        inner = {"square_decay": 0.99, **values, "kind": "schedule_free_lstm"}
        return {"kind": "in_eigenbases", "inner": modern_config(inner), **own}
    if kind == "schedule_free_lstm":
        hidden_size, num_layers = values.pop("hidden_size", _HIDDEN), values.pop("num_layers", 2)
        lstm = {"kind": "lstm_of_coordinates", "hidden_size": hidden_size, "num_layers": num_layers}
        return {**values, "kind": "schedule_free", "modulator": lstm if num_layers else {"kind": "power_laws"}}
    return values


def modern_weights(kind: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta-parameters by the names that they have now, from those of any time.

    Args:
        kind: Of the rule, as it is called now.
    """
    frame = {"in_eigenbases": "inner.", "schedule_free": ""}.get(kind, "")
    if f"{frame}readout.weight" not in weights or kind not in ("in_eigenbases", "schedule_free"):
        return dict(weights)
    return {f"{frame}modulator.{name.removeprefix(frame)}": value for name, value in weights.items()}


def former(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The configuration and the weights as version 0.1 had them; ``None`` where they were the same or there was none.

    >>> former({"kind": "schedule_free", "modulator": {"kind": "power_laws"}}, {})
    ({'kind': 'schedule_free_lstm', 'hidden_size': 8, 'num_layers': 0}, {})
    """
    own: dict[str, Any] = {}
    inner: Mapping[str, Any] = config
    frame, kind = "", "schedule_free_lstm"
    if config["kind"] == "in_eigenbases":
        inner, own = config["inner"], {name: config[name] for name in _OF_BASES if name in config}
        frame, kind = "inner.", "eigenbasis"
    if inner["kind"] != "schedule_free":
        return None
    values = {name: value for name, value in inner.items() if name not in ("kind", "modulator")}
    modulator = inner["modulator"]
    if modulator["kind"] == "power_laws":
        lstm = {"hidden_size": _HIDDEN, "num_layers": 0}
    elif modulator["kind"] == "lstm_of_coordinates":
        lstm = {name: modulator[name] for name in _OF_LSTM}
    else:
        return None
    prefix = f"{frame}modulator."
    return (
        {"kind": kind, **lstm, **values, **own},
        {f"{frame}{name.removeprefix(prefix)}": value for name, value in weights.items()},
    )


def modern_training(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of what trains a rule, from a checkpoint of any time.

    Raises:
        ValueError: it holds episodes of a rule in bases, whose state cannot be told apart any more.
    """
    config = state.get("rule_config")
    if config is None or (modern := modern_config(config)) == config:
        return dict(state)
    if config["kind"] == "eigenbasis" and state.get("slots"):
        raise ValueError(
            "the checkpoint holds episodes of a rule in bases, as version 0.1 of learnedopt kept them: finish the run "
            "with that version, or start anew"
        )
    weights = {
        name: modern_weights(modern["kind"], state[name])
        for name in ("rule", "average", "best_weights")
        if isinstance(state.get(name), Mapping)
    }
    settings = dict(state["config"])
    if "coordinates" in settings:
        settings["coordinates"] = tuple(
            (name.replace("readout.", "modulator.readout."), *range_) for name, *range_ in settings["coordinates"]
        )
    return {**state, **weights, "rule_config": modern, "config": settings}


def modern_state(state: State, param: Tensor) -> State:
    """A tensor's state as it is now, from that of version 0.1: its origin is a point in the tensor's own coordinates.

    Args:
        state: Of a rule of one of the former kinds.
        param: The parameter, real and whole where it has bases.
    """
    if "origin" not in state:
        return state
    origin = state["origin"]
    if not state["step"]:  # it was set in the first step
        origin = param.detach().to(origin, copy=True)
    elif "age" in state:
        x = origin.reshape(len(origin), -1)
        x = state["left_basis"] @ x if "left_basis" in state else x
        x = x @ state["right_basis"].mT if "right_basis" in state else x
        origin = x.reshape(origin.shape)
    return {**state, "origin": origin}
