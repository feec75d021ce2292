"""Methods that adapt parameters to the support set by gradient steps: what their inner loops share."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from learnedopt.fewshot.checks import check_gradients, check_stateless, feature_size
from learnedopt.fewshot.config import check_choice, check_count
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.fast.vectorized import apply
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape, Part, episode_losses
from learnedopt.fewshot.network import Network, tied_names
from learnedopt.fewshot.normalization import EpisodicBatchNorm, Statistics, batch_norms, episodic

Params = dict[str, Tensor]
"""Adapted parameters by name, each ``(E, *shape)``."""
Record = Callable[[int, Statistics], None]
"""Called with the number of updates so far and the statistics that batch normalization used there."""


@dataclass(frozen=True)
class InnerLoopConfig(LearnerConfig):
    """Settings of methods that adapt a network by ``steps`` updates.

    In the inner loop batch normalization uses the statistics of the support set, unless ``normalization`` is
    ``"running"`` and training is over; queries get theirs as ``normalization`` says.
    """

    built_in: ClassVar[frozenset[str]] = frozenset({"adapted", "readout"})
    adapted: Literal["all", "all_but_norm", "head"] = "all"
    """Which parameters are adapted: all; all but those of batch normalization, as in MAML's code; the read-out only.
    The others are meta-learned and shared by all episodes."""
    readout: Literal["per_class", "shared"] = "per_class"
    """What the read-out begins with: a row of weights for each class, as published; or one row that all classes share.
    With that the order of classes makes no difference, and episodes may have any number of ways, also others in tests
    than in training (Ye & Chao, "How to train your MAML to excel in few-shot classification", ICLR 2022,
    arXiv:2106.16245)."""
    steps: int = 1
    """Updates in training."""
    test_steps: int | None = None
    """Updates in evaluation; by default as many as in training."""
    inner_loss: Literal["mean", "sum_over_classes"] = "mean"
    """What the inner loop minimizes: the mean over the support set, or ``ways`` times that, the sum over classes of the
    means over shots. MAML's code has the latter: there a rate of 0.4 on five ways is 2.0 for the mean. In regression
    both are the mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("adapted", self.adapted, ("all", "all_but_norm", "head"))
        check_choice("readout", self.readout, ("per_class", "shared"))
        check_choice("inner_loss", self.inner_loss, ("mean", "sum_over_classes"))
        check_count(self, "steps", *(["test_steps"] if self.test_steps is not None else []))


@dataclass(frozen=True, eq=False)
class Support:
    """What the inner loop computes its loss on."""

    module: nn.Module
    """The network, or the part of it that is adapted."""
    prefix: str
    """Of the parameters' names, where it is a part."""
    x: Tensor
    """Its inputs."""


@dataclass(frozen=True, eq=False)
class AdaptedNetwork(Part):
    """The parameters that an inner loop has arrived at."""

    learner: InnerLoopLearner
    params: Params
    updates: int
    """How many led here."""
    support_x: Tensor

    def predict(self, query_x: Tensor) -> Tensor:
        if self.learner.normalizes_queries_together:
            ways = 1 if self.learner.shape.ways is None else self.params["head.weight"].shape[1]
            _check_number(query_x.shape[1], ways)
        return self.learner.query(self.params, self.updates, self.support_x, query_x)


