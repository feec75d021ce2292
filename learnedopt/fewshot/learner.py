"""What every few-shot method is: it is fitted to a support set, and what comes of that predicts queries."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learnedopt.fewshot.backbones import BackboneConfig
from learnedopt.fewshot.config import Config, check_choice, check_count
from learnedopt.fewshot.episodes import Episodes, check_labels, missing_classes
from learnedopt.fewshot.fast.micro_batches import fastest, mean_loss
from learnedopt.fewshot.normalization import NORMALIZATIONS, Normalization, batch_norms
from learnedopt.fewshot.sources import EpisodeList, TrainingSource


@dataclass(frozen=True)
class LearnerShape:
    """What a learner is made for."""

    example_shape: tuple[int, ...]
    ways: int | None
    """Classes in an episode; ``None`` for regression."""
    num_classes: int | None = None
    """Classes in meta-training, for methods that begin with telling all of them apart."""
    outputs: int = 1
    """Numbers to predict, in regression."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "example_shape", tuple(self.example_shape))
        if self.ways is not None and self.ways < 2:
            raise ValueError(f"ways must be at least 2, or None for regression, got {self.ways}")
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {self.outputs}")


@dataclass(frozen=True)
class LearnerConfig(Config):
    """Settings of a method; a method is one subclass of :class:`Learner` and one of this."""

    normalization: Normalization = "transductive"
    """Whose statistics batch normalization uses, see :mod:`learnedopt.fewshot.normalization`."""
    built_in: ClassVar[frozenset[str]] = frozenset()
    """Settings that decide what weights there are, and so cannot change afterwards."""
    episodes_at_once: int | None = None
    """How many episodes go through the network together. ``None``: one where the network is not a plain sequence of
    layers, since more need ``torch.func.vmap``, which some modules do not know. Otherwise the faster way, by
    measurement: all, but on the CPU, where a network has convolutions, as many as keep its largest array within 4
    million numbers, or one where all episodes share the weights."""

    def __post_init__(self) -> None:
        check_choice("normalization", self.normalization, NORMALIZATIONS)
        if self.episodes_at_once is not None:
            check_count(self, "episodes_at_once")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> Learner:
        """The learner itself, around a backbone that is its own."""
        raise NotImplementedError

    def build(
        self, backbone: BackboneConfig | nn.Module, shape: LearnerShape, generator: Generator | None = None
    ) -> Learner:
        """A fresh learner.

        Args:
            backbone: Settings of one; or any module from ``(n, *example)`` to ``(n, ...)``, of which the learner takes
                a copy, weights included.
            shape: What it is made for. Methods that compare features also take episodes of other ways.
            generator: Draws the initial weights; by default torch's own, as for torch's modules.

        Parameters of a module that do not require gradients are left as they are by inner loops too.

        Raises:
            TypeError: the backbone is neither.
            ValueError: the method cannot do this; or the backbone does not take such examples, or keeps state that a
                forward pass changes, other than the running averages of torch's batch normalization.

        >>> from learnedopt.fewshot.backbones import MLP
        >>> from learnedopt.fewshot.learners import ProtoNetConfig
        >>> learner = ProtoNetConfig().build(MLP(), LearnerShape((3,), ways=2))
        >>> x, y = torch.eye(4, 3), torch.tensor([0, 0, 1, 1])
        >>> learner.fit(x, y).predict(x).shape
        torch.Size([4, 2])
        """
        if not isinstance(backbone, BackboneConfig | nn.Module):
            raise TypeError(f"backbone must be a module, or settings such as Conv4(), got {backbone!r}")
        # Modules draw their weights from torch's global generator: for a moment it is made to continue this one.
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            module = copy.deepcopy(backbone) if isinstance(backbone, nn.Module) else backbone.build(shape.example_shape)
            learner = self.make(module, shape).train()
        learner.backbone = backbone if isinstance(backbone, BackboneConfig) else None
        return learner


class Part(Protocol):
    """Some episodes that a learner has been fitted to."""

    def predict(self, query_x: Tensor) -> Tensor:
        """``(E, q, *example)`` to ``(E, q, outputs)``."""


