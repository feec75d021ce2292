"""The tasks of the benchmark: pure, paired, learnable, and what their sets promise."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Generator
from torch.func import grad_and_value, vmap

from learnedopt.data import digits
from learnedopt.evaluation.tasks import TASK_SETS, find_tasks
from learnedopt.evaluation.tasks.convolutions import two_convolutions
from learnedopt.evaluation.tasks.sources import chaotic_series, shuffled
from learnedopt.tasks.base import Batch, Params, Split, Task

# Those that need no download, and one that stands for the others, on digits.
JUDGED = [*(task.name for task in (*TASK_SETS["selection"], *TASK_SETS["heldout"])), "two-convolutions"]
judged = pytest.mark.parametrize("name", JUDGED)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def draw(name: str, copies: int) -> Task:
    if name == "two-convolutions":
        return two_convolutions(copies, digits())
    return find_tasks([name])[0].family().draw(seeded(0), copies)


def one(params: Params, batch: Batch, copy: int) -> tuple[Params, Batch]:
    return {key: value[copy] for key, value in params.items()}, tuple(x[copy] for x in batch)


@judged
def test_vectorized_over_copies_equals_one_at_a_time(name: str) -> None:
    task = draw(name, 2)
    params = {key: value.double() for key, value in task.init(seeded(1)).items()}
    batch = tuple(x.double() if x.is_floating_point() else x for x in task.sample(seeded(2)))
    gradients, losses = vmap(grad_and_value(task.loss))(params, batch)
    for copy in range(2):
        gradient, loss = grad_and_value(task.loss)(*one(params, batch, copy))
        torch.testing.assert_close(losses[copy], loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close({key: x[copy] for key, x in gradients.items()}, gradient, rtol=1e-7, atol=1e-10)
    assert all(value.abs().sum() > 0 for value in gradients.values()), "a parameter without any gradient"


@judged
def test_equal_seeds_give_equal_copies_and_different_ones_do_not(name: str) -> None:
    task = draw(name, 2)
    first, again, other = (task.init(seeded(seed)) for seed in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert any(not torch.equal(value[0], value[1]) for value in first.values())
    torch.testing.assert_close(task.sample(seeded(1)), task.sample(seeded(1)), rtol=0, atol=0)


@judged
def test_every_split_can_be_judged(name: str) -> None:
    task = draw(name, 2)
    params = task.init(seeded(1))
    for split in get_args(Split):
        batch = task.sample(seeded(2), split)
        assert vmap(task.loss)(params, batch).isfinite().all()
        try:
            shares = vmap(task.accuracy)(params, batch)
        except NotImplementedError:
            continue
        assert ((shares >= 0) & (shares <= 1)).all()


@judged
def test_twenty_steps_lower_the_loss(name: str) -> None:
    task = draw(name, 1)
    params = {key: value.requires_grad_() for key, value in task.init(seeded(1)).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.003)
    fixed, batches = task.sample(seeded(2)), seeded(3)
    before = vmap(task.loss)(params, fixed).item()
    for _ in range(20):
        optimizer.zero_grad()
        vmap(task.loss)(params, task.sample(batches)).sum().backward()
        optimizer.step()
    assert vmap(task.loss)(params, fixed).item() < before


def test_the_sets_keep_what_they_promise() -> None:
    names = [task.name for tasks in TASK_SETS.values() for task in tasks]
    assert len(set(names)) == len(names)
    assert sum(task.kind in ("recurrent", "attention") for task in TASK_SETS["heldout"]) >= 3
    assert all(task.distance for tasks in TASK_SETS.values() for task in tasks)
    assert not any(task.needs_root for task in (*TASK_SETS["selection"], *TASK_SETS["heldout"]))


def test_the_sets_are_frozen() -> None:
    """Another task needs another name: a result must mean the same under every version."""
    assert [task.name for task in TASK_SETS["chen"]] == [
        *("chen-mlp", "chen-relu", "chen-two-layers", "chen-conv-mnist", "chen-conv-cifar10")
    ]
    assert [task.name for task in TASK_SETS["selection"]] == [
        *("tabular-gelu", "normalised-hinge", "distillation", "mixture-density", "separable-conv", "dilated-conv"),
        *("forecasting", "sorting"),
    ]
    assert [task.name for task in TASK_SETS["heldout"]] == [
        *("wide-mlp", "deep-tanh", "residual-quantiles", "mlp-mixer", "residual-conv", "denoising", "row-lstm"),
        *("gru-names", "code-transformer", "vae", "siren", "skip-gram", "contrastive", "graph-wedges"),
    ]


def test_splits_share_no_row() -> None:
    rows = shuffled(torch.arange(100))
    seen = torch.cat([rows[split][0] for split in get_args(Split)])
    assert seen.sort().values.tolist() == list(range(100))


def test_windows_of_the_series_do_not_reach_into_other_splits() -> None:
    pairs = {
        split: {tuple(pair) for pair in rows[0].unfold(1, 2, 1).flatten(0, 1).tolist()}
        for split, rows in chaotic_series().items()
    }
    assert not pairs["train"] & pairs["validation"] and not pairs["validation"] & pairs["test"]


def test_names_of_sets_and_tasks_are_found_once_and_others_refused() -> None:
    found = [task.name for task in find_tasks(["siren", "heldout"])]
    assert found[0] == "siren" and sorted(found) == sorted(task.name for task in TASK_SETS["heldout"])
    with pytest.raises(
        ValueError, match=r"'mnist-50' is no set of tasks \(paper, .*\), no task \(.*\), and no module:NAME"
    ):
        find_tasks(["mnist-50"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_there:FAMILY", "there is no task 'not_there:FAMILY': No module named 'not_there'"),
        ("learnedopt.tasks:Cubics", "there is no task 'learnedopt.tasks:Cubics': .* no attribute 'Cubics'"),
        ("learnedopt.tasks:Quadratics", "must be a learnedopt.tasks.TaskFamily, it is of the type"),
    ],
)
def test_what_is_no_family_of_ones_own_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_tasks([name])


@pytest.mark.parametrize("name", [task.name for task in find_tasks(["paper", "chen"]) if task.needs_root])
def test_what_needs_downloaded_data_says_so(name: str, tmp_path: Path) -> None:
    (task,) = find_tasks([name])
    with pytest.raises(ValueError, match="needs downloaded data: say where they are with --root"):
        task.family()
    with pytest.raises(FileNotFoundError):
        task.family(tmp_path)
