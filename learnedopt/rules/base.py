"""What every update rule is: a pure function from gradients and state to updates and new state.

Arrays are *flat* and *coordinates last*: the coordinates of all parameters a rule serves lie side by side along the
last axis, whatever tensors they came from, so one matrix product per layer serves them all and the elementwise maths
runs over contiguous memory. What a rule needs to know about whole tensors reaches it through :class:`Segments`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from learnedopt.rules.coordinates import Coordinates

State = dict[str, Tensor]
"""A rule's memory by name: ``(*shape, N)`` per coordinate, ``(*shape, S)`` per tensor."""

Advance = Callable[..., tuple[Tensor, State]]
"""Called as :meth:`UpdateRule.advance`."""


@dataclass(frozen=True)
class StateSpec:
    """Shape of one state entry, without its last axis.

    ``scope`` says what the last axis counts: ``"coordinate"`` (N of them) or ``"tensor"`` (S of them).
    """

    shape: tuple[int, ...] = ()
    scope: Literal["coordinate", "tensor"] = "coordinate"
    accumulates: bool = False
    """Whether each step adds to the entry, as to the cells of an LSTM, instead of making it anew. Where it is kept in
    few bits, its rounding errors add up, and it is given more of them."""
    turns_as: Literal["column", "direction", "square"] = "column"
    """What becomes of the entry when the basis turns in which its tensor is written. ``"direction"``: it is one in the
    space of the parameters, such as a momentum, and is written in the new basis. ``"square"``: it is a mean of squares,
    and new coordinates have those of their parts. ``"column"``: it stays with the column of its coordinate."""
    within: tuple[str, float] | None = None
    """Another entry, a mean of squares, and how many times its root this one can be. When the basis turns it is cut to
    that: the two turn differently, so that it may come to where there is little of the other."""
    starts_at: Literal["zero", "param"] = "zero"
    """``"param"``: the entry is a point in the space of the parameters, and starts as a copy of them. It is always in
    their own coordinates, and only :meth:`UpdateRule.statistics` reads it."""


class Segments:
    """Which tensor each flat coordinate belongs to.

    ``sizes`` are the numbers of coordinates of the tensors, in order; the whole sequence is repeated ``copies``
    times (meta-training puts ``copies`` tasks of one architecture side by side). There are
    ``S = copies * len(sizes)`` segments and ``N = copies * sum(sizes)`` coordinates. ``shapes`` are those of the
    tensors, vectors where they are not given.

    >>> segments = Segments([2, 1])
    >>> segments.mean(torch.tensor([1.0, 3.0, 5.0]))
    tensor([2., 5.])
    >>> segments.expand(torch.tensor([2.0, 5.0]))
    tensor([2., 2., 5.])
    """

    def __init__(self, sizes: Sequence[int], copies: int = 1, shapes: Sequence[Sequence[int]] | None = None) -> None:
        self.sizes = tuple(sizes)
        self.shapes = tuple((size,) for size in sizes) if shapes is None else tuple(tuple(shape) for shape in shapes)
        self.counts = self.sizes  # what a mean divides by; larger where this is but a shard of the tensors
        # How many tensors, of those that are not empty, are trained together; more where these are some of them.
        self.together = sum(size > 0 for size in self.sizes)
        self.copies = copies
        if copies < 1 or any(size < 0 for size in self.sizes):
            raise ValueError(f"copies must be at least 1 and no size negative, got {copies} and {self.sizes}")
        if tuple(math.prod(shape) for shape in self.shapes) != self.sizes:
            raise ValueError(f"shapes must be those of tensors of the sizes {self.sizes}, got {self.shapes}")
        self.num_coordinates = copies * sum(self.sizes)
        self.num_segments = copies * len(self.sizes)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each tensor: ``(..., N) -> (..., S)``."""
        parts = x.unflatten(-1, (self.copies, sum(self.sizes))).split(self.sizes, dim=-1)
        return torch.stack([part.sum(-1) for part in parts], dim=-1).flatten(-2)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over each tensor: ``(..., N) -> (..., S)``; zero for an empty tensor."""
        # Filled on the device: a list would be copied to it, and the host would wait for that.
        counts = torch.cat([x.new_full((1,), max(count, 1)) for count in self.counts])
        return self.sum(x) / counts.repeat(self.copies)

    def expand(self, y: Tensor) -> Tensor:
        """Give each coordinate its tensor's value: ``(..., S) -> (..., N)``."""
        columns = y.unflatten(-1, (self.copies, len(self.sizes))).unbind(-1)
        parts = [column.unsqueeze(-1).expand(*column.shape, size) for column, size in zip(columns, self.sizes)]
        return torch.cat(parts, dim=-1).flatten(-2)


