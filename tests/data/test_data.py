"""The data sets: shapes, ranges, disjoint splits, and what is said when one is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from learnedopt.data import digits, mnist, python_docs, text_file


def test_digits_have_the_stated_sizes_and_range() -> None:
    data = digits()
    sizes = {name: len(data.split(name)[0]) for name in ("train", "validation", "test")}
    assert sizes == {"train": 1200, "validation": 300, "test": 297}
    for x, y in (data.train, data.validation, data.test):
        assert x.shape[1:] == (1, 8, 8) and x.dtype == torch.float32
        assert x.min() == 0 and x.max() == 1
        assert y.dtype == torch.int64 and sorted(y.unique().tolist()) == list(range(data.num_classes))


def test_splits_of_digits_are_disjoint_and_complete() -> None:
    from sklearn.datasets import load_digits

    data = digits()
    rows = [tuple(row) for x, _ in (data.train, data.validation, data.test) for row in x.flatten(1).mul(16).tolist()]
    assert len(set(rows)) == len(rows)  # no two of scikit-learn's digits are alike
    assert set(rows) == {tuple(row) for row in load_digits().data.tolist()}


def test_digits_keep_image_and_class_together() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    known = {tuple(row): label for row, label in zip(bunch.data.tolist(), bunch.target.tolist(), strict=True)}
    x, y = digits().split("test")
    assert [known[tuple(row)] for row in x.flatten(1).mul(16).tolist()] == y.tolist()


def test_digits_are_in_the_same_order_every_time() -> None:
    again = digits.__wrapped__()
    assert torch.equal(again.train[0], digits().train[0]) and torch.equal(again.test[1], digits().test[1])


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"learnedopt\[train\]"):
        digits.__wrapped__()


def test_mnist_without_torchvision_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"learnedopt\[train\]"):
        mnist(tmp_path)


def test_mnist_without_its_files_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match="download=True"):
        mnist(tmp_path)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        digits().split("valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'validation'"):
        python_docs().split("dev")  # type: ignore[arg-type]


def test_python_docs_are_english_in_a_fixed_vocabulary() -> None:
    data = python_docs()
    text = "".join(data.vocabulary[i] for i in data.train.tolist())
    assert len(set(data.vocabulary)) == len(data.vocabulary) == 64
    assert len(text) > 100_000 and text == text.lower()
    assert text.count("  ") < 100  # the layout of the documentation is gone
    assert text.count(" the ") > 1000


def test_splits_of_a_text_are_consecutive_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "verse.txt"
    path.write_text("Ünder the spreading chestnut tree\n" * 3, encoding="utf-8")
    data = text_file(path)
    parts = [data.split("train"), data.split("validation"), data.split("test")]
    assert "".join(data.vocabulary[i] for i in torch.cat(parts).tolist()) == path.read_text(encoding="utf-8")
    assert [len(part) for part in parts] == [82, 10, 10]


def test_text_too_short_to_split_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("brief", encoding="utf-8")
    with pytest.raises(ValueError, match="5 characters"):
        text_file(path)
