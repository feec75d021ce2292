"""Learned update rules as ``torch.optim`` optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from learnedopt.optim.blocks import update_in_blocks
from learnedopt.optim.registry import RuleLike, RuleRegistry
from learnedopt.rules import State, UpdateRule

Loss = Tensor | float


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

    ``step`` is not differentiable: to train a rule through its own updates, call the rule itself.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dictionaries of parameter groups. A group may set each option
            for itself, for example ``[{"params": convolutions, "rule": "conv-lstm"}, {"params": the_rest}]``.
        rule: A name in the zoo, the folder of an entry, or a rule object, of which a copy is kept. ``None`` is the
            class's default. In the groups it appears as a name (``"rule"``) and a fingerprint (``"rule_sha256"``).
        lr: Multiplies the learned update. May be a tensor of one element.
        weight_decay: Decoupled weight decay.
        maximize: Give the rule the negative gradient.

    Raises:
        TypeError: ``rule`` is none of the above.
        ValueError: ``lr`` or ``weight_decay`` is negative or not finite, ``params`` is empty, or the rule is not in
            the zoo, is damaged, or is of a kind that this class does not run.

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
    ) -> None:
        _check_options({"lr": lr, "weight_decay": weight_decay})
        self._rules = RuleRegistry()
        self._observed_loss: Loss | None = None
        # The default is loaded when the first group asks for it: each may bring its own rule.
        identity = {"rule": None, "rule_sha256": None} if rule is None else self._rules.add(rule, self.rule_class)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, **identity})

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

    @overload
    def step(self, closure: None = None, *, loss: Loss | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, loss: Loss | None = None) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Loss | None = None) -> Any:
        """Perform one optimization step.

        Rules with ``needs_loss`` read the training loss: ``loss``, else what ``closure`` returns, else what was last
        given to :meth:`observe`. The others ignore it, so one training loop serves all. Reading the loss does not
        wait for the device.

        Args:
            closure: Clears the gradients, computes the loss, calls ``backward`` and returns the loss.
            loss: The training loss, one element.

        Returns:
            What ``closure`` returned, ``None`` without one.

        Raises:
            RuntimeError: a gradient is sparse, or a rule needs the loss and none was given.
            ValueError: a rule needs the loss and it has more than one element.
            Exception: whatever ``closure`` raises. In each of these cases no parameter or state has changed.
        """
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        self._reject_sparse_gradients()
        given = (loss, returned, self._observed_loss)
        observed = self._read_loss(next((value for value in given if value is not None), None))
        self._observed_loss = None
        for group in self.param_groups:
            self._update_group(group, observed)
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
            ValueError: the state belongs to another rule than this optimizer runs, or its groups do not match.
        """
        saved: StateDict = {}

        # The base class would cast state to the dtype of its parameter, so it is given the groups alone. The first
        # hook runs after the user's own and the second before them: they see, and may change, everything.
        def take_state(_: Optimizer, state_dict: StateDict) -> StateDict:
            self._check_same_rules(state_dict["param_groups"])
            saved.update(state_dict)
            return {**state_dict, "state": {}}

        def restore_state(_: Optimizer) -> None:
            for group, saved_group in zip(self.param_groups, saved["param_groups"]):
                for param, index in zip(group["params"], saved_group["params"]):
                    if index in saved["state"]:
                        dtype = self._rules.dtype(group["rule_sha256"], param.dtype.to_real())
                        self.state[param] = {
                            name: value.to(param.device, dtype, copy=True, memory_format=torch.contiguous_format)
                            for name, value in saved["state"][index].items()
                        }

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
        for group in self.param_groups:
            group.setdefault("maximize", False)

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

    def _check_same_rules(self, saved_groups: list[dict[str, Any]]) -> None:
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups)):
            if saved.get("rule_sha256") != group["rule_sha256"]:
                raise ValueError(
                    f"parameter group {index}: this state was made with rule {saved.get('rule')!r} (sha256 "
                    f"{saved.get('rule_sha256')}), and the optimizer runs {group['rule']!r} (sha256 "
                    f"{group['rule_sha256']}): construct the optimizer with the rule that the state belongs to"
                )

    def _reject_sparse_gradients(self) -> None:
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")

    def _read_loss(self, loss: Loss | None) -> Tensor | None:
        """The loss as a 0-d tensor, where any rule needs it."""
        needy = [group["rule"] for group in self.param_groups if self._rules[group["rule_sha256"]].needs_loss]
        if not needy:
            return None
        if loss is None:
            raise RuntimeError(
                f"the rule {needy[0]!r} reads the training loss at every step, and none was given: call step(closure) "
                "with a closure that returns the loss, or step(loss=loss), or observe(loss) before step()"
            )
        loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        if loss.numel() != 1:
            raise ValueError(f"the training loss must have one element, got shape {tuple(loss.shape)}")
        return loss.reshape(())

    def _update_group(self, group: dict[str, Any], loss: Tensor | None) -> None:
        """Gather gradients and state here; statistics, the rule and the writing are :func:`update_in_blocks`."""
        sha256, lr = group["rule_sha256"], group["lr"]
        batches: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[State]]] = {}
        for param in dict.fromkeys(group["params"]):
            if param.grad is None:
                continue
            value, grad = _as_real(param), _as_real(param.grad)
            device, dtype = value.device, self._rules.dtype(sha256, value.dtype)
            state = self.state[param]
            if not state:
                state.update(_init_state(self._rules[sha256], value, dtype))
            params, grads, states = batches.setdefault((device, dtype), ([], [], []))
            params.append(value)
            grads.append(-grad if group["maximize"] else grad)
            states.append(state)
        for (device, dtype), (params, grads, states) in batches.items():
            update_in_blocks(
                self._rules.placed(sha256, device, dtype),
                params,
                grads,
                states,
                dtype=dtype,
                lr=lr.reshape(()).to(device, dtype, non_blocking=True) if isinstance(lr, Tensor) else lr,
                weight_decay=group["weight_decay"],
                loss=None if loss is None else loss.to(device, dtype, non_blocking=True),
            )


def _init_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype) -> State:
    return {
        name: torch.zeros(
            spec.shape + (tuple(param.shape) if spec.scope == "coordinate" else ()), dtype=dtype, device=param.device
        )
        for name, spec in rule.state_spec().items()
    }


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
