"""Episodes: what they hold, how they are drawn, and that frozen ones stay what they are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from learnedopt.fewshot import ClassSet, EpisodeIndices, Episodes, FewShotTask, Sinusoid, TrainingSource, load_split
from learnedopt.fewshot import datasets as datasets_module
from learnedopt.fewshot.datasets import GLYPH_SCRIPTS, check_frozen, frozen_key
from learnedopt.fewshot.sampling import draw_indices, frozen_indices
from learnedopt.fewshot.sources import PARTS, Part


def numbered(counts: tuple[int, ...]) -> ClassSet:
    """Classes whose examples carry their class and their place within it."""
    pairs = [(float(c), float(i)) for c, count in enumerate(counts) for i in range(count)]
    return ClassSet("numbered/test", tuple(f"class{c}" for c in range(len(counts))), torch.tensor(pairs), counts)


@given(st.data())
def test_an_episode_holds_different_examples_of_different_classes(data: st.DataObject) -> None:
    shots, queries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    counts = tuple(data.draw(st.lists(st.integers(shots + queries, 12), min_size=2, max_size=6)))
    ways = data.draw(st.integers(1, len(counts)))
    task = FewShotTask(numbered(counts), ways, shots, queries)
    episodes = task.sample(3, Generator().manual_seed(data.draw(st.integers(0, 99))))
    for support_x, support_y, query_x, query_y in zip(
        episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y
    ):
        assert support_y.tolist() == [way for way in range(ways) for _ in range(shots)]
        assert query_y.tolist() == [way for way in range(ways) for _ in range(queries)]
        seen = {tuple(pair) for pair in torch.cat([support_x, query_x]).tolist()}
        assert len(seen) == ways * (shots + queries), "an example occurs twice"
        meaning = dict(zip(support_y.tolist(), support_x[:, 0].tolist()))
        assert len(set(meaning.values())) == ways, "two labels stand for one class"
        assert [meaning[label] for label in query_y.tolist()] == query_x[:, 0].tolist()
        assert all(place < counts[int(c)] for c, place in seen)


def test_every_class_and_every_example_is_drawn_about_equally_often(generator: Generator) -> None:
    counts = (4, 7, 10)
    indices = draw_indices(counts, 2, 1, 1, 3000, generator)
    assert torch.bincount(indices.classes.flatten()).float().div(6000).sub(1 / 3).abs().max() < 0.02
    for c, count in enumerate(counts):
        share = torch.bincount(indices.examples[indices.classes == c].flatten(), minlength=count).float()
        assert len(share) == count
        assert (share / share.sum() - 1 / count).abs().max() < 0.03


def test_images_are_scaled_and_labelled_examples_belong_to_their_classes(generator: Generator) -> None:
    images = torch.arange(6, dtype=torch.uint8).mul(51).reshape(6, 1, 1, 1)
    task = FewShotTask(ClassSet("toy/train", ("a", "b"), images, (2, 4)), 2, 1, 1)
    x, y = task.labelled(200, generator)
    assert x.dtype == torch.float32 and x.shape == (200, 1, 1, 1)
    places = x.flatten().mul(5).round().long()
    assert torch.equal(y, (places >= 2).long()) and set(places.tolist()) == set(range(6))
    source = TrainingSource(task, episodes_per_step=3)
    assert len(source.episodes(generator)) == 3 and source.labelled(5, generator)[1].shape == (5,)


def test_the_same_generator_gives_the_same_episodes() -> None:
    task = FewShotTask(numbered((8, 8, 8)), 2, 1, 2)
    one, two, other = (task.sample(4, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.query_x, two.query_x) and not torch.equal(one.query_x, other.query_x)


def test_frozen_episodes_depend_on_all_that_names_them() -> None:
    base = {"name": "a/test", "ways": 3, "shots": 1, "queries": 2, "count": 5, "seed": 0}
    shas = [
        frozen_indices(counts=[9] * 20, **(base | change)).sha256()  # type: ignore[arg-type]
        for change in ({}, {}, {"name": "b/test"}, {"ways": 4}, {"shots": 2}, {"queries": 3}, {"seed": 1})
    ]
    assert shas[0] == shas[1] and len(set(shas)) == 6


def test_frozen_episodes_are_gathered_alike_in_any_batches() -> None:
    task = FewShotTask(numbered((6,) * 5), 3, 1, 2)
    frozen = task.frozen(7)
    assert len(frozen) == 7
    whole, parts = list(frozen.batches(7)), list(frozen.batches(3))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(whole[0].query_x, torch.cat([part.query_x for part in parts]))


def split_counts() -> dict[str, list[int]]:
    """Classes on record: how many examples each has, as follows from the split files alone."""
    counts = {f"glyphs/{part}": [20] * len(load_classes_names(part)) for part in PARTS}
    for name, examples in (("omniglot-vinyals", 20), ("omniglot-lake", 20)):
        split = load_split(name)
        counts |= {f"{name}/{part}": [examples] * len(split.class_names(part)) for part in PARTS}
    for name in ("mini-imagenet-ravi", "cifar-fs"):
        counts |= {f"{name}/{part}": [600] * len(load_split(name).class_names(part)) for part in PARTS}
    return counts


def load_classes_names(part: Part) -> list[str]:
    from learnedopt.data import scripts

    return [letter for script in GLYPH_SCRIPTS[part] for letter in scripts()[script][:30]]


def test_frozen_episodes_are_those_on_record() -> None:
    """Should this fail on a new version of torch, results on it are not comparable with earlier ones."""
    recorded = json.loads((Path(datasets_module.__file__).parent / "splits" / "frozen_episodes.json").read_text())
    assert len(recorded) >= 13
    counts = split_counts()
    for key, sha256 in recorded.items():
        name, ways, shots, queries = re.fullmatch(r"(\S+) (\d+)-way (\d+)-shot (\d+)-query", key).groups()  # type: ignore[union-attr]
        assert key == frozen_key(name, int(ways), int(shots), int(queries))
        indices = frozen_indices(name, counts[name], int(ways), int(shots), int(queries), 1000)
        assert indices.sha256() == sha256, key


def test_a_data_set_that_is_not_the_one_on_record_is_noticed() -> None:
    complete = ClassSet("glyphs/test", tuple(map(str, range(90))), torch.zeros(1800, 1), (20,) * 90)
    check_frozen(FewShotTask(complete, 5, 1, 15))
    smaller = dataclasses.replace(complete, names=complete.names[1:], counts=(20,) * 89, images=torch.zeros(1780, 1))
    with pytest.raises(ValueError, match=r"frozen episodes of glyphs/test 5-way 1-shot 15-query are not those"):
        check_frozen(FewShotTask(smaller, 5, 1, 15))


def test_sine_waves_are_sine_waves(generator: Generator) -> None:
    episodes = Sinusoid(shots=5, queries=50).sample(200, generator)
    x = torch.cat([episodes.support_x, episodes.query_x], 1).double()
    y = torch.cat([episodes.support_y, episodes.query_y], 1).double()
    # A sin(x - φ) = A cos φ · sin x - A sin φ · cos x: two numbers explain all points of a wave.
    features = torch.cat([x.sin(), x.cos()], 2)
    solution = torch.linalg.lstsq(features, y).solution
    assert (features @ solution - y).abs().max() < 1e-4
    amplitude, phase = solution.norm(dim=1), torch.atan2(-solution[:, 1], solution[:, 0])
    assert amplitude.min() >= 0.1 and amplitude.max() <= 5 and amplitude.std() > 1
    assert phase.min() >= -1e-4 and phase.max() <= torch.pi + 1e-4
    assert x.min() >= -5 and x.max() <= 5


def test_frozen_sine_waves_begin_alike() -> None:
    task = Sinusoid(shots=3, queries=4)
    assert torch.equal(task.frozen(5).query_y[:2], task.frozen(2).query_y)
    assert not torch.equal(task.frozen(2, seed=1).query_y, task.frozen(2).query_y)
    x, y = task.labelled(6, Generator().manual_seed(0))
    assert x.shape == y.shape == (6, 1)


def test_some_of_the_episodes() -> None:
    episodes = FewShotTask(numbered((6,) * 4), 2, 1, 2).sample(5, Generator().manual_seed(0))
    assert len(episodes[1]) == 1 and torch.equal(episodes[-1].query_x, episodes.query_x[4:])
    assert torch.equal(episodes[1:3].support_x, episodes.support_x[1:3])
    with pytest.raises(IndexError, match="episode 5 of 5"):
        episodes[5]
    double = episodes.to(dtype=torch.float64)
    assert double.support_x.dtype == torch.float64 and double.support_y.dtype == torch.int64


X, Y = torch.zeros(2, 4, 3), torch.tensor([[0, 0, 1, 1]] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_y": Y + 1}, r"support labels run from 1 to 2, and with 2 ways they must lie from 0 to 1"),
        ({"query_y": Y - 1}, r"query labels run from -1 to 0"),
        ({"query_y": Y.float()}, r"query labels must be int64 .* got torch.float32"),
        ({"query_y": torch.zeros_like(Y)}, r"support and query must have the same ways: .* the query \[1\]"),
        ({"ways": 3}, r"classes are missing: of 3 classes the support lacks \[2\]"),
        ({"support_x": X[0], "support_y": Y[0, 0]}, r"single episode needs x\[None\]"),
        ({"query_x": X[:, :3]}, r"query_x and query_y must both begin with"),
        ({"query_x": torch.zeros(2, 4, 5)}, r"shape of an example"),
        ({"query_x": X[:1], "query_y": Y[:1]}, r"number of episodes"),
    ],
)
def test_episodes_that_make_no_sense_are_refused(change: dict[str, Tensor | int], message: str) -> None:
    good = {"support_x": X, "support_y": Y, "query_x": X, "query_y": Y, "ways": 2}
    Episodes(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Episodes(**(good | change))  # type: ignore[arg-type]


def test_too_few_examples_or_classes_are_named() -> None:
    classes = numbered((20, 9, 20))
    with pytest.raises(ValueError, match=r"class 'class1' of numbered/test has 9 examples, and 1 shots"):
        FewShotTask(classes, 2, 1, 15)
    with pytest.raises(ValueError, match=r"numbered/test has 3 classes, too few for 5 ways"):
        FewShotTask(classes, 5, 1, 1)
    with pytest.raises(ValueError, match="must be at least 1"):
        FewShotTask(classes, 2, 0, 1)
    with pytest.raises(ValueError, match="must be at least 1"):
        Sinusoid(queries=0)


def test_a_class_set_whose_parts_disagree_is_refused() -> None:
    images = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="do not belong together"):
        ClassSet("toy", ("a", "b"), images, (2, 1))
    with pytest.raises(ValueError, match="the class 'a' occurs more than once"):
        ClassSet("toy", ("a", "a"), images, (2, 2))


def test_indices_say_which_is_support() -> None:
    first = EpisodeIndices(torch.tensor([[0, 1]]), torch.tensor([[[0, 1], [1, 0]]]), shots=1)
    assert first.sha256() == dataclasses.replace(first).sha256() != dataclasses.replace(first, shots=2).sha256()


@pytest.mark.parametrize("part", PARTS)
def test_no_frozen_wave_is_what_a_usual_seed_draws(part: Part) -> None:
    task = Sinusoid(shots=3, queries=4, part=part)
    for seed in range(3):
        frozen, generator = task.frozen(10, seed), torch.Generator().manual_seed(seed)
        assert not any(torch.isin(frozen.query_x, task.sample(1, generator).query_x).any() for _ in range(10))


def test_no_wave_for_validation_is_one_for_the_test() -> None:
    test, validation = (Sinusoid(shots=3, queries=4, part=part).frozen(20) for part in ("test", "validation"))
    assert not torch.isin(validation.support_x, test.support_x).any()
    with pytest.raises(ValueError, match="part must be one of"):
        Sinusoid(part="all")  # type: ignore[arg-type]
