"""Learned update rules as ``torch.optim`` optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from learnedopt.kernels import BackendName, Case, StepOptions, step
from learnedopt.optim.groups import RuleGroups
from learnedopt.optim.options import Group, Loss, NonFinite, check_finite, check_params, checked, read_loss
from learnedopt.optim.placement import batches, count_trained, held, without_autocast
from learnedopt.optim.registry import RuleLike
from learnedopt.optim.sharding import mean_over, sent


class LearnedOptimizer(RuleGroups):
    r"""Runs a learned update rule in place of a hand-written one.

    At each step, for every parameter :math:`\theta` with gradient :math:`g` and rule state :math:`s`,

    .. math::
        (\Delta, s) &\leftarrow \mathrm{rule}(\theta, g, s) \\
        \theta &\leftarrow (1 - \eta\lambda)\,\theta + \eta\,\Delta

    **Leave ``lr`` out.** It is no learning rate of Adam's: it multiplies the learned update (:math:`\eta`). 1 is
    the rule as it was trained, 0 changes no bit of any parameter, and 0.001 trains next to nothing. A schedule is not
    needed either, and does no harm: the default averages, and a decaying ``lr`` changes little
    (:class:`~learnedopt.rules.LawsRule`). Weight decay
    (:math:`\lambda`) is decoupled and scaled by ``lr`` as in AdamW; the rule sees the parameters before decay.

    Parameters may be of any shape, strides and floating-point dtype. Complex ones are optimized as pairs of reals; to
    what asks about whole tensors, that is one tensor of pairs and not two. Those without a gradient are skipped, and
    one that is listed twice is updated once. Rule, state and arithmetic are float32, or float64 where the parameter or
    the rule is.

    A NaN gradient goes into the update and stays in the state, as with every optimizer of torch, unless
    ``nonfinite`` says otherwise; an infinite one too, but rules that normalize by second moments, the default among
    them, take it for a very large one. ``"skip"`` leaves parameters and state as they were, without waiting for the
    device (on a GPU but for the count of steps by which bases turn); ``"raise"`` waits for it at every step, to
    stop before anything changes. Both look at all gradients of the groups that set them, and at the loss where a
    rule reads it: one bad value skips the step of all these groups.

    Parameters may be sharded or replicated over processes as DTensors, by FSDP2 (``fully_shard``) or tensor
    parallelism: state is sharded with them, and what a rule asks about a whole tensor is summed over its shards, so
    results are those of one process up to rounding. Those that the rule has bases for are gathered, and every process
    has all of their state. FSDP1 hides how its flat parameters are cut, and is refused for rules that look at whole
    tensors.

    ``step`` is not compiled: under ``torch.compile`` it is taken outside of the graph, the same to the last bit; with
    ``fullgraph=True`` that is an error. It is not differentiable either: to train a rule, or to learn through its
    updates, call the rule (:meth:`~learnedopt.rules.UpdateRule.update`), which is pure and has all gradients.
    Of tensors without values, fake or on the device ``meta``, it makes the state and computes nothing.

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
        together: How many tensors are trained together, where this optimizer cannot count them: one that has only some
            of a network's, as under ``ZeroRedundancyOptimizer`` or with an optimizer for each parameter, is given the
            number of all; a group with one of several independent networks, the number of its own. Learned step sizes
            are smaller for networks of many tensors. ``None`` counts those of all groups.
        mask_zero_gradients: Whether elements stay where they are, bit for bit, in a step in which their gradients are
            exactly zero, as of weights that are pruned or frozen by masks, or rows of an embedding without a gradient.
            Neither the update nor weight decay moves them. Only the move is dropped: state advances as without it. A
            step takes a copy of the parameters.
        backend: What computes the step: ``"auto"``, the fastest that can serve and needs no compiling first, or one
            asked for by name: ``"reference"``, ``"blocked"``, ``"native"`` or ``"triton"``. They agree up to
            rounding. Of the optimizer, not of its groups or its ``state_dict``.

    Raises:
        TypeError: ``rule`` is none of the above.
        ValueError: ``lr`` or ``weight_decay`` is negative or not finite, ``nonfinite``, ``state_dtype`` or ``backend``
            is none of those named, ``together`` is no positive number, the backend cannot serve, ``params`` is
            empty, or the rule is not in the zoo, is damaged, or is of a kind that this class does not run.
        RuntimeError: the backend has to be compiled and cannot be.

    State per parameter, on its device: ``(*spec.shape, *param.shape)`` for each coordinate-scope entry of the rule's
    :meth:`~learnedopt.rules.UpdateRule.state_spec`, ``spec.shape`` for each tensor-scope one. With ``torch.int8`` there
    are, beside each vector, a scale ``(*spec.shape[:-1], *param.shape)`` and, if it accumulates, the lower bits of its
    units, ``(*spec.shape[:-1], ceil(spec.shape[-1] / 4), *param.shape)``. Where the rule has coordinates of its own
    for a tensor, there are their entries (:class:`~learnedopt.rules.Coordinates`) and ``age``, on the host: how many
    steps they have seen.

    >>> from learnedopt.rules import AdamLSTMRule
    >>> weights = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> optimizer = LearnedOptimizer([weights], rule=AdamLSTMRule())
    >>> weights.square().sum().backward()
    >>> optimizer.step()
    >>> weights.detach()
    tensor([ 0.9970, -0.9970])
    """

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
        together: int | None = None,
        mask_zero_gradients: bool = False,
        backend: BackendName = "auto",
    ) -> None:
        options: Group = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "together": together}
        options |= {"nonfinite": nonfinite, "state_dtype": state_dtype, "mask_zero_gradients": mask_zero_gradients}
        self._observed_loss: Loss | None = None
        super().__init__(params, rule, checked(options), backend)

    @overload
    def step(self, closure: None = None, *, loss: Loss | None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any], *, loss: Loss | None = None) -> Any: ...

    @torch.compiler.disable(reason="a step of learnedopt has kernels of its own, and is not compiled")
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
            RuntimeError: it is called within :meth:`averaged_parameters`.
            ValueError: a rule needs the loss and it has more than one element.
            Exception: whatever ``closure`` raises. In each of these cases no parameter or state has changed.
        """
        if self._averaged:
            raise RuntimeError(
                "step() within averaged_parameters(): the parameters are not where the optimizer left them"
            )
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        check_params(self.param_groups, self.state, self._rules, type(self).__name__)
        given = next((value for value in (loss, returned, self._observed_loss) if value is not None), None)
        observed = read_loss(given, self.param_groups, self._rules)
        skip = check_finite(observed, self.param_groups, self._rules)
        self._observed_loss = None
        together = count_trained(self.param_groups)
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

    def _update_group(self, group: Group, loss: Tensor | None, skip: Tensor | None, together: int) -> None:
        """Gather parameters, gradients and state by device, dtype and sharding; a backend does the rest."""

        lr = group["lr"]
        found = batches(group, self._rules, self.state)
        if self._rules[group["rule_sha256"]].needs_loss and loss is None:
            return  # at lr=0: state is there, and nothing moves
        for batch in found:
            device, dtype = batch.device, batch.dtype
            if not batch.has_values:
                self._backends.choose(Case(batch.rule, device, dtype, group["state_dtype"]))  # or say why it cannot
                continue
            given = None if loss is None else sent(loss, device, dtype)
            if given is not None and batch.mesh is not None:
                given = mean_over(batch.mesh, given)
            tensors = batch.tensors(group, group["together"] or together)
            backend = self._backends.agree(Case(batch.rule, device, dtype, group["state_dtype"]), batch.mesh)
            options = StepOptions(
                lr=sent(lr.reshape(()), device, dtype) if isinstance(lr, Tensor) else lr,
                weight_decay=group["weight_decay"],
                loss=given,
                skip=None if skip is None else sent(skip, device),
            )
            with without_autocast(device):
                with held(tensors, group["mask_zero_gradients"]):
                    step(backend, batch.rule, tensors, options)
                batch.keep(tensors)
