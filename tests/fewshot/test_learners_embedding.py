"""Learners that compare features, against what one would write by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners import LEARNERS, MatchingConfig, MatchingNetwork, ProtoNetConfig
from tests.fewshot.support import WAYS, assert_gradient_is_exact, backbone, episodes, generator, make


def test_protonet_is_five_lines() -> None:
    some = episodes()
    network = backbone().eval()
    learner = ProtoNetConfig().build(network, LearnerShape((4,), WAYS), generator()).double().eval()
    logits = learner.fit(some.support_x, some.support_y).predict(some.query_x)
    for number in range(3):
        support, query = network(some.support_x[number]), network(some.query_x[number])
        prototypes = torch.stack([support[some.support_y[number] == k].mean(0) for k in range(WAYS)])
        expected = -torch.cdist(query, prototypes).square()
        torch.testing.assert_close(logits[number], expected)


def test_protonet_trains_on_the_statistics_of_support_and_queries_together() -> None:
    """As its code does: everything goes through the network in training mode at once."""
    some = episodes(1)
    network = backbone().train()
    learner = ProtoNetConfig().build(backbone(), LearnerShape((4,), WAYS), generator()).double()
    features = network(torch.cat([some.support_x[0], some.query_x[0]]))
    support, query = features.split(6)
    prototypes = torch.stack([support[some.support_y[0] == k].mean(0) for k in range(WAYS)])
    expected = F.cross_entropy(-torch.cdist(query, prototypes).square(), some.query_y[0])
    torch.testing.assert_close(learner.meta_loss(some), expected)
    # And the running averages are those that torch keeps.
    mine, its = learner.state_dict(), network.state_dict()
    torch.testing.assert_close({name: mine[f"model.backbone.{name}"] for name in its}, dict(its))


def test_more_ways_in_training_than_in_evaluation() -> None:
    learner = make("protonet")
    assert learner.fit(*_support(ways=6)).predict(torch.zeros(2, 4, dtype=torch.float64)).shape == (2, 6)
    assert learner.meta_loss(episodes(ways=5)).isfinite()


def test_classes_may_have_different_numbers_of_examples() -> None:
    x = torch.tensor([[[0.0], [2.0], [5.0]]], dtype=torch.float64)
    learner = LEARNERS["protonet"]().build(nn.Flatten(), LearnerShape((1,), 2)).double()
    logits = learner.fit(x, torch.tensor([[0, 0, 1]])).predict(torch.tensor([[[2.0]]], dtype=torch.float64))
    torch.testing.assert_close(logits, torch.tensor([[[-1.0, -9.0]]], dtype=torch.float64))


def _support(ways: int) -> tuple[Tensor, Tensor]:
    some = episodes(1, ways=ways)
    return some.support_x[0], some.support_y[0]


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("learned", [False, True])
def test_matching_is_attention_by_cosine(scale: float, learned: bool) -> None:
    some = episodes(1)
    network = backbone().eval()
    config = MatchingConfig(scale=scale, learned_scale=learned)
    learner = config.build(network, LearnerShape((4,), WAYS), generator()).double().eval()
    logits = learner.fit(some.support_x, some.support_y).predict(some.query_x)
    for number, query in enumerate(network(some.query_x[0])):
        cosines = torch.stack([F.cosine_similarity(query, one, dim=0) for one in network(some.support_x[0])])
        attention = torch.softmax(scale * cosines, 0)
        expected = torch.stack([attention[some.support_y[0] == k].sum() for k in range(WAYS)])
        torch.testing.assert_close(torch.softmax(logits[0, number], 0), expected)


def test_full_context_embeddings_are_those_of_the_appendix() -> None:
    """One query, one step and one support example at a time, with the formulas of Vinyals et al., appendix A."""
    some = episodes(1)
    network = backbone().eval()
    learner = MatchingConfig(full_context=True, attention_steps=2).build(network, LearnerShape((4,), WAYS), generator())
    assert isinstance(learner, MatchingNetwork)
    learner = learner.double().eval()
    logits = learner.fit(some.support_x, some.support_y).predict(some.query_x)
    support, queries = network(some.support_x[0]), network(some.query_x[0])
    lstm = learner.support_lstm
    ways = []
    for suffix, order in (("", range(6)), ("_reverse", range(5, -1, -1))):
        cell = nn.LSTMCell(5, 5).double()
        own = {name: getattr(lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        cell.load_state_dict(own)
        hidden, memory, outputs = torch.zeros(5).double(), torch.zeros(5).double(), {}
        for place in order:
            hidden, memory = cell(support[place], (hidden, memory))
            outputs[place] = hidden
        ways.append(torch.stack([outputs[place] for place in range(6)]))
    g = support + ways[0] + ways[1]
    for number, query in enumerate(queries):
        hidden, memory = query, torch.zeros(5).double()
        for _ in range(2):
            read = sum(weight * one for weight, one in zip(torch.softmax(g @ hidden, 0), g))
            output, memory = learner.query_lstm(torch.cat([query, torch.as_tensor(read)]), (hidden, memory))
            hidden = output + query
        attention = torch.softmax(torch.stack([F.cosine_similarity(hidden, one, dim=0) for one in g]), 0)
        expected = torch.stack([attention[some.support_y[0] == k].sum() for k in range(WAYS)])
        torch.testing.assert_close(torch.softmax(logits[0, number], 0), expected)


def test_the_nearest_neighbour_is_the_one_of_largest_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    shape = LearnerShape((2,), 2, num_classes=9)
    learner = LEARNERS["nearest_neighbour"]().build(nn.Flatten(), shape).eval()
    logits = learner.fit(x, torch.tensor([0, 0, 1])).predict(torch.tensor([[5.0, 0.0], [2.0, 2.0], [1.0, 3.0]]))
    expected = [[1.0, math.sqrt(0.5)], [math.sqrt(0.5), 1.0], [3 / math.sqrt(10), 4 / math.sqrt(20)]]
    torch.testing.assert_close(logits, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["protonet", "matching"])
@pytest.mark.parametrize("mode", ["transductive", "support", "running"])
def test_the_meta_gradient_is_that_of_finite_differences(kind: str, mode: str) -> None:
    learner = make(kind, normalization=mode, **({"full_context": True} if kind == "matching" else {}))
    assert_gradient_is_exact(learner, episodes(2))
