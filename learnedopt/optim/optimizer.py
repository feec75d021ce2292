"""Learned update rules as ``torch.optim`` optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from learnedopt.optim.blocks import update_in_blocks
from learnedopt.optim.registry import RuleLike, RuleRegistry
from learnedopt.optim.sharding import (
    Spread,
    align,
    anywhere,
    copy_beside,
    local,
    mean_over,
    spread,
    whole,
    zeros_beside,
)
from learnedopt.rules import State, UpdateRule

Loss = Tensor | float
NonFinite = Literal["propagate", "skip", "raise"]


class LearnedOptimizer(Optimizer):
    r"""Runs a learned update rule in place of a hand-written one.

    At each step, for every parameter :math:`\theta` with gradient :math:`g` and rule state :math:`s`,

    .. math::
        (\Delta, s) &\leftarrow \mathrm{rule}(\theta, g, s) \\
        \theta &\leftarrow (1 - \eta\lambda)\,\theta + \eta\,\Delta

    ``lr`` (:math:`\eta`) multiplies the learned update: 1 is the rule as it was trained, 0 changes no bit of any
    parameter. Weight decay (:math:`\lambda`) is decoupled and scaled by ``lr`` as in AdamW; the rule sees the
    parameters before decay.

    Parameters may be of any shape, strides and floating-point dtype. Complex ones are optimized as pairs of reals,
    those without a gradient are skipped, and one that is listed twice is updated once. Rule, state and arithmetic
    are float32, or float64 where the parameter or the rule is.

    An infinite or NaN gradient goes into the update and stays in the state, as with every optimizer of torch, unless
    ``nonfinite`` says otherwise: ``"skip"`` leaves parameters and state as they were, without waiting for the device;
    ``"raise"`` waits for it at every step, to stop before anything changes. Both look at all gradients of the groups
    that set them, and at the loss where a rule reads it: one bad value skips the step of all these groups.

    Parameters may be sharded or replicated over processes as DTensors, by FSDP2 (``fully_shard``) or tensor
    parallelism: state is sharded with them, and what a rule asks about a whole tensor is summed over its shards, so
    results are those of one process up to rounding. FSDP1 hides how its flat parameters are cut and is not supported
    for rules that look at whole tensors.

    ``step`` is not differentiable. To train a rule, or to learn through its updates, call the rule
    (:meth:`~learnedopt.rules.UpdateRule.update`), which is a pure function with gradients of every order.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dictionaries of parameter groups. A group may set each option
            for itself, for example ``[{"params": convolutions, "rule": "conv-lstm"}, {"params": the_rest}]``.
        rule: A name in the zoo, the folder of an entry, or a rule object, of which a copy is kept. ``None`` is the
            class's default. In the groups it appears as a name (``"rule"``) and a fingerprint (``"rule_sha256"``).
        lr: Multiplies the learned update. May be a tensor of one element.
        weight_decay: Decoupled weight decay.
        maximize: Give the rule the negative gradient.
        nonfinite: What to do about gradients that are not finite: ``"propagate"``, ``"skip"`` or ``"raise"``.

    Raises:
        TypeError: ``rule`` is none of the above.
        ValueError: ``lr`` or ``weight_decay`` is negative or not finite, ``nonfinite`` is none of the three,
            ``params`` is empty, or the rule is not in the zoo, is damaged, or is of a kind that this class does not
            run.

    State per parameter, on its device: ``(*spec.shape, *param.shape)`` for each coordinate-scope entry of the rule's
    :meth:`~learnedopt.rules.UpdateRule.state_spec`, ``spec.shape`` for each tensor-scope one.

    >>> from learnedopt.rules import AdamLSTMRule
    >>> weights = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = LearnedOptimizer([weights], rule=AdamLSTMRule())
    >>> weights.square().sum().backward()
    >>> optimizer.step()
    >>> weights.detach()
    tensor([ 0.9970, -0.9970])
    """

    default_rule: ClassVar[str | None] = "default"
    """The zoo entry that ``rule=None`` means; ``None`` where a rule must be given."""
    rule_class: ClassVar[type[UpdateRule]] = UpdateRule
    """The kind of rule this class runs."""

    def __init__(
        self,
        params: ParamsT,
        rule: RuleLike | None = None,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        nonfinite: NonFinite = "propagate",
    ) -> None:
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "nonfinite": nonfinite}
        _check_options(options)
        self._rules = RuleRegistry()
        self._observed_loss: Loss | None = None
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
            param_group = dict(param_group)
            _check_options(param_group)
            if param_group.get("rule_sha256") not in self._rules:
                param_group.update(self._identity(param_group.get("rule")))
        super().add_param_group(param_group)
        self._place_rule(self.param_groups[-1])

    @overload
    def step(self, closure: None = None, *, loss: Loss | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, loss: Loss | None = None) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Loss | None = None) -> Any:
        """Perform one optimization step.

        Rules with ``needs_loss`` read the training loss: ``loss``, else what ``closure`` returns, else what was last
        given to :meth:`observe`. The others ignore it, so one training loop serves all. Reading the loss does not
        wait for the device. At ``lr=0`` it may be missing: then state is created and nothing else happens, which is
        how a distributed checkpoint prepares an optimizer for what it loads.

        Where processes train together, each has the loss of its own batch. For DTensors it is averaged here over
        their mesh. For plain parameters it is taken as given: under ``DistributedDataParallel`` average it first
        (``torch.distributed.all_reduce``), or the replicas will drift apart.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss.
            loss: The training loss, one element.

        Returns:
            What ``closure`` returned, ``None`` without one.

        Raises:
            RuntimeError: a gradient is sparse; a parameter is expanded, its elements sharing memory; a rule needs the
                loss and none was given; or, in a group of ``nonfinite="raise"``, a gradient or a loss that the rule
                reads is not finite.
            ValueError: a rule needs the loss and it has more than one element.
            Exception: whatever ``closure`` raises. In each of these cases no parameter or state has changed.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        self._check_layouts()
        given = (loss, returned, self._observed_loss)
        observed = self._read_loss(next((value for value in given if value is not None), None))
        skip = self._check_finite(observed)
        self._observed_loss = None
        for group in self.param_groups:
            self._update_group(group, observed, skip if group["nonfinite"] == "skip" else None)
        return returned

    def observe(self, loss: Loss) -> None:
        """Tell the next :meth:`step` the training loss, for loops that call ``step`` without arguments.

        It is used once. Under gradient scaling, give the loss as it is before scaling.

        >>> from learnedopt.rules import MetaLSTMRule
        >>> weights = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = LearnedOptimizer([weights], rule=MetaLSTMRule())
        >>> loss = weights.square().sum()
        >>> loss.backward()
        >>> optimizer.observe(loss)
        >>> optimizer.step()
        """
        self._observed_loss = loss.detach() if isinstance(loss, Tensor) else loss

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` gave. State keeps its precision and shares no memory with ``state_dict``.

        Raises:
            ValueError: the state belongs to another rule than this optimizer runs, or its groups or shapes do not
                match.
        """
        saved: StateDict = {}

        # The base class would cast state to the dtype of its parameter, so it is given the groups alone. The first
        # hook runs after the user's own and the second before them: they see, and may change, everything.
        def take_state(_: Optimizer, state_dict: StateDict) -> StateDict:
            self._check_same_rules(state_dict["param_groups"])
            self._check_same_shapes(state_dict)
            saved.update(state_dict)
            return {**state_dict, "state": {}}

        def restore_state(_: Optimizer) -> None:
            for group, saved_group in zip(self.param_groups, saved["param_groups"]):
                sha256 = group["rule_sha256"]
                for param, index in zip(group["params"], saved_group["params"]):
                    if index in saved["state"]:
                        dtype = self._rules.dtype(sha256, param.dtype.to_real())
                        self.state[param] = _load_state(self._rules[sha256], param, saved["state"][index], dtype)

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
        return {**super().__getstate__(), "_rules": self._rules, "_observed_loss": self._observed_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for key, value in {"maximize": False, "nonfinite": "propagate"}.items():
            self.defaults.setdefault(key, value)
            for group in self.param_groups:
                group.setdefault(key, self.defaults[key])
        for group in self.param_groups:
            self._place_rule(group)

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

    def _place_rule(self, group: dict[str, Any]) -> None:
        """Copy the rule to where a group's parameters are: now, as a copy cannot be part of a compiled step."""
        for param in group["params"]:
            dtype = self._rules.dtype(group["rule_sha256"], param.dtype.to_real())
            self._rules.placed(group["rule_sha256"], param.device, dtype)

    def _check_same_rules(self, saved_groups: list[dict[str, Any]]) -> None:
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups)):
            if saved.get("rule_sha256") != group["rule_sha256"]:
                raise ValueError(
                    f"parameter group {index}: this state was made with rule {saved.get('rule')!r} (sha256 "
                    f"{saved.get('rule_sha256')}), and the optimizer runs {group['rule']!r} (sha256 "
                    f"{group['rule_sha256']}): construct the optimizer with the rule that the state belongs to"
                )

    def _check_same_shapes(self, saved: StateDict) -> None:
        for group, saved_group in zip(self.param_groups, saved["param_groups"]):
            rule = self._rules[group["rule_sha256"]]
            for name, param, key in zip(_param_names(group), group["params"], saved_group["params"]):
                found = {
                    entry: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    for entry, value in saved["state"].get(key, {}).items()
                }
                if found and found != (expected := _state_shapes(rule, _as_real(param))):
                    raise ValueError(
                        f"{name} has shape {tuple(param.shape)} and its state the shapes {expected}, but the state to "
                        f"load has {found}: its parameters must be those of this optimizer, in the same order"
                    )

    def _check_finite(self, loss: Tensor | None) -> Tensor | None:
        """Raise where a group asks for it; else say, without waiting, whether to skip the step where groups skip."""
        read: dict[str, list[tuple[str, Tensor]]] = {"skip": [], "raise": []}
        for group in self.param_groups:
            if group["nonfinite"] == "propagate":
                continue
            if loss is not None and self._rules[group["rule_sha256"]].needs_loss:
                read[group["nonfinite"]].append(("the loss", loss))
            read[group["nonfinite"]] += [
                (f"the gradient of {name}", param.grad)
                for name, param in zip(_param_names(group), group["params"])
                if param.grad is not None
            ]
        if read["raise"]:
            names, values = zip(*read["raise"])
            if found := [name for name, flag in zip(names, _nonfinite(values).tolist()) if flag]:
                raise RuntimeError(f"not finite: {', '.join(found)}. No parameter and no state has changed")
        return _nonfinite([value for _, value in read["skip"]]).any() if read["skip"] else None

    def _check_layouts(self) -> None:
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if any(stride == 0 and size > 1 for stride, size in zip(param.stride(), param.shape)):
                raise RuntimeError(
                    f"{type(self).__name__} cannot update an expanded parameter, here of shape {tuple(param.shape)}: "
                    "several of its elements are one number in memory; make it a parameter of its own with clone()"
                )

    def _read_loss(self, loss: Loss | None) -> Tensor | None:
        """The loss as a 0-d tensor, where any rule needs it."""
        needy = [group for group in self.param_groups if self._rules[group["rule_sha256"]].needs_loss]
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

    def _update_group(self, group: dict[str, Any], loss: Tensor | None, skip: Tensor | None) -> None:
        """Gather gradients and state here; statistics, the rule and the writing are :func:`update_in_blocks`."""
        sha256, lr = group["rule_sha256"], group["lr"]
        batches: dict[
            tuple[torch.device, torch.dtype, Spread | None], tuple[list[Tensor], list[Tensor], list[State]]
        ] = {}
        for param in dict.fromkeys(group["params"]):
            if param.grad is None:
                continue
            value, grad = _as_real(param), _as_real(align(param.grad, param))
            device, dtype = value.device, self._rules.dtype(sha256, value.dtype)
            state = self.state[param]
            if not state:
                state.update(_init_state(self._rules[sha256], value, dtype))
            params, grads, states = batches.setdefault((device, dtype, spread(value)), ([], [], []))
            params.append(value)
            grads.append(-grad if group["maximize"] else grad)
            states.append(state)
        if self._rules[sha256].needs_loss and loss is None:
            return
        for (device, dtype, layout), (params, grads, states) in batches.items():
            given = None if loss is None else _sent(loss, device, dtype)
            if given is not None and layout is not None:
                given = mean_over(layout[0], given)
            with _without_autocast(device):
                update_in_blocks(
                    self._rules.placed(sha256, device, dtype),
                    params,
                    grads,
                    states,
                    dtype=dtype,
                    lr=_sent(lr.reshape(()), device, dtype) if isinstance(lr, Tensor) else lr,
                    weight_decay=group["weight_decay"],
                    loss=given,
                    skip=None if skip is None else _sent(skip, device),
                )


def _init_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype) -> State:
    return {
        name: zeros_beside(param, spec.shape, dtype)
        if spec.scope == "coordinate"
        else torch.zeros(spec.shape, dtype=dtype, device=param.device)
        for name, spec in rule.state_spec().items()
    }


@torch.no_grad()
def _load_state(rule: UpdateRule, param: Tensor, saved: State, dtype: torch.dtype) -> State:
    """A copy of saved state as it should be for a parameter: precision, device, and spread over processes."""
    spec = rule.state_spec()
    return {
        name: copy_beside(_as_real(param), values, dtype)
        if spec[name].scope == "coordinate"
        else whole(values).to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
        for name, values in saved.items()
    }


def _state_shapes(rule: UpdateRule, param: Tensor) -> dict[str, tuple[int, ...]]:
    return {
        name: spec.shape + (tuple(param.shape) if spec.scope == "coordinate" else ())
        for name, spec in rule.state_spec().items()
    }


def _param_names(group: dict[str, Any]) -> list[str]:
    """How to speak of a group's parameters: by their names, else by their places."""
    return group.get("param_names") or [f"parameter {index}" for index in range(len(group["params"]))]


def _nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each tensor holds a value that is infinite or NaN: ``(len(tensors),)``, on one device."""
    flags = [local(tensor).isfinite().all().logical_not() for tensor in tensors]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    return anywhere(torch.stack([_sent(flag, device) for flag in flags]), tensors)


def _sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A copy elsewhere; it is waited for on the way to the host only, where it could be read before it is there."""
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The precision of a rule does not depend on where in the loop ``step`` is called."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _check_options(options: dict[str, Any]) -> None:
    """Reject what no group may have; the wording is torch's."""
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
