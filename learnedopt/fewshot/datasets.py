"""Data sets for few-shot learning: named splits that come with the package, images from plain folders or archives.

A split says which classes are for training, validation and testing, and how their images are prepared: size, resampling
filter, inversion, rotations. All of it is in the split's file, and the split's name is part of what determines frozen
test episodes.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from learnedopt.data.fonts import glyph_images, scripts
from learnedopt.fewshot.sampling import frozen_indices
from learnedopt.fewshot.sources import PARTS, ClassSet, FewShotTask, Part

_FOLDER = Path(__file__).parent / "splits"
_KEYS = {"name", "source", "dataset", "size", "channels", "resample", "invert", "rotations", "classes"}


@dataclass(frozen=True)
class Split:
    """Which classes are for what, and how their images are prepared."""

    name: str
    source: str
    """Who published it."""
    dataset: str
    size: int
    """Height and width in pixels."""
    channels: int
    resample: str
    """Filter of Pillow that brings images to ``size``; ``none`` where they have it."""
    invert: bool
    """Whether ``255 - pixel`` is taken, so that strokes are bright."""
    rotations: tuple[int, ...]
    """Degrees; every one makes further classes."""
    classes: Mapping[Part, tuple[str, ...]]

    def __post_init__(self) -> None:
        if set(self.classes) != set(PARTS):
            raise ValueError(f"the split {self.name!r} must have the parts {PARTS}, got {tuple(self.classes)}")
        home: dict[str, str] = {}
        for part, names in self.classes.items():
            for name in names:
                if name in home:
                    where = f"in {part} twice" if home[name] == part else f"both in {home[name]} and in {part}"
                    raise ValueError(
                        f"the split {self.name!r} has the class {name!r} {where}: classes of the parts must be disjoint"
                    )
                home[name] = part
        if any(degrees % 90 for degrees in self.rotations) or len(set(self.rotations)) < len(self.rotations):
            raise ValueError(
                f"the split {self.name!r} has the rotations {self.rotations}: they must be different multiples of 90"
            )

    def class_names(self, part: Part) -> tuple[str, ...]:
        """Names of the classes that episodes are drawn from: those of the part, once for every rotation."""
        if len(self.rotations) == 1:
            return self.classes[_known_part(part)]
        return tuple(f"{name}/rot{r:03d}" for r in self.rotations for name in self.classes[_known_part(part)])


def load_split(name: str | Path) -> Split:
    """A split that comes with the package, or of a JSON file in the same format.

    Raises ``ValueError`` for an unknown name, a file that lacks something, or a class in two parts.

    >>> split = load_split("omniglot-vinyals")
    >>> [len(split.class_names(part)) for part in PARTS]
    [4112, 688, 1692]
    """
    path = Path(name) if Path(name).suffix == ".json" else _FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"there is no split {str(name)!r}; known: {split_names()}, or give a JSON file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if missing := sorted(_KEYS - set(values)):
        raise ValueError(f"{path} lacks {missing}")
    classes = {part: tuple(_expanded(found)) for part, found in values["classes"].items()}
    settings = {key: values[key] for key in _KEYS - {"classes", "rotations"}}
    return Split(**settings, rotations=tuple(values["rotations"]), classes=classes)


def split_names() -> list[str]:
    """Names of the splits that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json") if path.stem != _RECORD.stem)


def _expanded(classes: Mapping[str, str] | Sequence[str]) -> Iterator[str]:
    """Class names as they are, or alphabets with the numbers of their characters, as in ``{"Greek": "1-24,26"}``."""
    if not isinstance(classes, Mapping):
        yield from classes
        return
    for alphabet, numbers in classes.items():
        for span in numbers.split(","):
            first, _, last = span.partition("-")
            yield from (f"{alphabet}/character{n:02d}" for n in range(int(first), int(last or first) + 1))


@cache
def omniglot(root: str | os.PathLike[str], part: Part, split: str = "omniglot-vinyals") -> ClassSet:
    """Omniglot: handwritten characters, 20 examples each, 28 x 28 after resizing, strokes bright.

    Expects ``<root>/images_background/<alphabet>/characterNN/*.png`` and ``images_evaluation`` likewise (also below
    ``<root>/omniglot``). Raises ``FileNotFoundError`` if a class of the split is not there, ``ImportError`` without
    Pillow.
    """
    chosen, root = load_split(split), Path(root)
    base = next((folder for folder in (root, root / "omniglot") if (folder / "images_background").is_dir()), None)
    if base is None:
        raise FileNotFoundError(
            f"no Omniglot under {str(root)!r}: unpack images_background and images_evaluation there "
            "(https://github.com/brendenlake/omniglot, folder python)"
        )

    def images(name: str) -> Files:
        folder = base / f"images_{name}"
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing, and the split {chosen.name!r} needs it")
        return [(path.name, path.read_bytes) for path in sorted(folder.glob("*.png"))]

    return _class_set(chosen, part, {name: images(name) for name in chosen.classes[_known_part(part)]})