_KINDS: dict[str, type[RuleConfig]] = {}
"""By which the parts of a configuration are read."""


@dataclass(frozen=True)
class RuleConfig:
    """Everything but the weights that is needed to rebuild a rule. ``kind`` is its name in the registry.

    A setting may be a configuration itself, of a rule that this one wraps or of a part of it.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:
            _KINDS[cls.kind] = cls

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types, ``kind`` included, also those of what it is composed of."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"kind": self.kind} | {
            name: value.to_dict() if isinstance(value, RuleConfig) else value for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild from :meth:`to_dict`'s output, with lists back to tuples.

        Raises:
            ValueError: ``kind`` is another rule's, or a key is unknown.
        """
        values = dict(values)
        kind = values.pop("kind", cls.kind)
        if kind != cls.kind:
            raise ValueError(f"this configuration is for rule kind {kind!r}, not {cls.kind!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown setting(s) {unknown} for rule kind {cls.kind!r}; known: {sorted(known)}")
        for field in dataclasses.fields(cls):
            if field.name in values:
                check_type(field.name, values[field.name], field.default)
        return cls(**{key: _read(value) for key, value in values.items()})


def check_type(name: str, value: Any, default: Any) -> None:
    """Raise ``ValueError`` where a setting as JSON has it is of another type than its default.

    >>> check_type("hidden_size", "8", 20)
    Traceback (most recent call last):
    ValueError: 'hidden_size' must be of the type int, got '8'
    """
    for wanted in (bool, int, float, str):
        if isinstance(default, wanted):
            allowed = (int, float) if wanted is float else wanted
            if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(f"{name!r} must be of the type {wanted.__name__}, got {value!r}")
            return


