"""Images that are made, not downloaded: glyphs, textures, tiles of photographs."""

from __future__ import annotations

import sys

import pytest
import torch

from learnedopt.data import ImageData, glyphs, photographs, scripts, split_by_class, textures
from learnedopt.data.fonts import _faces

GLYPHS = "0Aλжאⴲ"


def everything(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(parts) for parts in zip(data.train, data.validation, data.test, strict=True))  # type: ignore[return-value]


def test_glyphs_have_the_stated_sizes_and_range() -> None:
    data = glyphs(GLYPHS, size=12, examples=10)
    assert data.num_classes == len(GLYPHS)
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [42, 6, 12]
    x, y = everything(data)
    assert x.dtype == torch.float32 and x.shape[1:] == (1, 12, 12)
    assert x.min() == 0 and x.amax((1, 2, 3)).gt(0.5).all()  # every one has ink on a black ground
    assert y.bincount().tolist() == [10] * len(GLYPHS)


def test_renderings_of_a_glyph_differ_but_less_than_glyphs_do() -> None:
    x, y = everything(glyphs("IOX", size=12, examples=40))
    assert len(x.flatten(1).unique(dim=0)) > 0.9 * len(x)
    distances = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(torch.inf)
    assert (y[distances.argmin(1)] == y).float().mean() > 0.85


def test_a_glyph_fills_a_good_part_of_its_image() -> None:
    x, _ = everything(glyphs("HMX", size=16, examples=10))
    rows, columns = (x > 0.1).any(3).sum(2), (x > 0.1).any(2).sum(2)
    longer = torch.maximum(rows, columns)
    assert longer.min() >= 9 and longer.max() <= 16  # 60 to 90 % of 16 pixels, and what averaging spreads


def test_glyphs_follow_from_their_seed() -> None:
    again = glyphs.__wrapped__("AB", size=8, examples=4)
    assert torch.equal(again.train[0], glyphs("AB", size=8, examples=4).train[0])
    assert not torch.equal(again.train[0], glyphs("AB", size=8, examples=4, seed=1).train[0])


def test_every_script_can_be_rendered() -> None:
    alphabets = scripts()
    assert {"latin", "greek", "cyrillic", "hebrew", "arabic", "armenian", "georgian", "tifinagh"} <= alphabets.keys()
    assert all(len(set(letters)) == len(letters) >= 20 for letters in alphabets.values())
    sample = "".join(letters[::20] for letters in alphabets.values())
    data = glyphs(sample, size=8, examples=4)
    assert data.num_classes == len(sample) and data.train[0].amax((1, 2, 3)).gt(0.2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"characters": "ABA"}, "'A' occurs more than once"),
        ({"characters": "A漢"}, "has '漢'"),
        ({"characters": "A "}, "blank"),
        ({"size": 3}, "at least 4 pixels"),
        ({"characters": "A", "examples": 3}, "examples must be at least 4"),
    ],
)
def test_impossible_glyphs_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)


def test_missing_fonts_and_photographs_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    _faces.cache_clear()
    for make in (lambda: glyphs.__wrapped__("C"), photographs.__wrapped__):
        with pytest.raises(ImportError, match=r"learnedopt\[train\]"):
            make()


def test_textures_are_colors_between_two() -> None:
    data = textures(size=24, examples=10)
    x, y = everything(data)
    assert data.num_classes == 6 and y.bincount().tolist() == [10] * 6
    assert x.shape == (60, 3, 24, 24) and 0 <= x.min() < x.max() <= 1
    # All pixels of a texture lie on the line from one color to the other: one direction has all the variance.
    pixels = x.flatten(2) - x.flatten(2).mean(2, keepdim=True)
    singular = torch.linalg.svdvals(pixels)
    assert (singular[:, 1] < 1e-4 * singular[:, 0]).all() and (singular[:, 0] > 0).all()


def test_textures_follow_from_their_seed() -> None:
    again = textures.__wrapped__(size=8, examples=4)
    assert torch.equal(again.train[0], textures(size=8, examples=4).train[0])
    assert not torch.equal(again.train[0], textures(size=8, examples=4, seed=1).train[0])


def test_tiles_of_photographs_do_not_overlap() -> None:
    from sklearn.datasets import load_sample_images

    data = photographs(size=40)
    x, y = everything(data)
    assert len(x) == 2 * 5 * 8 and y.bincount().tolist() == [40, 40]
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [64, 8, 8]
    temple = torch.tensor(load_sample_images().images[0]).float().permute(2, 0, 1) / 255
    whole = torch.nn.functional.avg_pool2d(temple, 2)[:, :200, :320]
    # Together they have the colors of the photograph, each as often.
    colors = (part.reshape(-1, 3).mul(1020).round().long() for part in (x[y == 0].movedim(1, 3), whole.movedim(0, 2)))
    tiles, photograph = (color.unique(dim=0, return_counts=True) for color in colors)
    assert torch.equal(tiles[0], photograph[0]) and torch.equal(tiles[1], photograph[1])
    corner = whole[:, :40, :40]
    assert any(torch.equal(tile, corner) for tile in x[y == 0])


@pytest.mark.parametrize("size", [0, -1, 200])
def test_tiles_of_impossible_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least 10 tiles"):
        photographs(size)


def test_classes_are_split_alike() -> None:
    images = torch.arange(20.0).reshape(2, 10, 1, 1, 1)
    data = split_by_class("numbers", images)
    assert data.train[0].flatten().tolist() == [*range(7), *range(10, 17)]
    assert data.validation[0].flatten().tolist() == [7, 17] and data.validation[1].tolist() == [0, 1]
    assert data.test[0].flatten().tolist() == [8, 9, 18, 19] and data.test[1].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="at least 4"):
        split_by_class("few", images[:, :3])