@dataclass(frozen=True, eq=False)
class Adapted:
    """What :meth:`Learner.fit` returns: a learner fitted to one support set, or to one for each of E episodes.

    It refers to the learner's weights. After an update of these, or another mode of the learner, fit again.
    """

    parts: Sequence[Part]
    sizes: Sequence[int]
    """How many episodes each part holds."""
    learner: Learner
    dtype: torch.dtype
    """Of the examples."""
    single: bool
    """Whether there was no axis of episodes."""

    def predict(self, query_x: Tensor) -> Tensor:
        """Logits ``(E, q, ways)``, or in regression the outputs ``(E, q, outputs)``; without E if there was none.

        In the learner's evaluation mode they keep no graph, unless ``query_x`` requires gradients.

        Args:
            query_x: ``(E, q, *example)``, or ``(q, *example)``.

        Raises:
            ValueError: the shape is not that, or number of episodes or type are not those of :meth:`Learner.fit`; or
                there is one query, to be normalized by its own statistics.
        """
        if self.single:
            query_x = query_x[None]
        shape = self.learner.shape.example_shape
        if tuple(query_x.shape[2:]) != shape or query_x.ndim != 2 + len(shape):
            raise ValueError(
                f"query_x must be {'' if self.single else '(episodes, '}queries, then examples of shape {shape}, got "
                f"{tuple(query_x.shape[1 if self.single else 0 :])}"
            )
        if len(query_x) != sum(self.sizes):
            raise ValueError(f"fitted to {sum(self.sizes)} episodes, and query_x holds {len(query_x)}")
        if query_x.shape[1] == 0:
            raise ValueError("query_x is empty")
        if query_x.dtype != self.dtype:
            raise ValueError(f"query_x is {query_x.dtype}, and the support set was {self.dtype}: convert one of them")
        pieces = zip(self.parts, query_x.split(list(self.sizes)))
        graph = torch.is_grad_enabled() and (self.learner.training or query_x.requires_grad)
        with torch.set_grad_enabled(graph):
            found = torch.cat([part.predict(x) for part, x in pieces])
        return found.squeeze(0) if self.single else found


