"""Methods that compare features: a network shared by all episodes, and nothing adapted in it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.learner import Learner, LearnerConfig, LearnerShape, Part, episode_losses
from learnedopt.fewshot.normalization import Normalization, Statistics, episodic
from learnedopt.fewshot.vectorized import Network, apply


@dataclass(frozen=True)
class EmbeddingConfig(LearnerConfig):
    """Settings of methods that compare features.

    In training mode the statistics of batch normalization are those of support and queries together, as in the
    published code, unless ``normalization`` is ``"support"``; running averages are always kept.
    """

    normalization: Normalization = "running"


@dataclass(frozen=True, eq=False)
class Compared(Part):
    """A support set, and how queries are compared with it."""

    embed: Callable[[Tensor], tuple[Tensor, Tensor]]
    compare: Callable[[Tensor, Tensor], Tensor]

    def predict(self, query_x: Tensor) -> Tensor:
        return self.compare(*self.embed(query_x))


class EmbeddingLearner(Learner):
    """A backbone, and logits from the features of support and queries.

    Args:
        config: Settings.
        backbone: Becomes part of the learner.
        shape: What the learner is made for.
        head: A read-out that pretraining needs and episodes do not.
    """

    config: EmbeddingConfig
    classification_only = True
    any_ways = True
    shares_weights = True

    def __init__(
        self, config: EmbeddingConfig, backbone: nn.Module, shape: LearnerShape, head: nn.Module | None = None
    ) -> None:
        super().__init__(config, shape)
        self.model = Network(episodic(backbone, track=True), head or nn.Identity())

    @abstractmethod
    def logits(self, support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
        """From features ``(E, n, d)`` and ``(E, q, d)`` to ``(E, q, ways)``."""

    def fit_part(self, support_x: Tensor, support_y: Tensor, ways: int | None) -> Part:
        assert ways is not None
        if self.config.normalization == "running" and not self.training:
            support = self._features(support_x, running=True).detach()

            def embed(query_x: Tensor) -> tuple[Tensor, Tensor]:
                return support, self._features(query_x, running=True)

        else:

            def embed(query_x: Tensor) -> tuple[Tensor, Tensor]:
                return self._embed_together(support_x, query_x)

        return Compared(embed, lambda support, query: self.logits(support, support_y, query, ways))

    def losses(self, episodes: Episodes) -> Tensor:
        if not self.training:
            return super().losses(episodes)
        assert episodes.ways is not None
        used: list[Statistics] = []
        support, query = self._embed_together(episodes.support_x, episodes.query_x, used.append)
        for statistics in used:
            for norm, (means, variances) in statistics.items():
                for mean, variance in zip(means, variances):
                    norm.track(mean, variance)
        return episode_losses(self.logits(support, episodes.support_y, query, episodes.ways), episodes.query_y)

    def _embed_together(
        self, support_x: Tensor, query_x: Tensor, record: Callable[[Statistics], None] | None = None
    ) -> tuple[Tensor, Tensor]:
        count = support_x.shape[1]
        rows = count if self.config.normalization == "support" else None
        together = self._features(torch.cat([support_x, query_x], dim=1), rows=rows, record=record)
        return together[:, :count], together[:, count:]

    def _features(
        self,
        x: Tensor,
        rows: int | None = None,
        running: bool = False,
        record: Callable[[Statistics], None] | None = None,
    ) -> Tensor:
        """``(E, n, *example)`` to ``(E, n, d)``."""
        return apply(self.model.backbone, {}, x, rows=rows, running=running, record=record).flatten(2)
