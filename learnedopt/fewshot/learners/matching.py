"""Matching networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot.config import check_count, check_positive
from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.embedding import EmbeddingConfig, EmbeddingLearner
from learnedopt.fewshot.learners.finetune import cosine_similarities


@dataclass(frozen=True)
class MatchingConfig(EmbeddingConfig):
    """Settings of :class:`MatchingNetwork`."""

    kind: ClassVar[str] = "matching"
    built_in: ClassVar[frozenset[str]] = frozenset({"full_context", "scale", "learned_scale"})
    full_context: bool = False
    """Embed every example in the light of the whole support set."""
    attention_steps: int = 3
    """Of the queries' LSTM, with ``full_context``."""
    scale: float = 1.0
    """What similarities are multiplied by before the softmax; the paper's is 1."""
    learned_scale: bool = False
    """Learn the scale, from there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "attention_steps")
        check_positive(self, "scale")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> MatchingNetwork:
        return MatchingNetwork(self, backbone, shape)


class MatchingNetwork(EmbeddingLearner):
    r"""A query attends to the support examples; a class's probability is the attention that its examples get.

    .. math::
        p_k(x) = \sum_{i \in S_k} a_i(x), \qquad
        a(x) = \operatorname{softmax}_i\bigl(s \cos(f(x), g(x_i))\bigr)

    The logits are :math:`\log p_k` up to a constant. Without ``full_context`` f and g are the backbone; with it g is a
    bidirectional LSTM over the support set, in the order given, and f an LSTM that reads the support set by attention,
    both added to the features.

    Source: Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016 (arXiv:1606.04080), section 2 and
    appendix A.

    >>> from learnedopt.fewshot.learner import LearnerShape
    >>> learner = MatchingConfig().build(nn.Flatten(), LearnerShape((2,), ways=2))
    >>> learner.fit(torch.eye(2), torch.arange(2)).predict(torch.tensor([[3.0, 0.0]]))
    tensor([[1., 0.]])
    """

    config: MatchingConfig

    def __init__(self, config: MatchingConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape)
        like, size = next(backbone.parameters(), torch.empty(0)), self.features
        if config.learned_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)).to(like))
        if config.full_context:
            self.support_lstm = nn.LSTM(size, size, batch_first=True, bidirectional=True).to(like)
            self.query_lstm = nn.LSTMCell(2 * size, size).to(like)

    def logits(self, support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
        if self.config.full_context:
            support = self._in_context(support)
            query = self._attending(query, support)
        scale = self.log_scale.exp() if self.config.learned_scale else self.config.scale
        similarities = scale * cosine_similarities(query, support)
        members = F.one_hot(support_y, ways).bool()
        return similarities.unsqueeze(-1).where(members.unsqueeze(1), -math.inf).logsumexp(2)

    def _in_context(self, support: Tensor) -> Tensor:
        """g: ``(E, n, d)`` to the same."""
        forward, backward = self.support_lstm(support)[0].chunk(2, dim=-1)
        return support + forward + backward

    def _attending(self, query: Tensor, support: Tensor) -> Tensor:
        """f: ``(E, q, d)`` to the same."""
        hidden, cell = query, torch.zeros_like(query).flatten(0, 1)
        read = torch.softmax(hidden @ support.mT, dim=-1) @ support
        for _ in range(self.config.attention_steps):
            inputs = torch.cat([query, read], dim=-1).flatten(0, 1)
            output, cell = self.query_lstm(inputs, (hidden.flatten(0, 1), cell))
            hidden = output.view_as(query) + query
            read = torch.softmax(hidden @ support.mT, dim=-1) @ support
        return hidden