@cache
def mini_imagenet(root: str | os.PathLike[str], part: Part, split: str = "mini-imagenet-ravi") -> ClassSet:
    """mini-ImageNet: 600 photographs of each class, 84 x 84.

    Expects files ``<wnid>/<file>.jpg`` below ``<root>``, at any depth, in folders or in tar archives
    (``<root>/*.tar*``). Raises ``FileNotFoundError`` if a class of the split is nowhere, ``ImportError``
    without Pillow.
    """
    chosen, root = load_split(split), Path(root)
    wanted = chosen.classes[_known_part(part)]
    found: dict[str, dict[str, Callable[[], bytes]]] = {name: {} for name in wanted}
    for folder, name, data in _image_files(root, found):
        found[folder][name] = data
    if missing := [name for name in wanted if not found[name]]:
        raise FileNotFoundError(
            f"no images of {len(missing)} class(es) of mini-ImageNet under {str(root)!r}, {missing[0]} first: expected "
            "CLASS/FILE.jpg in folders or *.tar archives"
        )
    return _class_set(chosen, part, {name: sorted(files.items()) for name, files in found.items()})


@cache
def cifar_fs(root: str | os.PathLike[str], part: Part, split: str = "cifar-fs") -> ClassSet:
    """CIFAR-FS: the classes of CIFAR-100, 600 images each of 32 x 32, through torchvision.

    Raises ``FileNotFoundError`` if its files are not in ``<root>/cifar-100-python``, ``ImportError`` without
    torchvision.
    """
    try:
        from torchvision.datasets import CIFAR100
    except ImportError as error:
        raise ImportError("cifar_fs() needs torchvision: pip install 'learnedopt[train]'") from error
    chosen, root = load_split(split), Path(root)
    try:
        halves = [CIFAR100(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no CIFAR-100 under {str(root)!r}: put its unpacked files into {str(root / 'cifar-100-python')!r}"
        ) from error
    pixels = torch.cat([torch.as_tensor(half.data) for half in halves]).permute(0, 3, 1, 2)
    labels = torch.cat([torch.as_tensor(half.targets) for half in halves])
    number = {name: index for index, name in enumerate(halves[0].classes)}
    names = chosen.class_names(part)
    if unknown := [name for name in names if name not in number]:
        raise ValueError(f"CIFAR-100 has no class {unknown[0]!r}, which the split {chosen.name!r} names")
    places = [(labels == number[name]).nonzero().flatten() for name in names]
    images = pixels[torch.cat(places)].contiguous()
    return ClassSet(f"{chosen.name}/{part}", names, images, tuple(map(len, places)))


GLYPH_SCRIPTS: Mapping[Part, tuple[str, ...]] = {
    # Letters that look alike (Latin, Greek, Cyrillic, Lisu, Old Italic) are on one side.
    "train": ("latin", "greek", "cyrillic", "lisu", "old", "canadian", "arabic", "hebrew", "ogham"),
    "validation": ("lao", "nko"),
    "test": ("armenian", "georgian", "tifinagh"),
}
"""The scripts whose letters are the classes of each part."""


@cache
def glyphs(part: Part, letters: int = 30, examples: int = 20, size: int = 20) -> ClassSet:
    """Characters of many scripts rendered from matplotlib's fonts, in the form of Omniglot. No download.

    A class is a letter, drawn as :func:`learnedopt.data.glyphs` draws it. Scripts are disjoint between the parts
    (:data:`GLYPH_SCRIPTS`). Easier than handwriting: examples of one letter differ by font, angle, slant, size and
    place.

    Args:
        letters: At most so many of every script, the first by code point.
        examples: Of each letter.
        size: Height and width in pixels.

    >>> toy = glyphs("validation", letters=2, examples=3, size=12)
    >>> toy.names, toy.images.shape
    (('lao/ກ', 'lao/ຂ', 'nko/ߊ', 'nko/ߋ'), torch.Size([12, 1, 12, 12]))
    """
    chosen = [(script, letter) for script in GLYPH_SCRIPTS[_known_part(part)] for letter in scripts()[script][:letters]]
    images = glyph_images("".join(letter for _, letter in chosen), size, examples, seed=PARTS.index(part))
    names = tuple(f"{script}/{letter}" for script, letter in chosen)
    return ClassSet(f"glyphs/{part}", names, images.flatten(0, 1), (examples,) * len(names))


def _read(load: Callable[[Path, Part, str], ClassSet], name: str) -> Callable[[Path | None, Part], ClassSet]:
    """A loader of the split ``name`` that insists on a folder."""

    def loaded(root: Path | None, part: Part) -> ClassSet:
        if root is None:
            raise ValueError(f"{name} is read from files: name their folder (--root DIR, or root=)")
        return load(root, part, name)

    return loaded


DATASETS: Mapping[str, Callable[[Path | None, Part], ClassSet]] = {
    "omniglot-vinyals": _read(omniglot, "omniglot-vinyals"),
    "omniglot-lake": _read(omniglot, "omniglot-lake"),
    "mini-imagenet-ravi": _read(mini_imagenet, "mini-imagenet-ravi"),
    "cifar-fs": _read(cifar_fs, "cifar-fs"),
    "glyphs": lambda root, part: glyphs(part),
}
"""Loaders by the name of data set and split, given the folder of downloaded data and the part."""


def load_classes(name: str, part: Part, root: str | os.PathLike[str] | None = None) -> ClassSet:
    """The classes of one part of a data set in :data:`DATASETS`; loaded once, then kept in memory.

    The loader's ``cache_clear``, as in ``learnedopt.fewshot.datasets.omniglot.cache_clear()``, lets go of it.

    Raises ``ValueError`` for an unknown name or part, or if the data set is read from ``root`` and none is given; and
    as the loader does.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](None if root is None else Path(root), _known_part(part))


_RECORD = _FOLDER / "frozen_episodes.json"


def check_frozen(task: FewShotTask) -> None:
    """Raise ``ValueError`` if the frozen episodes of a task are not those on record, where there is a record.

    Recorded is the sha256 of the first 1000 with seed 0, as indices: it tells other numbers of classes and examples,
    not other images.
    """
    classes, ways, shots, queries = task.classes, task.ways, task.shots, task.queries
    key = frozen_key(classes.name, ways, shots, queries)
    recorded: dict[str, str] = json.loads(_RECORD.read_text())
    if (
        key in recorded
        and frozen_indices(classes.name, classes.counts, ways, shots, queries, 1000).sha256() != (recorded[key])
    ):
        raise ValueError(
            f"the frozen episodes of {key} are not those on record: the data have other classes or counts than the "
            "split says, or this version of torch draws other random numbers. Results would not be comparable"
        )


def frozen_key(name: str, ways: int, shots: int, queries: int) -> str:
    """What a list of frozen episodes is recorded under."""
    return f"{name} {ways}-way {shots}-shot {queries}-query"


def _known_part(part: Part) -> Part:
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    return part


Files = Sequence[tuple[str, Callable[[], bytes]]]
"""Name and content of the images of one class."""


def _class_set(split: Split, part: Part, files: Mapping[str, Files]) -> ClassSet:
    """Decode image files by class, prepare them as the split says, and add the rotations.

    Every image goes where it will stay: many small arrays, and copies of them, would take several times the memory, and
    leave it in pieces that the system does not get back.
    """
    if empty := [name for name, found in files.items() if not found]:
        raise FileNotFoundError(f"{len(empty)} class(es) of {split.name} have no images, {empty[0]} first")
    counts = tuple(map(len, files.values()))
    turns = len(split.rotations)
    images = torch.empty(turns, sum(counts), split.channels, split.size, split.size, dtype=torch.uint8)
    every = ((name, file, data) for name, found in files.items() for file, data in found)
    for place, (name, file, data) in enumerate(every):
        upright = _decoded(name, file, data(), split)
        for turn, degrees in enumerate(split.rotations):
            images[turn, place] = torch.rot90(upright, degrees // 90, (-2, -1))
    return ClassSet(f"{split.name}/{part}", split.class_names(part), images.flatten(0, 1), counts * turns)


def _decoded(name: str, file: str, data: bytes, split: Split) -> Tensor:
    """uint8 ``(channels, size, size)``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'learnedopt[train]'") from error
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("L" if split.channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} of the class {name} cannot be read as an image ({type(error).__name__})") from error
    if image.size != (split.size, split.size):
        if split.resample == "none":
            raise ValueError(
                f"images of {split.name} must be {split.size} x {split.size} pixels, and {file} of the class {name} is "
                f"{image.size[0]} x {image.size[1]}"
            )
        image = image.resize((split.size, split.size), Image.Resampling[split.resample.upper()])
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(split.size, split.size, split.channels).permute(2, 0, 1)
    return 255 - pixels if split.invert else pixels


def _image_files(root: Path, folders: Container[str]) -> Iterator[tuple[str, str, Callable[[], bytes]]]:
    """Folder, name and content of every image in these folders below ``root``, also in tar archives that lie there."""
    for path in sorted(root.glob("**/*.jpg")):
        if path.parent.name in folders:
            yield path.parent.name, path.name, path.read_bytes
    for archive in sorted(path for ending in ("", ".gz", ".xz", ".bz2") for path in root.glob(f"*.tar{ending}")):
        with _whole(archive), tarfile.open(archive) as content:
            for member in content:
                name = Path(member.name)
                if member.isfile() and name.suffix == ".jpg" and name.parent.name in folders:
                    file = content.extractfile(member)
                    assert file is not None
                    yield name.parent.name, name.name, partial(bytes, file.read())


@contextmanager
def _whole(archive: Path) -> Iterator[None]:
    """Name the archive that is damaged."""
    try:
        yield
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive} cannot be read to its end as an archive: {error}") from error
