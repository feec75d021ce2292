"""What is compared in the optimizer benchmark: hand-written optimizers, learned rules, and classes of one's own."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from learnedopt.evaluation.muon import StackedMuon
from learnedopt.optim import LearnedOptimizer
from learnedopt.rules import UpdateRule
from learnedopt.tasks.base import Params
from learnedopt.zoo import ZooError, load_rule, rule_fingerprint

Layout = Literal["elementwise", "copies", "stacked"]


@dataclass(frozen=True, order=True)
class Setting:
    """What is tuned."""

    lr: float
    weight_decay: float | None = None
    """``None`` where the optimizer has none, or none is given to it."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with its default setting, the grid it is tuned over, and how copies may be run together."""

    name: str
    identity: str
    """What its results are kept under: other weights or another class have another identity."""
    default: Setting
    rates: tuple[float, ...]
    """Learning rates to tune over; for a learned rule, multipliers of its update."""
    make: Callable[..., Optimizer] = field(repr=False)
    """From parameters and a :class:`Setting`; for ``"stacked"`` from named tensors and a sequence of settings."""
    layout: Layout
    """``"elementwise"``: what a coordinate does depends on itself alone, so one optimizer may hold all copies of a
    setting as one vector. ``"copies"``: an optimizer for each copy. ``"stacked"``: one for all copies of all settings,
    made for that."""
    decays: tuple[float, ...] = ()
    """Weight decays to tune over besides that of ``default``."""
    schedule: Callable[[int, int], float] | None = field(default=None, repr=False)
    """The factor on the learning rate at a step of so many."""
    averages: bool = False
    """Whether parameters must be asked for by ``eval()`` before they are judged, and ``train()`` after."""
    learned: bool = False

    @property
    def anytime(self) -> bool:
        """Whether it does not know how long it will run, so that a long run contains the shorter ones."""
        return self.schedule is None


def rates(start: float, count: int = 15, per_decade: int = 4) -> tuple[float, ...]:
    """``count`` learning rates from ``10**start`` upwards.

    >>> rates(-4)[:5]
    (0.0001, 0.000178, 0.000316, 0.000562, 0.001)
    """
    return tuple(float(f"{10 ** (start + i / per_decade):.3g}") for i in range(count))


MULTIPLIERS: tuple[float, ...] = tuple(float(f"{2 ** (i / 2):.3g}") for i in range(-7, 8))
"""Of a learned rule's update: fifteen by factors of the square root of two, from 0.09 to 11."""


def warmup_cosine(step: int, steps: int, warmup: float = 0.05) -> float:
    """Linear over the first twentieth of the steps, then half a cosine down to zero.

    >>> [round(warmup_cosine(step, 100), 3) for step in (0, 4, 5, 52, 99)]
    [0.2, 1.0, 1.0, 0.508, 0.0]
    """
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def _torch(optimizer: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def make(params: Iterable[Tensor], setting: Setting) -> Optimizer:
        decay = {} if setting.weight_decay is None else {"weight_decay": setting.weight_decay}
        return optimizer(params, lr=setting.lr, **decay)

    return make


def _schedule_free() -> Contender:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise ImportError("schedule-free needs the package schedulefree: pip install 'learnedopt[bench]'") from error
    return Contender(
        "schedule-free",
        "schedule-free",
        Setting(0.0025, 0.0),
        rates(-4),
        _torch(AdamWScheduleFree),
        "elementwise",
        decays=(0.01, 0.1),
        averages=True,
    )


def _baseline(name: str, default: Setting, start: float, optimizer: Callable[..., Optimizer], **more: Any) -> Contender:
    return Contender(name, name, default, rates(start), _torch(optimizer), "elementwise", **more)


HAND_WRITTEN: dict[str, Callable[[], Contender]] = {
    "sgd": lambda: _baseline("sgd", Setting(0.01), -3, partial(torch.optim.SGD, momentum=0.9, fused=True)),
    "adam": lambda: _baseline("adam", Setting(0.001), -4, partial(torch.optim.Adam, fused=True)),
    "adamw-cosine": lambda: _baseline(
        "adamw-cosine",
        Setting(0.001, 0.01),
        -4,
        partial(torch.optim.AdamW, fused=True),
        decays=(0.0, 0.1),
        schedule=warmup_cosine,
    ),
    "adamw": lambda: _baseline(
        "adamw", Setting(0.001, 0.01), -4, partial(torch.optim.AdamW, fused=True), decays=(0.0, 0.1)
    ),
    "rmsprop": lambda: _baseline("rmsprop", Setting(0.01), -5, torch.optim.RMSprop),
    "nadam": lambda: _baseline("nadam", Setting(0.002), -4, torch.optim.NAdam),
    "muon": lambda: Contender(
        "muon", "muon", Setting(0.001, 0.1), rates(-4), StackedMuon, "stacked", decays=(0.0, 0.01)
    ),
    "schedule-free": _schedule_free,
}
"""Every hand-written optimizer by name, made when it is asked for. Defaults are those of its authors or of torch; SGD
has momentum 0.9 and, torch naming no default that is meant as advice, 0.01. ``adamw-cosine`` warms up over a twentieth
of the steps. ``muon`` is :class:`~learnedopt.evaluation.muon.StackedMuon`."""

BASELINE_NAMES = ("sgd", "adam", "adamw-cosine", "rmsprop", "nadam", "muon", "schedule-free")
"""Those that a benchmark compares with unless told otherwise."""


def learned(name: str, rule: UpdateRule) -> Contender:
    """A learned rule: untuned with ``lr=1``, tuned over :data:`MULTIPLIERS`.

    >>> from learnedopt.rules import AdamLSTMRule
    >>> learned("mine", AdamLSTMRule()).layout
    'copies'
    """

    def make(params: Iterable[Tensor], setting: Setting) -> Optimizer:
        return LearnedOptimizer(params, rule=rule, lr=setting.lr)

    # A rule may read the loss, or count the tensors that it trains.
    return Contender(name, rule_fingerprint(rule)[:16], Setting(1.0), MULTIPLIERS, make, "copies", learned=True)


def from_class(name: str) -> Contender:
    """The optimizer class ``module:Class``, constructed with parameters alone, or with those and ``lr``.

    Its default is the ``lr`` that it has without being given one, and it is tuned over fifteen quarters of a decade
    around that.

    Raises:
        ValueError: there is no such class, it cannot be constructed from parameters alone, or it cannot take a step
            after ``backward``.
    """
    module, _, attribute = name.partition(":")
    try:
        optimizer = getattr(importlib.import_module(module), attribute)
        param = torch.zeros(2, 2, requires_grad=True)
        made = optimizer([param])
        lr = float(made.defaults["lr"])
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{name!r} is not an optimizer that can be made from parameters alone and has a default lr: {error}"
        ) from error
    param.grad = torch.ones(2, 2)
    try:
        made.step()
    except Exception as error:
        raise ValueError(f"{name!r} cannot take a step as the benchmark does, after backward: {error}") from error
    center = math.log10(lr) if lr > 0 else -3.0
    grid = tuple(float(f"{10 ** (center + i / 4):.3g}") for i in range(-7, 8))
    learned = isinstance(optimizer, type) and issubclass(optimizer, LearnedOptimizer)
    return Contender(name, name, Setting(lr), grid, _torch(optimizer), "copies", learned=learned)


