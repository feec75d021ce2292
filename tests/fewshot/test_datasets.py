"""Data sets and splits: tiny stand-ins in the layout of the originals."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learnedopt.data import scripts
from learnedopt.fewshot import FewShotTask, datasets, load_classes, load_split
from learnedopt.fewshot.datasets import (
    GLYPH_SCRIPTS,
    Split,
    cifar_fs,
    glyphs,
    mini_imagenet,
    omniglot,
    split_names,
)
from learnedopt.fewshot.sources import PARTS

Image = pytest.importorskip("PIL.Image")

SIZES = {
    "omniglot-vinyals": (1028, 172, 423, 4),
    "omniglot-lake": (813, 151, 659, 4),
    "mini-imagenet-ravi": (64, 16, 20, 1),
    "cifar-fs": (64, 16, 20, 1),
}


@pytest.mark.parametrize("name", split_names())
def test_splits_have_their_published_sizes_and_share_no_class(name: str) -> None:
    split = load_split(name)
    *sizes, rotations = SIZES[name]
    assert split.name == name and split.source
    assert [len(split.classes[part]) for part in PARTS] == sizes
    assert [len(split.class_names(part)) for part in PARTS] == [size * rotations for size in sizes]
    everything = [base for part in PARTS for base in split.classes[part]]
    assert len(set(everything)) == len(everything) == sum(sizes)


def test_lakes_split_is_a_rule() -> None:
    split = load_split("omniglot-lake")
    assert all(name.startswith("evaluation/") for name in split.classes["test"])
    assert all(name.startswith("background/") for part in ("train", "validation") for name in split.classes[part])
    assert len(split.classes["train"]) + len(split.classes["validation"]) == 964


def write_split(folder: Path, **changes: Any) -> Path:
    """A small split of Omniglot's kind."""
    values = {
        "name": "small",
        "source": "nobody",
        "dataset": "omniglot",
        "size": 28,
        "channels": 1,
        "resample": "lanczos",
        "invert": True,
        "rotations": [0, 90],
        "classes": {
            "train": {"background/Greek": "1-2"},
            "validation": {"background/Greek": "3"},
            "test": {"evaluation/Tibetan": "1,4"},
        },
    }
    path = folder / "small.json"
    path.write_text(json.dumps(values | changes))
    return path


def test_a_class_in_two_parts_is_an_error(tmp_path: Path) -> None:
    both = {
        "train": {"background/Greek": "1-3"},
        "validation": {"background/Latin": "1"},
        "test": {"background/Greek": "3"},
    }
    with pytest.raises(ValueError, match=r"'background/Greek/character03' both in train and in test"):
        load_split(write_split(tmp_path, classes=both))
    twice = both | {"test": {"background/Korean": "3,3"}}
    with pytest.raises(ValueError, match="in test twice"):
        load_split(write_split(tmp_path, classes=twice))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotations": [0, 45]}, "different multiples of 90"),
        ({"rotations": [0, 0]}, "different multiples of 90"),
        ({"classes": {"train": {}, "test": {}}}, "must have the parts"),
    ],
)
def test_a_split_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_split(write_split(tmp_path, **changes))


