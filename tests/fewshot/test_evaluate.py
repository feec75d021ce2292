"""Evaluation: what the numbers are, what counts as diverged, and that the learner is left as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from learnedopt.fewshot import Episodes, Evaluation, FewShotTask, LearnerShape, Sinusoid, evaluate
from learnedopt.fewshot.backbones import MLP, Conv4
from learnedopt.fewshot.learner import Learner, LearnerConfig, Part
from learnedopt.fewshot.learners import MAMLConfig, ProtoNetConfig
from learnedopt.fewshot.sources import ClassSet


class Told(Learner):
    """Predicts by a function of the queries, whatever the support."""

    def __init__(self, predict, ways: int | None, transductive: bool = False) -> None:  # type: ignore[no-untyped-def]
        super().__init__(LearnerConfig(), LearnerShape((1,), ways))
        self.answer = predict
        self.declared = transductive

    @property
    def transductive(self) -> bool:
        return self.declared

    def fit_part(self, support_x: Tensor, support_y: Tensor, ways: int | None) -> Part:
        answer = self.answer

        class Answers(Part):
            def predict(self, query_x: Tensor) -> Tensor:
                found: Tensor = answer(query_x)
                return found

        return Answers()


def labelled(labels: list[list[int]]) -> Episodes:
    """Two-way episodes whose queries carry in their value what shall be predicted."""
    query_y = torch.tensor(labels)
    support = torch.zeros(len(labels), 2, 1), torch.tensor([[0, 1]] * len(labels))
    return Episodes(*support, torch.zeros(*query_y.shape, 1), query_y, ways=2)


def test_accuracy_is_the_share_of_correct_queries_episode_by_episode() -> None:
    episodes = labelled([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]])
    always_first = Told(lambda x: torch.tensor([1.0, 0.0]).expand(*x.shape[:2], 2), ways=2, transductive=True)
    result = evaluate(always_first, episodes, batch_size=2)
    assert result.values == (0.75, 0.25, 0.5) and result.n == 3 and result.metric == "accuracy"
    assert result.mean == pytest.approx(0.5) and result.median == 0.5
    assert result.ci95 == pytest.approx(1.96 * 0.25 / math.sqrt(3))
    assert result.diverged == 0 and result.transductive


def test_predictions_that_are_not_finite_count_as_wrong() -> None:
    def broken_in_the_second(x: Tensor) -> Tensor:
        logits = torch.tensor([1.0, 0.0]).repeat(*x.shape[:2], 1)
        logits[1, 0, 1] = math.nan
        return logits

    result = evaluate(Told(broken_in_the_second, ways=2), labelled([[0, 0, 0, 1]] * 3))
    assert result.values == (0.75, 0.0, 0.75) and result.diverged == 1


def test_squared_errors_of_tasks_and_those_that_diverged() -> None:
    episodes = Sinusoid(shots=2, queries=50).frozen(4)

    def two_diverge(x: Tensor) -> Tensor:
        predicted = torch.zeros_like(x)
        predicted[1] = 1e6
        predicted[2] = math.nan
        return predicted

    result = evaluate(Told(two_diverge, ways=None), episodes)
    assert result.metric == "mse" and result.diverged == 2
    assert result.values[0] == pytest.approx(float(episodes.query_y[0].square().mean()), rel=1e-5)
    assert result.values[2] == math.inf and result.mean == math.inf and result.ci95 == math.inf
    assert "2 diverged" in str(result)


def test_one_episode_has_no_interval() -> None:
    assert math.isnan(Evaluation("accuracy", (0.5,), 0, False).ci95)


def test_two_evaluations_are_compared_episode_by_episode() -> None:
    generator = torch.Generator().manual_seed(0)
    hardness, ours, theirs = torch.rand(3, 500, generator=generator, dtype=torch.float64)
    first = Evaluation("accuracy", tuple((0.5 * hardness + 0.1 * ours + 0.02).tolist()), 0, False)
    second = Evaluation("accuracy", tuple((0.5 * hardness + 0.1 * theirs).tolist()), 0, True)
    mean, ci95 = first.difference(second)
    assert mean == pytest.approx(first.mean - second.mean) and 0 < ci95 < 0.5 * first.ci95
    assert ci95 == pytest.approx(1.96 * float((0.1 * (ours - theirs)).std()) / math.sqrt(500))
    back = second.difference(first)
    assert back == pytest.approx((-mean, ci95))
    errors = [Evaluation("mse", values, 1, False) for values in ((1.0, math.inf), (math.inf, 1.0), (1.0, 2.0))]
    for other in errors:
        mean, ci95 = errors[0].difference(other)
        assert math.isnan(mean) and ci95 == math.inf
    with pytest.raises(ValueError, match="accuracy of 500 episodes, the other accuracy of 1"):
        first.difference(Evaluation("accuracy", (0.5,), 0, False))
    with pytest.raises(ValueError, match="the other mse of 500"):
        first.difference(Evaluation("mse", second.values, 0, False))


def test_nothing_to_evaluate_is_an_error() -> None:
    episodes = images().frozen(2)
    with pytest.raises(ValueError, match="no episodes"):
        evaluate(Told(lambda x: x, ways=3), replace(episodes, indices=episodes.indices[:0]))
    with pytest.raises(TypeError, match=r"as task.frozen\(600\) gives, got FewShotTask"):
        evaluate(Told(lambda x: x, ways=3), images())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(Told(lambda x: x, ways=3), episodes, batch_size=0)
    for source in (images(), Sinusoid()):
        with pytest.raises(ValueError, match="frozen episodes holds at least 1, got 0"):
            source.frozen(0)
    waves = Sinusoid().frozen(2)
    waves.query_y[1, 0] = math.nan
    with pytest.raises(ValueError, match="targets of queries are not all finite"):
        evaluate(Told(lambda x: x, ways=None), waves)


def images() -> FewShotTask:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(60, 1, 16, 16, generator=generator)
    return FewShotTask(ClassSet("noise/test", tuple(map(str, range(6))), pixels, (10,) * 6), 3, 1, 4)


@pytest.mark.parametrize("config", [ProtoNetConfig(), MAMLConfig(normalization="support")])
def test_batches_change_nothing_and_the_learner_is_left_as_it_was(config: LearnerConfig) -> None:
    task = images()
    learner = config.build(Conv4(width=4), LearnerShape((1, 16, 16), 3), torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    assert learner.training
    frozen = next(module for module in learner.modules() if isinstance(module, torch.nn.Conv2d)).eval()
    results = [evaluate(learner, task.frozen(7), batch_size) for batch_size in (1, 3, 7)]
    assert results[0].values == results[1].values == results[2].values and results[0].n == 7
    modes = [module.training for module in learner.modules() if module is not frozen]
    assert all(modes) and not frozen.training, "evaluation must leave the mode as it was"
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert all(weight.grad is None for weight in learner.parameters())


def test_episodes_follow_the_learners_dtype() -> None:
    learner = MAMLConfig(learning_rate=0.01).build(MLP(hidden=(4,)), LearnerShape((1,), None)).double()
    assert evaluate(learner, Sinusoid(shots=3, queries=5).frozen(2)).n == 2


def test_an_exception_leaves_the_mode_as_it_was() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no prediction")

    learner = Told(fails, ways=None)
    with pytest.raises(RuntimeError, match="no prediction"):
        evaluate(learner, Sinusoid().frozen(1))
    assert learner.training
