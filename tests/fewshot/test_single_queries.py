"""What a learner predicts for one query: by itself where that is promised, and never silently by its own statistics."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from learnedopt.fewshot import Conv4, FewShotTask, LearnerShape, learner_info, list_learners, load_learner, save_learner
from learnedopt.fewshot.datasets import glyphs
from learnedopt.fewshot.learners import LEARNERS, MAMLConfig
from tests.fewshot.support import episodes, generator, make
from tests.fewshot.test_learners import INNER_LOOP, KINDS, MODES, VARIANTS

TRANSDUCTIVE = [name for name in list_learners() if learner_info(name).learner.normalization == "transductive"]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", ["support", "running"])
def test_ten_queries_one_at_a_time_are_as_ten_together(kind: str, settings: dict[str, Any], mode: str) -> None:
    learner, some = make(kind, normalization=mode, **settings).eval(), episodes(1, queries=4)
    adapted = learner.fit(some.support_x[0], some.support_y[0])
    queries = some.query_x[0, :10]
    together = adapted.predict(queries)
    assert together.std(0).min() > 0
    torch.testing.assert_close(torch.cat([adapted.predict(query[None]) for query in queries]), together)


def tiny(tmp_path: Path, **settings: Any) -> Path:
    """A transductive learner of images, as an entry."""
    learner = MAMLConfig(**settings).build(Conv4(4), LearnerShape((1, 16, 16), 3), generator())
    return save_learner(learner, tmp_path / "tiny").path


def test_a_learner_that_is_loaded_predicts_every_query_by_itself(tmp_path: Path) -> None:
    """Though it was trained with the statistics of all queries."""
    path = tiny(tmp_path)
    learner = load_learner(path)
    assert learner_info(path).learner.normalization == "transductive"
    assert not learner.transductive and learner.config.normalization == "support" and not learner.training
    x, y = torch.rand(16, 1, 16, 16, generator=generator()), torch.tensor([0, 1, 2])
    adapted = learner.fit(x[:3], y)
    together = adapted.predict(x[3:])
    torch.testing.assert_close(torch.cat([adapted.predict(query[None]) for query in x[3:]]), together)
    chosen = load_learner(path, "transductive")
    assert chosen.transductive and chosen.config == MAMLConfig()
    assert not torch.allclose(chosen.fit(x[:3], y).predict(x[3:]), together)
    with pytest.raises(ValueError, match="keeps no running averages"):
        load_learner(path, "running")
    with pytest.raises(ValueError, match="normalization must be one of"):
        load_learner(path, "batch")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_what_an_entry_says_otherwise_is_kept(mode: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"normalization": mode}
    learner = LEARNERS["protonet"](**settings).build(Conv4(2), LearnerShape((1, 16, 16), 3))
    entry = save_learner(learner, tmp_path / "it")
    loaded = load_learner(entry.path).config.normalization
    assert loaded == (mode if mode != "transductive" else "support")


@pytest.mark.parametrize("name", [name for name in TRANSDUCTIVE if name.startswith("omniglot-m")])
def test_entries_of_the_zoo_know_letters_one_at_a_time(name: str) -> None:
    """Chance is 0.2. By the statistics of all queries one alone had 0.2, and now has what many have together."""
    learner = load_learner(name)
    task = FewShotTask(glyphs("test", letters=20, examples=6, size=28), ways=5, shots=1, queries=2)
    right = {1: 0, 10: 0}
    for batch in task.frozen(8).batches(1):
        adapted = learner.fit(batch.support_x[0], batch.support_y[0], ways=5)
        for size in right:
            found = torch.cat([adapted.predict(x) for x in batch.query_x[0].split(size)])
            right[size] += int((found.argmax(-1) == batch.query_y[0]).sum())
    assert right[1] == right[10] > 0.5 * 80


@pytest.mark.parametrize("kind", INNER_LOOP)
def test_a_query_alone_is_not_normalized_by_itself(kind: str) -> None:
    settings: dict[str, Any] = {"normalization": "transductive"}
    learner = LEARNERS[kind](**settings).build(Conv4(2), LearnerShape((1, 16, 16), 3, 9), generator()).eval()
    x, y = torch.rand(12, 1, 16, 16, generator=generator()), torch.tensor([0, 1, 2])
    adapted = learner.fit(x[:3], y)
    with pytest.raises(ValueError, match=r"those of one query alone say nothing: predict all queries .* together, or"):
        adapted.predict(x[3:4])
    with pytest.warns(UserWarning, match="statistics of the 5 queries that are predicted together, few for 3 classes"):
        adapted.predict(x[3:8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.predict(x[3:9])
        other = learner.with_config(normalization="support").fit(x[:3], y)
        assert other.predict(x[3:4]).isfinite().all()


def test_in_training_running_averages_are_not_used_yet() -> None:
    learner = make("maml", normalization="running")
    some = episodes(1)
    with pytest.raises(ValueError, match="those of one query alone say nothing"):
        learner.fit(some.support_x[0], some.support_y[0]).predict(some.query_x[0, :1])
    assert learner.eval().fit(some.support_x[0], some.support_y[0]).predict(some.query_x[0, :1]).isfinite().all()


def test_regression_wants_two_queries() -> None:
    learner, some = make("maml", ways=None).eval(), episodes(1, queries=3, shots=3, ways=None)
    adapted = learner.fit(some.support_x[0], some.support_y[0])
    assert adapted.predict(some.query_x[0, :2]).isfinite().all()
    with pytest.raises(ValueError, match="one query alone"):
        adapted.predict(some.query_x[0, :1])


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_predictions_in_evaluation_keep_no_graph(kind: str, settings: dict[str, Any], mode: str) -> None:
    learner, some = make(kind, normalization=mode, **settings).eval(), episodes()
    adapted = learner.fit(some.support_x, some.support_y)
    found = adapted.predict(some.query_x)
    assert torch.is_grad_enabled() and not found.requires_grad
    query_x = some.query_x.clone().requires_grad_()
    wanted = adapted.predict(query_x)
    (gradient,) = torch.autograd.grad(wanted.square().sum(), query_x)
    assert bool(gradient.any())
    torch.testing.assert_close(wanted.detach(), found)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"finetune", "reptile"}))
def test_predictions_in_training_have_gradients(kind: str) -> None:
    learner, some = make(kind), episodes()
    assert learner.fit(some.support_x, some.support_y).predict(some.query_x).requires_grad
