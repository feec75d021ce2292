"""Data sets read from files: tiny stand-ins in the layout of the originals."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from learnedopt.data import ImageData, cifar10, digits, fashion_mnist, image_folder, label_subset, mnist

datasets = pytest.importorskip("torchvision.datasets")
Image = pytest.importorskip("PIL.Image")


def write_idx(folder: Path, train: int, test: int) -> dict[str, np.ndarray]:
    """Random images and classes as MNIST and Fashion-MNIST have them."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = generator.integers(0, 10, count, dtype=np.uint8)
    for name, array in arrays.items():
        header = bytes((0, 0, 8, array.ndim)) + b"".join(length.to_bytes(4, "big") for length in array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    return arrays


@pytest.fixture
def cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Random images and classes as CIFAR-10 has them, accepted in spite of their checksums."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    written = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels, labels = generator.integers(0, 256, (8, 3072), dtype=np.uint8), generator.integers(0, 10, 8).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        written[name] = pixels, labels
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return written


@pytest.mark.parametrize(("load", "name"), [(mnist, "MNIST"), (fashion_mnist, "FashionMNIST")])
def test_grey_images_are_read_and_the_last_twelfth_is_held_out(
    load: Callable[[Path], ImageData], name: str, tmp_path: Path
) -> None:
    arrays = write_idx(tmp_path / name / "raw", train=36, test=10)
    data = load(tmp_path)
    assert [len(data.split(split)[0]) for split in ("train", "validation", "test")] == [33, 3, 10]
    x, y = (torch.cat(pair) for pair in zip(data.train, data.validation, strict=True))
    assert x.dtype == torch.float32 and x.shape == (36, 1, 28, 28)
    assert np.array_equal(x.mul(255).round().byte().squeeze(1).numpy(), arrays["train-images-idx3-ubyte"])
    assert np.array_equal(y.numpy(), arrays["train-labels-idx1-ubyte"])
    assert np.array_equal(data.test[1].numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert data.num_classes == 10 and data.test[1].dtype == torch.int64


def test_color_images_are_read_and_the_last_tenth_is_held_out(
    tmp_path: Path, cifar_files: dict[str, tuple[np.ndarray, list[int]]]
) -> None:
    data = cifar10(tmp_path)
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [36, 4, 8]
    assert data.train[0].shape[1:] == (3, 32, 32) and data.train[0].dtype == torch.float32
    pixels, labels = cifar_files["test_batch"]
    assert np.array_equal(data.test[0].mul(255).round().byte().flatten(1).numpy(), pixels)
    assert data.test[1].tolist() == labels
    assert data.validation[1].tolist() == cifar_files["data_batch_5"][1][4:]


@pytest.mark.parametrize(
    ("load", "folder"),
    [(mnist, "MNIST/raw"), (fashion_mnist, "FashionMNIST/raw"), (cifar10, "cifar-10-batches-py")],
)
def test_missing_files_are_named_with_their_folder(
    load: Callable[[Path], ImageData], folder: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="download=True") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and folder in str(caught.value)


def test_a_failed_download_is_told_in_torchvisions_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(RuntimeError, match="no route to host"):
        cifar10(tmp_path, download=True)


def write_folders(root: Path, counts: dict[str, dict[str, int]], size: int = 4) -> None:
    for part, classes in counts.items():
        for number, (name, count) in enumerate(classes.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (size, size), (i, number, 255)).save(root / part / name / f"{i:03}.png")


def test_cifar_is_also_read_from_folders_of_images(tmp_path: Path) -> None:
    write_folders(tmp_path / "cifar10", {"train": {"cat": 10, "dog": 10}, "test": {"cat": 1, "dog": 1}})
    data = cifar10(tmp_path)
    assert data.name == "cifar10" and len(data.train[0]) == 18
    with pytest.raises(FileNotFoundError):
        fashion_mnist(tmp_path)


def test_folders_of_images_are_read_and_every_tenth_is_held_out(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": {"cat": 21, "dog": 10}, "test": {"cat": 2, "dog": 3}})
    data = image_folder(tmp_path, name="pets")
    assert (data.name, data.num_classes) == ("pets", 2)
    assert data.train[0].shape == (28, 3, 4, 4)
    numbers, classes, blue = data.validation[0][:, :, 0, 0].mul(255).round().int().unbind(1)
    assert numbers.tolist() == [9, 19, 9] and classes.tolist() == data.validation[1].tolist() == [0, 0, 1]
    assert blue.tolist() == [255] * 3
    assert data.test[1].tolist() == [0, 0, 1, 1, 1]


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train/CLASS/FILE"):
        image_folder(tmp_path)
    write_folders(tmp_path / "a", {"train": {"cat": 1, "dog": 1}, "test": {"cat": 1}})
    with pytest.raises(ValueError, match="differ in their classes"):
        image_folder(tmp_path / "a")
    write_folders(tmp_path / "b", {"train": {"cat": 1}, "test": {"cat": 1}})
    write_folders(tmp_path / "b", {"train": {"dog": 1}, "test": {"dog": 1}}, size=5)
    with pytest.raises(ValueError, match="differ in size"):
        image_folder(tmp_path / "b")


def test_a_subset_of_labels_has_their_images_renumbered() -> None:
    data = label_subset(digits(), (7, 3))
    for split in ("train", "validation", "test"):
        x, y = digits().split(split)
        mine = (y == 7) | (y == 3)
        assert torch.equal(data.split(split)[0], x[mine])
        assert torch.equal(data.split(split)[1], (y[mine] == 3).long())
    assert data.num_classes == 2 and data.name == "digits-7-3"


def test_held_out_labels_are_the_others() -> None:
    subset, others = label_subset(digits(), (0, 4)), label_subset(digits(), (0, 4), held_out=True)
    assert others.num_classes == 8 and others.train[1].unique().tolist() == list(range(8))
    together = torch.cat([subset.train[0], others.train[0]])
    assert len(together.flatten(1).unique(dim=0)) == len(digits().train[0])
    expected = digits().train[1][(digits().train[1] != 0) & (digits().train[1] != 4)]
    assert torch.equal(torch.tensor([1, 2, 3, 5, 6, 7, 8, 9])[others.train[1]], expected)


@pytest.mark.parametrize(
    ("labels", "held_out", "message"),
    [
        ((3, 10), False, "from 0 to 9"),
        ((3, -1), False, "from 0 to 9"),
        ((3, 3), False, "different numbers"),
        ((), False, "labels are empty"),
        (range(10), True, "no class of digits is left"),
    ],
)
def test_impossible_subsets_are_refused(labels: tuple[int, ...], held_out: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        label_subset(digits(), labels, held_out)
