"""Prototypical networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.embedding import EmbeddingConfig, EmbeddingLearner


@dataclass(frozen=True)
class ProtoNetConfig(EmbeddingConfig):
    """Settings of :class:`ProtoNet`; the published networks are trained on more ways than they are tested on."""

    kind: ClassVar[str] = "protonet"

    def make(self, backbone: nn.Module, shape: LearnerShape) -> ProtoNet:
        return ProtoNet(self, backbone, shape)


class ProtoNet(EmbeddingLearner):
    r"""A class is the mean of its support features; logits are negative squared distances to these prototypes.

    .. math::
        c_k = \frac1{|S_k|} \sum_{i \in S_k} f(x_i), \qquad \ell_k(x) = -\lVert f(x) - c_k \rVert^2

    Source: Snell, Swersky & Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017 (arXiv:1703.05175),
    section 2.

    >>> import torch
    >>> learner = ProtoNetConfig().build(nn.Flatten(), LearnerShape((2,), ways=2))
    >>> learner.fit(torch.eye(2), torch.arange(2)).predict(torch.tensor([[1.0, 0.0]]))
    tensor([[ 0., -2.]])
    """

    config: ProtoNetConfig

    def logits(self, support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
        return negative_squared_distances(query, class_means(support, support_y, ways))


def class_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Mean features of each class: ``(E, n, d)`` and ``(E, n)`` to ``(E, ways, d)``."""
    members = F.one_hot(labels, ways).to(features)
    return (members / members.sum(1, keepdim=True)).mT @ features


def negative_squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    """``-‖x - c‖²`` for all pairs: ``(E, n, d)`` and ``(E, k, d)`` to ``(E, n, k)``."""
    products = x @ centres.mT
    return 2 * products - x.square().sum(-1, keepdim=True) - centres.square().sum(-1).unsqueeze(1)
