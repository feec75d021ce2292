"""Learned update rules as ``torch.optim`` optimizers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from learnedopt.kernels import (
    AGE,
    Backend,
    BackendName,
    Case,
    ReferenceBackend,
    StateDtype,
    StepOptions,
    StoredSpec,
    Tensors,
    check_name,
    choose,
    get_backend,
    initial_matrices,
    keep_state,
    read_state,
    state_layout,
    step,
    step_in_bases,
)
from learnedopt.optim.registry import RuleLike, RuleRegistry
from learnedopt.optim.sharding import (
    Spread,
    align,
    anywhere,
    copy_beside,
    keep_whole,
    local,
    mean_over,
    most_over,
    spread,
    total_over,
    whole,
    zeros_beside,
)
from learnedopt.rules import EigenbasisRule, State, UpdateRule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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

    A NaN gradient goes into the update and stays in the state, as with every optimizer of torch, unless
    ``nonfinite`` says otherwise; an infinite one too, but rules that normalize by second moments, the default among
    them, take it for a very large one. ``"skip"`` leaves parameters and state as they were, without waiting for the
    device (on a GPU but for the count of steps by which bases turn); ``"raise"`` waits for it at every step, to
    stop before anything changes. Both look at all gradients of the groups that set them, and at the loss where a
    rule reads it: one bad value skips the step of all these groups.

    Parameters may be sharded or replicated over processes as DTensors, by FSDP2 (``fully_shard``) or tensor
    parallelism: state is sharded with them, and what a rule asks about a whole tensor is summed over its shards, so
    results are those of one process up to rounding. Those that the rule has bases for are gathered, and every process
    has all of their state. FSDP1 hides how its flat parameters are cut and is not supported for rules that look at
    whole tensors.

    ``step`` is not differentiable. To train a rule, or to learn through its updates, call the rule
    (:meth:`~learnedopt.rules.UpdateRule.update`), which is a pure function with gradients of every order.

    Args:
        params: Tensors, ``(name, tensor)`` pairs, or dictionaries of parameter groups. A group may set each option
            for itself, for example ``[{"params": convolutions, "rule": "conv-lstm"}, {"params": the_rest}]``.
        rule: A name in the zoo, the folder of an entry, or a rule object, of which a copy is kept. ``None`` is the
            class's default. In the groups it appears as a name (``"rule"``) and a fingerprint (``"rule_sha256"``).
        lr: Multiplies the learned update. May be a tensor of one element.
        weight_decay: Decoupled weight decay, multiplied by ``lr`` as AdamW's is, which is 1 here and 0.001 or so there:
            give the product of AdamW's two. A warning is given where a step takes more than a thousandth off a weight.
        maximize: Give the rule the negative gradient.
        nonfinite: What to do about gradients that are not finite: ``"propagate"``, ``"skip"`` or ``"raise"``.
        state_dtype: How state is kept between steps: ``torch.float32`` (or wider, see above), ``torch.bfloat16``, or
            ``torch.int8``, which means eight bits for hidden states and ten for cells;
            :mod:`learnedopt.kernels.core.state` says how and what of it. In the groups it is its name.
        backend: What computes the step: ``"auto"``, the fastest that can serve and needs no compiling first, or one
            asked for by name: ``"reference"``, ``"blocked"``, ``"native"`` or ``"triton"``. They agree up to
            rounding. Of the optimizer, not of its groups or its ``state_dict``.

    Raises:
        TypeError: ``rule`` is none of the above.
        ValueError: ``lr`` or ``weight_decay`` is negative or not finite, ``nonfinite``, ``state_dtype`` or ``backend``
            is none of those named, the backend cannot serve, ``params`` is empty, or the rule is not in the zoo, is
            damaged, or is of a kind that this class does not run.
        RuntimeError: the backend has to be compiled and cannot be.

    State per parameter, on its device: ``(*spec.shape, *param.shape)`` for each coordinate-scope entry of the rule's
    :meth:`~learnedopt.rules.UpdateRule.state_spec`, ``spec.shape`` for each tensor-scope one. With ``torch.int8`` there
    are, beside each vector, a scale ``(*spec.shape[:-1], *param.shape)`` and, if it accumulates, the lower bits of its
    units, ``(*spec.shape[:-1], ceil(spec.shape[-1] / 4), *param.shape)``. Where the rule has bases for a tensor, there
    are its :meth:`~learnedopt.rules.UpdateRule.matrices` and ``age``, on the host: how many steps they have seen.

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
        state_dtype: torch.dtype = torch.float32,
        backend: BackendName = "auto",
    ) -> None:
        options = _checked(
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "nonfinite": nonfinite,
                "state_dtype": state_dtype,
            }
        )
        check_name(backend)
        self._asked_backend = backend
        self._backends: dict[Case, Backend] = {}
        self._agreed: dict[tuple[Case, DeviceMesh | None], Backend] = {}
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
            param_group = _checked(param_group)
            if param_group.get("rule_sha256") not in self._rules:
                param_group.update(self._identity(param_group.get("rule")))
        super().add_param_group(param_group)
        _warn_of_decay_meant_for_another_lr(self.param_groups[-1])
        self._place_rule(self.param_groups[-1])

    @property
    def backend(self) -> str:
        """What computes the step of these parameters where they are now; for each device if that differs.

        For parameters that are spread over processes it is the same in all of these from the first step on. Under
        ``torch.compile`` the compiler computes, from the reference, unless another backend was asked for.

        >>> from learnedopt.rules import LSTMRule
        >>> LearnedOptimizer([torch.ones(2)], rule=LSTMRule(), backend="blocked").backend
        'blocked'
        """
        chosen = {
            (case.device, self._choose(case, mesh).name): None
            for group in self.param_groups
            for case, mesh in self._cases(group)
        }
        names = {name for _, name in chosen}
        if len(names) == 1:
            return names.pop()
        return ", ".join(f"{name} on {device}" for device, name in chosen)

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
        together = self._count_together()
        for group in self.param_groups:
            self._update_group(group, observed, skip if group["nonfinite"] == "skip" else None, together)
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

        Options become those of ``state_dict``, except for ``state_dtype``: state that was kept in another dtype is
        converted to this optimizer's.

        Raises:
            ValueError: the state belongs to another rule than this optimizer runs, or its groups or shapes do not
                match.
        """
        saved: StateDict = {}
        state_dtypes = [group["state_dtype"] for group in self.param_groups]

        # The base class would cast state to the dtype of its parameter, so it is given the groups alone. The first
        # hook runs after the user's own and the second before them: they see, and may change, everything.
        def take_state(_: Optimizer, state_dict: StateDict) -> StateDict:
            self._check_same_rules(state_dict["param_groups"])
            self._check_same_shapes(state_dict)
            saved.update(state_dict)
            return {**state_dict, "state": {}}

        def restore_state(_: Optimizer) -> None:
            for group, saved_group, kept in zip(self.param_groups, saved["param_groups"], state_dtypes):
                sha256 = group["rule_sha256"]
                dtypes = saved_group.get("state_dtype", "float32"), kept
                group["state_dtype"] = kept
                for param, index in zip(group["params"], saved_group["params"]):
                    if index in saved["state"]:
                        dtype = self._rules.dtype(sha256, param.dtype.to_real())
                        self.state[param] = _load_state(
                            self._rules[sha256], param, saved["state"][index], dtype, *dtypes
                        )

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
        kept = {key: getattr(self, key) for key in ("_rules", "_observed_loss", "_asked_backend")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What is loaded brings no backend, and that of an optimizer that is there already stays.
        self.__dict__.setdefault("_asked_backend", "auto")
        self.__dict__.setdefault("_backends", {})
        self.__dict__.setdefault("_agreed", {})
        super().__setstate__(state)
        for key, value in {"maximize": False, "nonfinite": "propagate", "state_dtype": "float32"}.items():
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

    def _cases(self, group: dict[str, Any]) -> list[tuple[Case, DeviceMesh | None]]:
        """What a group asks of backends, and for tensors spread over which processes."""
        sha256 = group["rule_sha256"]
        places = []
        for param in group["params"]:
            device, dtype = param.device, self._rules.dtype(sha256, param.dtype.to_real())
            rule = self._rules.placed(sha256, device, dtype)
            rule = rule.inner if isinstance(rule, EigenbasisRule) else rule
            places.append((Case(rule, device, dtype, group["state_dtype"]), _mesh(spread(param))))
        return list(dict.fromkeys(places))

    def _choose(self, case: Case, mesh: DeviceMesh | None = None) -> Backend:
        """Chosen once: a step does not change because something was compiled in the meantime."""
        if torch.compiler.is_compiling() and self._asked_backend == "auto":
            return ReferenceBackend()
        if (case, mesh) in self._agreed:
            return self._agreed[case, mesh]
        if case not in self._backends:
            self._backends[case], _ = choose(case, self._asked_backend)
        return self._backends[case]

    def _agree(self, case: Case, mesh: DeviceMesh | None) -> Backend:
        """The choice for tensors that are spread over processes: the same in all of them.

        Each chooses by what is compiled on its own disk, and together they take the slowest of their choices. They are
        asked in their first step, where all of them are.
        """
        backend = self._choose(case, mesh)
        settled = self._asked_backend != "auto" or torch.compiler.is_compiling() or (case, mesh) in self._agreed
        if mesh is None or settled:
            return backend
        names = get_args(BackendName)  # the fastest first
        slowest = most_over(mesh, names.index(backend.name), case.device)
        self._agreed[case, mesh] = get_backend(names[slowest])
        return self._agreed[case, mesh]

    def _place_rule(self, group: dict[str, Any]) -> None:
        """Copy the rule to where a group's parameters are: now, as a copy cannot be part of a compiled step.

        And say now if the backend that was asked for cannot serve; of parameters that are nowhere yet, later.
        """
        for case, _ in self._cases(group):
            if case.device.type != "meta":
                self._choose(case)

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
                dtype = self._rules.dtype(group["rule_sha256"], param.dtype.to_real())
                layout = state_layout(rule, dtype, saved_group.get("state_dtype", "float32"))
                if found and found != (expected := _state_shapes(rule, layout, _as_real(param))):
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
            if param.is_complex() and param.is_conj():  # in this order, because compilers do not know the second
                raise RuntimeError(
                    f"{type(self).__name__} cannot update a conjugate view, here of shape {tuple(param.shape)}: make "
                    "it a parameter of its own with resolve_conj()"
                )
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

    def _count_together(self) -> int:
        """How many tensors are trained, in all groups. One without a gradient today may have one tomorrow."""
        params = set(chain.from_iterable(group["params"] for group in self.param_groups))
        return sum(param.numel() > 0 and (param.requires_grad or param.grad is not None) for param in params)

    def _update_group(self, group: dict[str, Any], loss: Tensor | None, skip: Tensor | None, together: int) -> None:
        """Gather parameters, gradients and state by rule, device, dtype and sharding; a backend does the rest."""
        sha256, lr = group["rule_sha256"], group["lr"]
        batches: dict[tuple[UpdateRule, bool, torch.dtype, Spread | None], list[tuple[Tensor, Tensor, State]]] = {}
        for param in dict.fromkeys(group["params"]):
            if param.grad is None:
                continue
            value, grad = _as_real(param), _as_real(align(param.grad, param))
            dtype = self._rules.dtype(sha256, value.dtype)
            whole_rule = self._rules.placed(sha256, value.device, dtype)
            has_bases = bool(whole_rule.matrices(value.shape))
            inner = whole_rule.inner if isinstance(whole_rule, EigenbasisRule) else whole_rule
            rule = whole_rule if has_bases else inner
            state = self.state[param]
            if not state:
                state.update(_init_state(whole_rule, value, dtype, group["state_dtype"]))
            batches.setdefault((rule, has_bases, dtype, spread(value)), []).append((value, grad, state))
        if self._rules[sha256].needs_loss and loss is None:
            return
        for rule, has_bases, dtype, layout in list(batches):
            # One call for those with bases and those without: on small networks calls are what a step costs. What is
            # compiled is left out, because what has bases is not.
            if has_bases and layout is None and isinstance(rule, EigenbasisRule) and not torch.compiler.is_compiling():
                batches[rule, has_bases, dtype, layout] += batches.pop((rule.inner, False, dtype, layout), [])
        for (rule, has_bases, dtype, layout), batch in batches.items():
            device = batch[0][0].device
            given = None if loss is None else _sent(loss, device, dtype)
            if given is not None and layout is not None:
                given = mean_over(layout[0], given)
            params, grads, states = zip(*batch)
            # What is in bases is a mixture of rows and columns that other processes may hold.
            here = whole if has_bases else local
            tensors = Tensors(
                [here(param) for param in params],
                [here(grad) for grad in grads],
                [{name: here(values) for name, values in state.items()} for state in states],
                dtype=dtype,
                state_dtype=group["state_dtype"],
                counts=[param.numel() for param in params],
                total=None if layout is None or has_bases else total_over(layout),
                maximize=group["maximize"],
                together=together,
            )
            served = rule.inner if isinstance(rule, EigenbasisRule) else rule
            backend = self._agree(Case(served, device, dtype, group["state_dtype"]), _mesh(layout))
            options = StepOptions(
                lr=_sent(lr.reshape(()), device, dtype) if isinstance(lr, Tensor) else lr,
                weight_decay=group["weight_decay"],
                loss=given,
                skip=None if skip is None else _sent(skip, device),
            )
            with _without_autocast(device):
                if has_bases:
                    step_in_bases(backend, rule, tensors, **vars(options))
                else:
                    step(backend, rule, tensors, options)
                if has_bases:
                    for param, moved in zip(params, tensors.params):
                        keep_whole(param, moved)


def _init_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype, state_dtype: StateDtype) -> State:
    layout, matrices = state_layout(rule, dtype, state_dtype), initial_matrices(rule, param, dtype)
    start = {
        name: param.detach().to(spec.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, spec in layout.items()
        if spec.starts_at == "param"
    }
    if matrices:
        # Every process has all of it, see _update_group.
        shapes = _state_shapes(rule, layout, param)
        zeros = {
            name: torch.zeros(shapes[name], dtype=spec.dtype, device=param.device) for name, spec in layout.items()
        }
        return {**matrices, **zeros, **start}
    return {
        name: zeros_beside(param, spec.shape, spec.dtype)
        if spec.scope == "coordinate"
        else torch.zeros(spec.shape, dtype=spec.dtype, device=param.device)
        for name, spec in layout.items()
    } | start


@torch.no_grad()
def _load_state(
    rule: UpdateRule, param: Tensor, saved: State, dtype: torch.dtype, saved_as: StateDtype, state_dtype: StateDtype
) -> State:
    """A copy of saved state as it should be for a parameter: precision, device, and spread over processes."""
    param = _as_real(param)
    layout, matrices = state_layout(rule, dtype, saved_as), rule.matrices(param.shape)
    placed: State = {}
    for name, values in saved.items():
        if name == AGE:
            placed[name] = whole(values).to("cpu", dtype, copy=True)
        elif name in layout and layout[name].scope == "coordinate" and not matrices:
            placed[name] = copy_beside(param, values, layout[name].dtype)
        else:
            kept = layout[name].dtype if name in layout else dtype
            placed[name] = whole(values).to(param.device, kept, copy=True, memory_format=torch.contiguous_format)
    if saved_as == state_dtype or not placed:
        return placed
    flat = {name: local(placed[name]).reshape(*spec.shape, -1) for name, spec in layout.items()}
    state = _init_state(rule, param, dtype, state_dtype)
    converted = keep_state(read_state(flat, rule.state_spec(), dtype), state_layout(rule, dtype, state_dtype))
    for name, value in converted.items():
        local(state[name]).copy_(value.view(local(state[name]).shape))
    return {**state, **{name: values for name, values in placed.items() if name not in layout}}


def _mesh(layout: Spread | None) -> DeviceMesh | None:
    return None if layout is None else layout[0]


def _state_shapes(rule: UpdateRule, layout: dict[str, StoredSpec], param: Tensor) -> dict[str, tuple[int, ...]]:
    matrices = rule.matrices(param.shape)
    of_param = {"coordinate": tuple(param.shape), "tensor": ()}
    shapes = {name: spec.shape + of_param[spec.scope] for name, spec in layout.items()}
    return {**shapes, **matrices, AGE: ()} if matrices else shapes


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


def _warn_of_decay_meant_for_another_lr(group: dict[str, Any]) -> None:
    decay = float(group["lr"]) * group["weight_decay"]
    if decay > 1e-3:
        warnings.warn(
            f"weight_decay={group['weight_decay']:g} at lr={float(group['lr']):g} takes {100 * decay:.2g} % off every "
            "weight in every step. If it was chosen for AdamW, multiply it by the learning rate that AdamW had: lr "
            "multiplies a learned update, and is 1 by default",
            stacklevel=4,
        )


def _checked(options: dict[str, Any]) -> dict[str, Any]:
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