def _read(value: Any) -> Any:
    """A setting as a configuration has it: parts by their kind, lists as tuples."""
    if isinstance(value, Mapping):
        kind = value.get("kind")
        if kind not in _KINDS:
            raise ValueError(f"unknown kind {kind!r} of a part of a rule; known: {sorted(_KINDS)}")
        return _KINDS[kind].from_dict(value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


class UpdateRule(nn.Module):
    """A learned update: gradients in, parameter changes out; its ``nn.Parameter``s are the meta-parameters.

    One step of optimization is two pure calls. :meth:`statistics` looks at whole tensors and gives a few numbers
    per tensor; :meth:`forward` works on each coordinate by itself given those numbers, so it may be called on any
    block of coordinates. :meth:`update` is both, for callers who hold everything at once.

    Beyond that a rule sees of where coordinates came from at most how many dimensions the tensor has: permuting the
    coordinates of a tensor permutes its updates, and the order of the tensors does not matter. A rule that wraps
    another may however run it in coordinates of its own (:attr:`coordinates`).

    Subclasses set ``config_class`` and define :meth:`state_spec` and :meth:`forward`, and :meth:`statistics` if
    they use any.
    """

    config_class: ClassVar[type[RuleConfig]]
    needs_loss: bool = False
    """Whether :meth:`statistics` reads the training loss."""
    zero_gradient_is_noop: bool = False
    """Whether a parameter whose gradients have all been zero is left exactly where it is."""
    counts_tensors: bool = False
    """Whether what it does depends on how many tensors are trained together."""
    reads_param: bool = True
    """Whether :meth:`forward` reads the parameters. In bases, one that does not is given zeros."""

    config: RuleConfig
    coordinates: Coordinates | None = None
    """Coordinates of its own for matrices; ``None`` for a rule that works on parameters as they are."""

    def __init__(self, config: RuleConfig) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} is configured by {self.config_class.__name__}, got {type(config).__name__}"
            )
        self.config = config

    def state_spec(self) -> dict[str, StateSpec]:
        """The entries of this rule's state and their shapes."""
        raise NotImplementedError

    def init_state(
        self,
        segments: Segments,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        *,
        param: Tensor | None = None,
    ) -> State:
        """The state before the first step, for the coordinates of ``segments``.

        Args:
            param: Flat parameters, ``(N,)``; only for rules with entries that start at them.

        Raises:
            ValueError: the rule has such entries, and ``param`` is missing.
        """
        count = {"coordinate": segments.num_coordinates, "tensor": segments.num_segments}
        state: State = {}
        for name, spec in self.state_spec().items():
            if spec.starts_at == "zero":
                state[name] = torch.zeros(*spec.shape, count[spec.scope], dtype=dtype, device=device)
            elif param is not None:
                state[name] = param.to(device, dtype, copy=True)
            else:
                raise ValueError(f"the state {name!r} of {type(self).__name__} starts at the parameters: give param=")
        if self.coordinates is not None:
            own: dict[str, list[Tensor]] = {}
            for shape in segments.shapes:
                for name, value in self.coordinates.initial(shape, dtype, device).items():
                    own.setdefault(name, []).append(value.flatten())
            # Those of all tensors side by side, once for each copy.
            state |= {name: torch.cat(values).repeat(segments.copies) for name, values in own.items()}
        return state

    def statistics(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own_grad: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What the rule needs to know about whole tensors.

        Args:
            param, grad: Flat parameters and gradients, ``(N,)``.
            state: The state before this step.
            segments: Which tensor each coordinate belongs to.
            loss: The training loss, ``(copies,)`` or scalar; only for rules with ``needs_loss``.
            own_grad: The gradients in the coordinates of ``param``, where ``grad`` and what the state has of them are
                in bases. Norms and inner products are the same in both, up to rounding.

        Returns:
            ``(K, S)`` numbers, K the same at every step (zero here), and the new values of the tensor-scope state.
        """
        return grad.new_empty(0, segments.num_segments), {}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        """The update of each coordinate, independent of every other coordinate.

        Args:
            param, grad: Flat parameters and gradients, ``(n,)``, any block of the N coordinates.
            state: The coordinate-scope state of that block, ``(*shape, n)``; other entries are ignored.
            statistics: ``(K, n)``, or ``(K, 1)`` where the block lies within one tensor.

        Returns:
            The change to add to the parameters, ``(n,)``, and the new coordinate-scope state.
        """
        raise NotImplementedError

    def with_lr(self, statistics: Tensor, state: State, lr: float | Tensor) -> tuple[Tensor, State]:
        """The statistics at another ``lr`` than 1, for rules to which it is more than a multiplier of the update.

        The update is multiplied by it in any case.

        Args:
            statistics: What :meth:`statistics` gave.
            state: Of tensors, before this step.
            lr: A number, or a 0-d tensor, which the host does not read.

        Returns:
            The statistics, and new values of tensor-scope state in addition to those of :meth:`statistics`.
        """
        return statistics, {}

    def average(self, param: Tensor, state: State) -> Tensor:
        """What to evaluate and keep in place of the parameters, ``(n,)``: themselves, unless the rule averages them.

        Args:
            param: ``(n,)``, any coordinates of one tensor.
            state: That tensor's numbers, ``()``, and those coordinates', ``(n,)``.
        """
        return param

    def advance(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """:meth:`statistics`, then :meth:`forward` on every coordinate.

        Args:
            own: Where the rest is in bases, parameters and gradients as they are.
        """
        if own is None:
            statistics, tensor_state = self.statistics(param, grad, state, segments, loss)
        else:
            statistics, tensor_state = self.statistics(own[0], grad, state, segments, loss, own[1])
        delta, coordinate_state = self(param, grad, state, segments.expand(statistics))
        return delta, {**tensor_state, **coordinate_state}

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: State,
        segments: Segments,
        loss: Tensor | None = None,
        *,
        advance: Advance | None = None,
    ) -> tuple[Tensor, State]:
        """One whole step: the update of each coordinate, ``(N,)``, and the new state.

        Args:
            advance: Runs in place of :meth:`advance`, for callers whose copies have weights of their own.
        """
        delta, after = (advance or self.advance)(param, grad, state, segments, loss)
        return delta, {**state, **after}

    def state_bytes_per_parameter(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of coordinate-scope state each parameter costs its user."""
        return dtype.itemsize * sum(
            math.prod(spec.shape) for spec in self.state_spec().values() if spec.scope == "coordinate"
        )


RULES: dict[str, type[UpdateRule]] = {}
"""The kinds of rules there are; :mod:`learnedopt.rules` fills it."""


def build_rule(config: RuleConfig | Mapping[str, Any]) -> UpdateRule:
    """A rule with fresh weights, from its configuration or the dictionary that describes one.

    Raises:
        ValueError: the kind is not registered, or a setting is unknown or out of range.

    >>> from learnedopt.rules import LSTMRule
    >>> build_rule({"kind": "lstm", "hidden_size": 8}).config.hidden_size
    8
    """
    kind = config.kind if isinstance(config, RuleConfig) else config.get("kind")
    if kind not in RULES:
        raise ValueError(f"unknown rule kind {kind!r}; known kinds: {sorted(RULES)}")
    rule_class = RULES[kind]
    return rule_class(config if isinstance(config, RuleConfig) else rule_class.config_class.from_dict(config))