def test_unknown_names_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'omniglot'; known: \['cifar-fs', "):
        load_split("omniglot")
    with pytest.raises(ValueError, match="unknown data set 'mnist'; known: omniglot-vinyals"):
        load_classes("mnist", "test")
    with pytest.raises(ValueError, match="part must be one of train, validation, test, got 'val'"):
        load_classes("glyphs", "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cifar-fs is read from files: name their folder"):
        load_classes("cifar-fs", "test")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not valid JSON"):
        load_split(tmp_path / "broken.json")
    (tmp_path / "incomplete.json").write_text('{"name": "incomplete"}')
    with pytest.raises(ValueError, match=r"lacks \['channels', 'classes'"):
        load_split(tmp_path / "incomplete.json")


def write_characters(root: Path, split: Split, examples: int) -> dict[str, np.ndarray]:
    """White pages with a black corner; the first example of each class."""
    generator = np.random.default_rng(0)
    first: dict[str, np.ndarray] = {}
    for name in {name for part in PARTS for name in split.classes[part]}:
        folder = root / f"images_{name}"
        folder.mkdir(parents=True)
        for index in range(examples):
            page = np.full((105, 105), 255, dtype=np.uint8)
            page[: 15 * generator.integers(1, 4), : 15 * generator.integers(1, 4)] = 0
            Image.fromarray(page).convert("1").save(folder / f"0001_{index + 1:02d}.png")
            first.setdefault(name, page)
    return first


@pytest.mark.parametrize("below", ["", "omniglot"])
def test_omniglot_is_read_resized_inverted_and_rotated(below: str, tmp_path: Path) -> None:
    path = write_split(tmp_path)
    pages = write_characters(tmp_path / below, load_split(path), examples=3)
    classes = omniglot(str(tmp_path), "train", str(path))
    assert classes.name == "small/train" and classes.counts == (3,) * 4
    assert classes.names == (
        "background/Greek/character01/rot000",
        "background/Greek/character02/rot000",
        "background/Greek/character01/rot090",
        "background/Greek/character02/rot090",
    )
    assert classes.images.dtype == torch.uint8 and classes.images.shape == (12, 1, 28, 28)
    page = Image.fromarray(pages["background/Greek/character01"]).resize((28, 28), Image.Resampling.LANCZOS)
    expected = 255 - torch.from_numpy(np.array(page))
    assert torch.equal(classes.images[0, 0], expected) and expected[0, 0] > 200, "strokes must be bright"
    assert torch.equal(classes.images[6, 0], torch.rot90(expected)), "the third class is the first one, turned"
    assert FewShotTask(classes, 4, 1, 2).sample(2, torch.Generator()).query_x.shape == (2, 8, 1, 28, 28)


def test_omniglot_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_split(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no Omniglot under .*: unpack images_background"):
        omniglot(tmp_path, "train", str(path))
    (tmp_path / "images_background" / "Greek" / "character01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"character02 is missing, and the split 'small' needs it"):
        omniglot(tmp_path, "train", str(path))


def photograph(value: int, size: int = 84) -> bytes:
    """A JPEG file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 255 - value)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def as_folders(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / "mini_imagenet" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def as_archives(root: Path, files: dict[str, bytes]) -> None:
    """In two halves, as large sets come."""
    names = sorted(files)
    for half, part in (("a", names[::2]), ("b", names[1::2])):
        with tarfile.open(root / f"mini_{half}.tar.gz", "w:gz") as archive:
            for name in part:
                member = tarfile.TarInfo(f"mini_imagenet/{name}")
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))


@pytest.mark.parametrize("write", [as_folders, as_archives])
def test_mini_imagenet_is_read_from_folders_and_archives(
    write: Callable[[Path, dict[str, bytes]], None], tmp_path: Path
) -> None:
    parts = {"train": ["n1"], "validation": ["n2"], "test": ["n3", "n4"]}
    path = write_split(
        tmp_path, dataset="mini-imagenet", size=84, channels=3, invert=False, rotations=[0], classes=parts
    )
    colours = {("n3", "b"): 40, ("n3", "a"): 80, ("n4", "c"): 120, ("n1", "d"): 160}
    data = {f"test/{wnid}/{name}.jpg": photograph(value) for (wnid, name), value in colours.items()}
    data["test/n4/small.jpg"] = photograph(200, size=50)
    write(tmp_path, data)
    classes = mini_imagenet(tmp_path, "test", str(path))
    assert classes.names == ("n3", "n4") and classes.counts == (2, 2) and classes.images.shape == (4, 3, 84, 84)
    red = classes.images[:, 0].float().mean((1, 2))
    assert (red - torch.tensor([80.0, 40.0, 120.0, 200.0])).abs().max() < 3, "by class, then by file name"
    with pytest.raises(FileNotFoundError, match=r"no images of 1 class\(es\) of mini-ImageNet .* n2 first"):
        mini_imagenet(tmp_path, "validation", str(path))


def test_damaged_archives_and_images_are_named_and_other_files_left_alone(tmp_path: Path) -> None:
    path = write_split(
        tmp_path,
        dataset="mini-imagenet",
        size=84,
        channels=3,
        invert=False,
        rotations=[0],
        classes={"train": ["n1"], "validation": ["n2"], "test": ["n3"]},
    )
    as_archives(tmp_path, {f"test/n3/{name}.jpg": photograph(number) for number, name in enumerate("abcdefgh")})
    (tmp_path / "mini_a.tar.gz.sha256").write_text("of the archive")
    assert len(mini_imagenet(tmp_path, "test", str(path)).images) == 8
    whole = (tmp_path / "mini_a.tar.gz").read_bytes()
    mini_imagenet.cache_clear()
    for damaged in (whole[: len(whole) // 2], b"nothing", whole[:-200] + bytes(200)):
        (tmp_path / "mini_a.tar.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"mini_a\.tar\.gz cannot be read to its end as an archive"):
            mini_imagenet(tmp_path, "test", str(path))
    as_archives(tmp_path, {"test/n3/a.jpg": photograph(1), "test/n3/b.jpg": b"no image"})
    with pytest.raises(ValueError, match=r"b\.jpg of the class n3 cannot be read as an image"):
        mini_imagenet(tmp_path, "test", str(path))


def test_cifar_fs_takes_both_halves_of_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    names = sorted({name for part in PARTS for name in load_split("cifar-fs").classes[part]})

    class Files:
        classes = names

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            assert not download
            generator = np.random.default_rng(int(train))
            self.targets = [*range(100), *range(100)] if train else list(range(100))
            self.data = generator.integers(0, 256, (len(self.targets), 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(datasets, "CIFAR100", Files)
    classes = cifar_fs(tmp_path, "test")
    assert len(classes) == 20 and classes.counts == (3,) * 20 and classes.images.shape == (60, 3, 32, 32)
    index = names.index(classes.names[0])
    expected = np.stack([Files(tmp_path, True, False).data[index], Files(tmp_path, True, False).data[100 + index]])
    assert np.array_equal(classes.images[:2].permute(0, 2, 3, 1).numpy(), expected)


def test_cifar_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-100 under .*cifar-100-python"):
        cifar_fs(tmp_path, "train")


def test_glyphs_are_disjoint_drawn_and_the_same_every_time() -> None:
    letters = {part: [c for script in GLYPH_SCRIPTS[part] for c in scripts()[script]] for part in PARTS}
    everything = [c for part in PARTS for c in letters[part]]
    assert len(set(everything)) == len(everything)
    toy = glyphs("validation", letters=2, examples=4, size=12)
    assert toy.counts == (4,) * 4 and len({name.split("/")[0] for name in toy.names}) == 2
    assert toy.images.amax((1, 2, 3)).min() > 100, "a blank image"
    assert len({bytes(image.numpy().tobytes()) for image in toy.images}) == 16, "examples must differ"
    again = glyphs.__wrapped__("validation", letters=2, examples=4, size=12)
    assert torch.equal(toy.images, again.images)


def test_every_split_is_recorded_in_words() -> None:
    for name in split_names():
        split = load_split(name)
        assert split.resample in ("none", "lanczos", "bilinear")
        assert re.fullmatch(r"omniglot|mini-imagenet|cifar100", split.dataset)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_loading_takes_the_memory_of_the_images(tmp_path: Path) -> None:
    """From an archive, where they come in any order: 1.3 times 85 MB here, where copies took three to five times."""
    content = io.BytesIO()
    Image.new("RGB", (84, 84), (10, 200, 30)).save(content, "JPEG")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for place in range(4000):
            member = tarfile.TarInfo(f"test{place % 2}/{place:05d}.jpg")
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    settings = json.loads(Path(datasets.__file__).with_name("splits").joinpath("mini-imagenet-ravi.json").read_text())
    classes = {"train": ["train"], "validation": ["validation"], "test": ["test0", "test1"]}
    (tmp_path / "mine.json").write_text(json.dumps({**settings, "classes": classes}))
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(content.getvalue())
    program = """
import sys
from learnedopt.fewshot.datasets import mini_imagenet

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

mini_imagenet(sys.argv[1], "train", sys.argv[1] + "/mine.json")  # what is imported
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
classes = mini_imagenet(sys.argv[1], "test", sys.argv[1] + "/mine.json")
print(classes.images.nbytes, memory("VmHWM") - before)
del classes
mini_imagenet.cache_clear()
print(memory("VmRSS") - before)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    size, peak, after = map(int, done.stdout.split())
    assert size == 4000 * 84 * 84 * 3 and peak < 1.5 * size and after < 0.5 * size
