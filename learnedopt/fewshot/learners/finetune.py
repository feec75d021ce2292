"""The two baselines on a network that was trained to tell all base classes apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from learnedopt.fewshot.config import check_count, check_positive
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import best_settings
from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.embedding import EmbeddingConfig, EmbeddingLearner
from learnedopt.fewshot.learners.inner_loop import InnerLoopConfig, InnerLoopLearner, Params, Record
from learnedopt.fewshot.normalization import Normalization
from learnedopt.fewshot.sources import EpisodeList, TrainingSource


@dataclass(frozen=True)
class FinetuneConfig(InnerLoopConfig):
    """Settings of :class:`Finetune`.

    ``learning_rate`` and ``decay`` are to be chosen on validation, which :meth:`Finetune.choose_settings` does.
    """

    kind: ClassVar[str] = "finetune"
    normalization: Normalization = "running"
    steps: int = 15
    learning_rate: float = 0.1
    decay: float = 0.0
    """The rate of step t, from 0, is ``learning_rate / (1 + decay t)``."""
    batch_size: int = 64
    """Examples in a step of pretraining."""
    learning_rates: tuple[float, ...] = (0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
    """What to choose from."""
    decays: tuple[float, ...] = (0.0, 0.1, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "learning_rate")
        check_count(self, "batch_size")
        if self.readout != "per_class":
            raise ValueError("fine-tuning begins with a read-out of zeros for every class: readout must be 'per_class'")
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay must be finite and not negative, got {self.decay}")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> Finetune:
        return Finetune(self, backbone, shape)


class Finetune(InnerLoopLearner):
    r"""A network trained to tell all base classes apart, then gradient descent on the support set.

    The network gets a new read-out, from zero, one output for each class of the episode; with it the whole network is
    trained, or with ``adapted="head"`` it alone. In regression the network is trained on all functions at once and
    keeps its read-out. There is no meta-loss: :meth:`meta_loss` gives the loss of the queries as a constant.

    Source: the baseline of Ravi & Larochelle, "Optimization as a model for few-shot learning", ICLR 2017, section 5.

    >>> from learnedopt.fewshot.learner import LearnerShape
    >>> from learnedopt.fewshot.backbones import MLP
    >>> learner = FinetuneConfig().build(MLP((4,)), LearnerShape((3,), ways=2, num_classes=50))
    >>> learner.eval().fit(torch.eye(2, 3), torch.arange(2)).predict(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    config: FinetuneConfig
    any_ways = True

    def __init__(self, config: FinetuneConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape, track=True, outputs=pretraining_outputs(config.kind, shape))

    @property
    def differentiable(self) -> bool:
        return False

    def training_step(self, source: TrainingSource, generator: Generator) -> Tensor:
        return pretraining_loss(self.model, source, self.config.batch_size, generator)

    def initial(self, episodes: int, ways: int | None) -> Params:
        found = super().initial(episodes, ways)
        if ways is None:
            return found
        weight = found["head.weight"]
        return {**found, "head.weight": weight.new_zeros(episodes, ways, weight.shape[-1])} | {
            "head.bias": weight.new_zeros(episodes, ways)
        }

    def trajectory(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Iterator[Params]:
        support = self.support(x, record, second_order=False)
        params = self.initial(len(x), ways)
        for step in range(self.steps):
            rate = self.config.learning_rate / (1 + self.config.decay * step)
            _, grads = self.loss_and_grad(params, step, support, y, ways, second_order=False, record=record)
            params = {name: value - rate * grads[name] for name, value in params.items()}
            yield params

    @torch.no_grad()
    def meta_loss(self, episodes: Episodes) -> Tensor:
        return super().meta_loss(episodes)

    def query_losses(self, episodes: Episodes, record: Record | None) -> Tensor:
        return super().query_losses(episodes, None)

    def choose_settings(self, episodes: Episodes | EpisodeList) -> dict[str, Any]:
        """Take the learning rate and the decay that are best on these episodes (the mean accuracy; median error)."""
        pairs = itertools.product(self.config.learning_rates, self.config.decays)
        chosen = best_settings(self, ({"learning_rate": rate, "decay": decay} for rate, decay in pairs), episodes)
        self.config = self.with_config(**chosen).config
        return chosen


@dataclass(frozen=True)
class NearestNeighbourConfig(EmbeddingConfig):
    """Settings of :class:`NearestNeighbour`."""

    kind: ClassVar[str] = "nearest_neighbour"
    batch_size: int = 64
    """Examples in a step of pretraining."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "batch_size")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> NearestNeighbour:
        return NearestNeighbour(self, backbone, shape)


class NearestNeighbour(EmbeddingLearner):
    r"""A network trained to tell all base classes apart; a query has the class of the support example it is closest to.

    The logit of class k is the largest cosine similarity between the features of the query and those of the class's
    support examples. Features are the network's before its read-out. Its ``state_dict`` is that of :class:`Finetune`:
    one pretrained network serves both.

    Source: the baseline of Ravi & Larochelle, "Optimization as a model for few-shot learning", ICLR 2017, section 5.
    """

    config: NearestNeighbourConfig

    def __init__(self, config: NearestNeighbourConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape, pretraining_outputs(config.kind, shape))

    def training_step(self, source: TrainingSource, generator: Generator) -> Tensor:
        return pretraining_loss(self.model, source, self.config.batch_size, generator)

    def logits(self, support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
        similarities = cosine_similarities(query, support)
        members = F.one_hot(support_y, ways).bool()
        return similarities.unsqueeze(-1).where(members.unsqueeze(1), -float("inf")).amax(2)


def cosine_similarities(x: Tensor, y: Tensor) -> Tensor:
    """Of all pairs: ``(E, n, d)`` and ``(E, m, d)`` to ``(E, n, m)``."""
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT


def pretraining_outputs(kind: str, shape: LearnerShape) -> int:
    """Of the read-out in pretraining.

    Raises:
        ValueError: the number of base classes is not known.
    """
    if shape.ways is None:
        return shape.outputs
    if shape.num_classes is None:
        raise ValueError(f"{kind} begins with telling all base classes apart: give num_classes in the LearnerShape")
    return shape.num_classes


def pretraining_loss(network: nn.Module, source: TrainingSource, count: int, generator: Generator) -> Tensor:
    """Supervised loss on ``count`` examples of all base classes, or in regression of all functions."""
    x, y = source.labelled(count, generator)
    weight = next(network.parameters())
    outputs, y = network(x.to(weight)), y.to(weight.device)
    return F.mse_loss(outputs, y.to(weight)) if y.is_floating_point() else F.cross_entropy(outputs, y)