def find_contender(name: str) -> Contender:
    """A hand-written optimizer by name, ``module:Class``, or a rule by its name in the zoo or its folder.

    Raises:
        ValueError: there is none of that name.
        ImportError: it needs a package that is not installed.

    >>> find_contender("adam").default
    Setting(lr=0.001, weight_decay=None)
    """
    if name in HAND_WRITTEN:
        return HAND_WRITTEN[name]()
    if ":" in name:
        return from_class(name)
    try:
        return learned(name.rstrip("/"), load_rule(name))
    except ZooError as error:
        raise ValueError(f"{name!r} is no optimizer: not one of {', '.join(HAND_WRITTEN)}, and {error}") from error


class Fleet:
    """The optimizers of all copies of all settings, over one array of parameters ``(settings, copies, n)``.

    Args:
        contender: What they are.
        settings: One for each slice of ``theta``.
        theta: The parameters, which :meth:`step` changes in place.
        params: Their names and shapes: one array per name, ``(copies, *shape)``.
    """

    def __init__(self, contender: Contender, settings: Sequence[Setting], theta: Tensor, params: Params) -> None:
        self._contender, self._settings = contender, settings
        self._names, self._shapes = list(params), [value.shape[1:] for value in params.values()]
        self._sizes = [shape.numel() for shape in self._shapes]
        self._leaves: list[Tensor] = []
        if contender.layout == "stacked":
            self._leaves = self._named(theta)
            self.optimizers = [contender.make(dict(zip(self._names, self._leaves)), settings)]
            return
        self.optimizers = []
        for place, setting in enumerate(settings):
            own = list(self._of_setting(theta, place))
            self._leaves += own
            groups = [own]
            if contender.layout == "copies":
                groups = [own[i : i + len(self._sizes)] for i in range(0, len(own), len(self._sizes))]
            self.optimizers += [contender.make(group, setting) for group in groups]

    def train(self) -> None:
        """Before gradients are taken."""
        if self._contender.averages:
            for optimizer in self.optimizers:
                optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Before parameters are judged."""
        if self._contender.averages:
            for optimizer in self.optimizers:
                optimizer.eval()  # type: ignore[attr-defined]

    def step(self, grad: Tensor, losses: Tensor, step: int, steps: int) -> None:
        """One step of every optimizer, given gradients ``(settings, copies, n)`` and losses ``(settings, copies)``."""
        contender = self._contender
        if contender.layout == "stacked":
            grads: Iterable[Tensor] = self._named(grad)
        else:
            grads = (part for place in range(len(self._settings)) for part in self._of_setting(grad, place))
        for leaf, part in zip(self._leaves, grads):
            leaf.grad = part
        if contender.schedule is not None:
            factor = contender.schedule(step, steps)
            for optimizer, setting in zip(self.optimizers, self._settings):
                for group in optimizer.param_groups:
                    group["lr"] = setting.lr * factor
        if contender.layout == "copies":
            for optimizer, loss in zip(self.optimizers, losses.flatten()):
                if isinstance(optimizer, LearnedOptimizer):
                    optimizer.observe(loss)
        for optimizer in self.optimizers:
            optimizer.step()

    def _of_setting(self, array: Tensor, place: int) -> Iterator[Tensor]:
        """What the optimizers of one setting hold, out of ``(settings, copies, n)``; views."""
        if self._contender.layout == "elementwise":
            yield array[place]
            return
        for copy in array[place]:
            for part, shape in zip(copy.split(self._sizes), self._shapes):
                yield part.view(shape)

    def _named(self, array: Tensor) -> list[Tensor]:
        """One view ``(settings, copies, *shape)`` per name."""
        return [
            part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for part, shape in zip(array.split(self._sizes, dim=-1), self._shapes)
        ]