class InnerLoopLearner(Learner):
    """A network whose parameters are adapted.

    A method defines :meth:`trajectory`, and may override :meth:`initial` and :meth:`losses`.

    Args:
        config: Settings.
        backbone: Becomes part of the learner.
        shape: What the learner is made for.
        track: Whether batch normalization keeps running averages; by default if ``normalization`` is ``"running"``.
        outputs: Of the read-out; by default the shape's ways or outputs.
    """

    config: InnerLoopConfig

    def __init__(
        self,
        config: InnerLoopConfig,
        backbone: nn.Module,
        shape: LearnerShape,
        track: bool | None = None,
        outputs: int | None = None,
    ) -> None:
        super().__init__(config, shape)
        if config.readout == "shared":
            if shape.ways is None:
                raise ValueError("in regression there are no classes to share a read-out: take readout='per_class'")
            outputs, self.any_ways = 1, True
        features = feature_size(backbone, shape.example_shape)
        track = config.normalization == "running" if track is None else track
        head = nn.Linear(features, outputs or shape.ways or shape.outputs)
        self.model = Network(episodic(backbone, track), head.to(next(backbone.parameters(), head.weight)))
        check_stateless(self.model.backbone, shape.example_shape)
        self.norms = batch_norms(self.model)
        norms = {f"{norm}.{name}" for norm in self.norms for name in ("weight", "bias")}
        names = [name for name, value in self.model.named_parameters() if value.requires_grad]
        self.tied = tied_names(self.model)
        if config.adapted == "all_but_norm":
            names = [name for name in names if name not in norms]
        elif config.adapted == "head":
            names = ["head.weight", "head.bias"]
        self.adapted_names = names
        own = {name.removeprefix("backbone.") for name in names if name.startswith("backbone.")}
        check_gradients(self.model.backbone, shape.example_shape, own)

    @abstractmethod
    def trajectory(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Iterator[Params]:
        """The parameters after each update on the support set ``(E, n, *example)``."""

    @property
    def differentiable(self) -> bool:
        """Whether what is computed now shall carry a graph to the meta-learned weights."""
        return self.training and torch.is_grad_enabled()

    @property
    def normalizes_queries_together(self) -> bool:
        """Whether batch normalization takes its statistics from the queries alone, now."""
        together = ("transductive", "running") if self.training else ("transductive",)
        return bool(self.norms) and self.config.normalization in together

    @property
    def steps(self) -> int:
        """Updates that a fit takes, now."""
        if self.training or self.config.test_steps is None:
            return self.config.steps
        return self.config.test_steps

    def initial(self, episodes: int, ways: int | None) -> Params:
        """Where adaptation starts."""
        own: Params = dict(self.model.named_parameters())
        if self.config.readout == "shared" and ways is not None:
            own |= {
                f"head.{name}": row.expand(ways, *row.shape[1:]) for name, row in self.model.head.named_parameters()
            }
        found = {name: own[name].expand(episodes, *own[name].shape) for name in self.adapted_names}
        return found if self.differentiable else {name: value.detach() for name, value in found.items()}

    def shared(self, updates: int) -> dict[str, Tensor]:
        """Parameters and buffers to use in place of the network's own after so many updates."""
        return {}

    def fit_part(self, support_x: Tensor, support_y: Tensor, ways: int | None) -> AdaptedNetwork:
        return AdaptedNetwork(self, self._adapted(support_x, support_y, ways), self.steps, support_x)

    def query(
        self, params: Params, updates: int, support_x: Tensor, query_x: Tensor, record: Record | None = None
    ) -> Tensor:
        """Predictions ``(E, q, outputs)`` for queries, after ``updates`` updates."""
        normalization, rows, x = self.config.normalization, None, query_x
        if normalization == "support" and self.norms:
            rows = support_x.shape[1]
            x = torch.cat([support_x, query_x], dim=1)
        return self._run(self.model, params, self.shared(updates), updates, x, rows, record)[:, rows or 0 :]

    def losses(self, episodes: Episodes) -> Tensor:
        used: list[tuple[int, Statistics]] = []
        tracked = self.training and any(norm.running_mean is not None for norm in self.norms.values())
        found = self.query_losses(episodes, (lambda *seen: used.append(seen)) if tracked else None)
        for episode in range(len(episodes) if used else 0):
            for updates, statistics in used:
                for norm, (mean, variance) in statistics.items():
                    self.track(norm, updates, mean[episode], variance[episode])
        return found

    def query_losses(self, episodes: Episodes, record: Record | None) -> Tensor:
        """The losses of the queries after adaptation, ``(E,)``."""
        params = self._adapted(episodes.support_x, episodes.support_y, episodes.ways, record)
        predictions = self.query(params, self.steps, episodes.support_x, episodes.query_x, record)
        return episode_losses(predictions, episodes.query_y)

    def track(self, norm: EpisodicBatchNorm, updates: int, mean: Tensor, variance: Tensor) -> None:
        """Move running averages by statistics that were used after so many updates."""
        norm.track(mean, variance)

    def support(self, x: Tensor, record: Record | None, second_order: bool) -> Support:
        """The support set as the adapted part of the network sees it."""
        if self.config.adapted != "head":
            return Support(self.model, "", x)
        with torch.set_grad_enabled(second_order):
            features = self._run(self.model.backbone, {}, {}, 0, x, None, record)
        return Support(self.model.head, "head.", features.flatten(2))

    def loss_and_grad(
        self,
        params: Params,
        updates: int,
        support: Support,
        y: Tensor,
        ways: int | None,
        second_order: bool,
        record: Record | None = None,
    ) -> tuple[Tensor, Params]:
        """The inner loss of each episode ``(E,)`` and its gradients, after so many updates.

        They are constants, unless ``second_order``.
        """
        with torch.enable_grad():
            point = {
                name: value if second_order and value.requires_grad else value.detach().requires_grad_()
                for name, value in params.items()
            }
            own = {name.removeprefix(support.prefix): value for name, value in point.items()}
            shared = {} if support.prefix else self.shared(updates)
            outputs = self._run(support.module, own, shared, updates, support.x, None, record, second_order)
            losses = episode_losses(outputs, y)
            if ways is not None and self.config.inner_loss == "sum_over_classes":
                losses = ways * losses
            found = torch.autograd.grad(
                losses.sum(), list(point.values()), create_graph=second_order, materialize_grads=True
            )
        return (losses if second_order else losses.detach()), dict(zip(params, found))

    def _adapted(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Params:
        """The end of the trajectory, without holding on to what comes before."""
        with torch.set_grad_enabled(self.differentiable):
            return deque(self.trajectory(x, y, ways, record), maxlen=1).pop()

    def _run(
        self,
        module: nn.Module,
        params: Params,
        shared: dict[str, Tensor],
        updates: int,
        x: Tensor,
        rows: int | None,
        record: Record | None,
        twice: bool = False,
    ) -> Tensor:
        running = self.config.normalization == "running" and not self.training
        seen = None if record is None else partial(record, updates)
        params = params | {name: params[first] for name, first in self.tied.items() if first in params}
        return apply(module, params, x, shared=shared, rows=rows, running=running, twice=twice, record=seen)


def _check_number(queries: int, ways: int) -> None:
    """Refuse one query whose batch statistics are its own, and warn of few.

    On Omniglot, 5-way 1-shot, MAML has 21, 78, 94, 97 and 99 % on 1, 2, 5, 10 and 75 queries together, and 98 % by the
    statistics of the support set, which no longer are behind where there are two queries of each class.
    """
    advice = "predict all queries of an episode together, or take learner.with_config(normalization='support')"
    if queries == 1:
        raise ValueError(
            "batch normalization has the statistics of the queries that are predicted together, and those of one "
            f"query alone say nothing: {advice}"
        )
    if queries < 2 * ways:
        warnings.warn(
            f"batch normalization has the statistics of the {queries} queries that are predicted together, few for "
            f"{ways} classes, so that predictions are worse than they could be: {advice}",
            stacklevel=4,
        )


def flatten(params: Params) -> Tensor:
    """All parameters side by side, ``(E, n)``."""
    return torch.cat([value.reshape(len(value), -1) for value in params.values()], dim=1)


def unflatten(theta: Tensor, like: Params) -> Params:
    """The inverse of :func:`flatten`, for parameters of these names and shapes."""
    parts = theta.split([value[0].numel() for value in like.values()], dim=1)
    return {name: part.view(len(theta), *value.shape[1:]) for (name, value), part in zip(like.items(), parts)}