class Learner(nn.Module, ABC):
    """A few-shot method with its meta-learned weights.

    In training mode what :meth:`fit` and :meth:`Adapted.predict` compute can be differentiated with respect to the
    weights, as far as the method does; in evaluation mode neither keeps a graph.

    A further method is a file with a subclass, its configuration, and a line in
    :data:`learnedopt.fewshot.learners.LEARNERS`. It defines :meth:`fit_part`, and where the loss of a training step is
    not the mean loss of the queries, :meth:`losses` or :meth:`training_step`.
    """

    config: LearnerConfig
    backbone: BackboneConfig | None = None
    """What its backbone was built from; ``None`` for a module."""
    progress: Tensor
    classification_only: ClassVar[bool] = False
    any_ways: bool = False
    """Whether episodes may have other ways than the learner was made for."""
    shares_weights: ClassVar[bool] = False
    """Whether no weights become an episode's own."""

    def __init__(self, config: LearnerConfig, shape: LearnerShape) -> None:
        super().__init__()
        if self.classification_only and shape.ways is None:
            raise ValueError(f"{config.kind} compares examples of classes and cannot do regression (ways=None)")
        self.config = config
        self.shape = shape
        self.register_buffer("progress", torch.zeros(()))

    @property
    def transductive(self) -> bool:
        """Whether in evaluation mode the prediction of a query may depend on the other queries.

        That is so with ``normalization="transductive"``, if the network has batch normalization at all. In training
        mode it may be so with ``"running"`` too.
        """
        return self.config.normalization == "transductive" and bool(batch_norms(self))

    def with_config(self, **changes: Any) -> Self:
        """This learner under other settings, with the same weights and not a copy of them.

        For settings that can change without training anew: ``normalization``, inner steps and rates of evaluation. Both
        have the same modules inside: call ``train`` or ``eval`` before, or of both.

        Raises:
            ValueError: a setting decides what weights there are; or running averages are wanted, and this learner was
                built without any.
        """
        own = self.config
        built_in = sorted(name for name in own.built_in & changes.keys() if changes[name] != getattr(own, name))
        if built_in:
            raise ValueError(
                f"{', '.join(built_in)} of a {own.kind} cannot change once it is built: build another one with it"
            )
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **changes)
        if other.config.normalization == "running" and any(
            norm.running_mean is None for norm in batch_norms(self).values()
        ):
            raise ValueError("this learner keeps no running averages: build it with normalization='running'")
        return other

    def set_progress(self, fraction: float) -> None:
        """Say how much of meta-training is done, from 0 to 1: schedules depend on it. It is part of the state."""
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"progress is a fraction from 0 to 1, got {fraction}")
        self.progress.fill_(fraction)

    def choose_settings(self, episodes: Episodes | EpisodeList) -> dict[str, Any]:
        """Choose what the method leaves to validation; called once, after training.

        Args:
            episodes: Of the validation classes.

        Returns:
            The settings changed, and their new values; for most methods none.
        """
        return {}

    def fit(self, support_x: Tensor, support_y: Tensor, ways: int | None = None) -> Adapted:
        """Fit to a support set. The learner itself does not change.

        Args:
            support_x: ``(n, *example)``, or ``(E, n, *example)`` for E episodes at once.
            support_y: Labels, int64 in [0, ways), or targets ``(n, outputs)``; with E in front if ``support_x`` has.
            ways: Number of classes; by default what the learner was made for or, if it takes any, one more than the
                largest label.

        Raises:
            ValueError: shapes, labels or ways do not fit.
        """
        if torch.is_inference_mode_enabled():
            # Inner loops need gradients, which inference mode cannot give back.
            with torch.inference_mode(False), torch.no_grad():
                return self.fit(support_x.clone(), support_y.clone(), ways)
        shape = self.shape.example_shape
        single = support_x.ndim == len(shape) + 1
        if single:
            support_x, support_y = support_x[None], support_y[None]
        if support_x.ndim != len(shape) + 2 or tuple(support_x.shape[2:]) != shape:
            raise ValueError(
                f"support_x must be (n, *example) or (episodes, n, *example) with examples of shape {shape}, got "
                f"{tuple(support_x.shape[int(single) :])}"
            )
        if support_y.shape[:2] != support_x.shape[:2]:
            raise ValueError(
                f"support_x has shape {tuple(support_x.shape)} and support_y {tuple(support_y.shape)}: they must agree "
                "in episodes and examples"
            )
        if support_x.shape[0] == 0 or support_x.shape[1] == 0:
            raise ValueError(f"support_x holds no {'examples' if len(support_x) else 'episodes'}")
        _check_dtype(self, "support_x", support_x)
        ways = _check_targets(self, support_y, ways)
        # Queries are not known yet: 15 of each class, as is usual.
        size = self._at_once(len(support_x), support_x.shape[1] + 15 * (ways or 0), support_x.device)
        parts = list(zip(support_x.split(size), support_y.split(size)))
        found = [self.fit_part(x, y, ways) for x, y in parts]
        return Adapted(found, [len(x) for x, _ in parts], self, support_x.dtype, single)

    def meta_loss(self, episodes: Episodes) -> Tensor:
        """What meta-training minimizes, averaged over the episodes: a scalar to call ``backward`` on.

        Most methods: the loss of the queries after fitting to the support; cross-entropy, or the mean squared error.
        Where episodes are taken in several parts, the gradient of each is computed at once and its graph let go, so
        that memory does not grow with their number; the result can then be differentiated once, not twice. In training
        mode, running averages of batch normalization move, if the method has any; in evaluation mode what an inner loop
        arrives at is a constant, so that no gradient reaches what it began with.

        Raises:
            ValueError: the episodes are not what the learner was made for.
        """
        if episodes.example_shape != self.shape.example_shape:
            raise ValueError(
                f"made for examples of shape {self.shape.example_shape}, and the episodes have examples of shape "
                f"{episodes.example_shape}"
            )
        _check_targets(self, episodes.support_y, episodes.ways)
        for name in ("support_x", "query_x"):
            _check_dtype(self, name, getattr(episodes, name))
        images = episodes.support_x.shape[1] + episodes.query_x.shape[1]
        size = self._at_once(len(episodes), images, episodes.support_x.device)
        if len(episodes) <= size:
            return self.losses(episodes).mean()
        losses = (self.losses(part) for part in episodes.batches(size))
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        if not weights or not torch.is_grad_enabled() or any(x.requires_grad for x in episodes.tensors):
            return torch.cat(list(losses)).mean()
        return mean_loss(losses, weights, len(episodes))

    def training_step(self, source: TrainingSource, generator: Generator) -> Tensor:
        """The loss of one step of meta-training; the caller calls ``backward`` and the outer optimizer.

        Args:
            source: What to draw from.
            generator: Draws.
        """
        return self.meta_loss(self.following(source.episodes(generator)))

    def following(self, episodes: Episodes) -> Episodes:
        """The episodes where the weights are, and of their type."""
        weight = next(self.parameters(), None)
        return episodes if weight is None else episodes.to(weight.device, weight.dtype)

    @abstractmethod
    def fit_part(self, support_x: Tensor, support_y: Tensor, ways: int | None) -> Part:
        """:meth:`fit` for as many episodes as go through the network together, with arguments that were checked."""

    def losses(self, episodes: Episodes) -> Tensor:
        """:meth:`meta_loss` of each of as many episodes as go through the network together, ``(E,)``."""
        adapted = self.fit_part(episodes.support_x, episodes.support_y, episodes.ways)
        return episode_losses(adapted.predict(episodes.query_x), episodes.query_y)

    def _at_once(self, episodes: int, images: int, device: torch.device) -> int:
        """How many episodes of so many images go through the network together."""
        size = self.config.episodes_at_once
        return size or fastest(self, self.shape.example_shape, images, self.shares_weights, device) or episodes


