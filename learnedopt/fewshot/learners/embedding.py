"""Methods that compare features: a network shared by all episodes, and nothing adapted in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learnedopt.fewshot.checks import check_gradients, check_stateless, feature_size
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.fast.vectorized import apply
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape, Part, episode_losses
from learnedopt.fewshot.network import Network
from learnedopt.fewshot.normalization import Normalization, Statistics, episodic


@dataclass(frozen=True)
class EmbeddingConfig(LearnerConfig):
    """Settings of methods that compare features.

    In training mode the statistics of batch normalization are those of support and queries together, as in the
    published code, unless ``normalization`` is ``"support"``; running averages are always kept.
    """

    normalization: Normalization = "running"


@dataclass(frozen=True, eq=False)
class Compared(Part):
    """A support set that queries are compared with."""

    learner: EmbeddingLearner
    support_x: Tensor
    support_y: Tensor
    ways: int
    features: Tensor | None
    """Of the support set, where they do not depend on the queries."""

    def predict(self, query_x: Tensor) -> Tensor:
        if self.features is None:
            support, query = self.learner.embed_together(self.support_x, query_x)
        else:
            support, query = self.features, self.learner.embed(query_x, running=True)
        return self.learner.logits(support, self.support_y, query, self.ways)


class EmbeddingLearner(Learner):
    """A backbone, and logits from the features of support and queries.

    Args:
        config: Settings.
        backbone: Becomes part of the learner.
        shape: What the learner is made for.
        outputs: Of a read-out that pretraining needs and episodes do not, if there is to be one.
    """

    config: EmbeddingConfig
    classification_only = True
    any_ways = True
    shares_weights = True

    def __init__(
        self, config: EmbeddingConfig, backbone: nn.Module, shape: LearnerShape, outputs: int | None = None
    ) -> None:
        super().__init__(config, shape)
        self.features = feature_size(backbone, shape.example_shape)
        head = nn.Identity() if outputs is None else nn.Linear(self.features, outputs)
        self.model = Network(episodic(backbone, track=True), head.to(next(backbone.parameters(), torch.empty(0))))
        check_stateless(self.model.backbone, shape.example_shape)
        check_gradients(self.model.backbone, shape.example_shape, ())

    @abstractmethod
    def logits(self, support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
        """From features ``(E, n, d)`` and ``(E, q, d)`` to ``(E, q, ways)``."""

    def fit_part(self, support_x: Tensor, support_y: Tensor, ways: int | None) -> Part:
        assert ways is not None
        alone = self.config.normalization == "running" and not self.training
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            features = self.embed(support_x, running=True) if alone else None
        return Compared(self, support_x, support_y, ways, features)

    def losses(self, episodes: Episodes) -> Tensor:
        if not self.training:
            return super().losses(episodes)
        assert episodes.ways is not None
        used: list[Statistics] = []
        support, query = self.embed_together(episodes.support_x, episodes.query_x, used.append)
        for statistics in used:
            for norm, (means, variances) in statistics.items():
                for mean, variance in zip(means, variances):
                    norm.track(mean, variance)
        return episode_losses(self.logits(support, episodes.support_y, query, episodes.ways), episodes.query_y)

    def embed_together(
        self, support_x: Tensor, query_x: Tensor, record: Callable[[Statistics], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of both, which pass through the network as one batch."""
        count = support_x.shape[1]
        rows = count if self.config.normalization == "support" else None
        together = self.embed(torch.cat([support_x, query_x], dim=1), rows=rows, record=record)
        return together[:, :count], together[:, count:]

    def embed(
        self,
        x: Tensor,
        rows: int | None = None,
        running: bool = False,
        record: Callable[[Statistics], None] | None = None,
    ) -> Tensor:
        """Features: ``(E, n, *example)`` to ``(E, n, d)``."""
        return apply(self.model.backbone, {}, x, rows=rows, running=running, record=record).flatten(2)