def _check_dtype(learner: Learner, name: str, x: Tensor) -> None:
    """Refuse examples that the network would not take, or would take for something else."""
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}, and examples must be floating: convert (images with .float() / 255)")
    weight = next(learner.parameters(), x)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} is {x.dtype}, and the learner's weights are {weight.dtype}: convert one of them")


def _check_targets(learner: Learner, targets: Tensor, ways: int | None) -> int | None:
    """Refuse labels or targets that do not fit the problem; returns the ways."""
    shape = learner.shape
    if shape.ways is None:
        if ways is not None or not targets.is_floating_point() or targets.ndim != 3:
            raise ValueError(
                f"this learner was made for regression: targets must be floating, (n, {shape.outputs}) for each "
                f"episode, and ways None; got {targets.dtype} {tuple(targets.shape)} and ways={ways}"
            )
        if targets.shape[2] != shape.outputs:
            raise ValueError(f"made for {shape.outputs} output(s), and the targets have {targets.shape[2]}")
        return None
    if ways is None:
        ways = int(targets.max()) + 1 if learner.any_ways and targets.numel() else shape.ways
    if ways != shape.ways and not learner.any_ways:
        raise ValueError(
            f"this {learner.config.kind} was made for {shape.ways} ways, and the episodes have {ways}: build it with "
            f"ways={ways}"
        )
    check_labels("support", targets, ways)
    if missing := missing_classes(targets, ways):
        raise ValueError(
            f"of {ways} classes, {missing} have no support example in some episode: every class needs at least one"
        )
    return ways


def episode_losses(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each episode, ``(E,)``: cross-entropy with labels ``(E, n)``, else the mean squared error.

    Args:
        predictions: ``(E, n, outputs)``.
        targets: ``(E, n)`` int64, or as ``predictions``.
    """
    if targets.is_floating_point():
        return (predictions - targets).square().flatten(1).mean(1)
    losses = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)
