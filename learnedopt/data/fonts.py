"""Characters of many scripts, drawn from the fonts that come with matplotlib."""

from __future__ import annotations

import string
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from learnedopt.data.images import ImageData, split_by_class

if TYPE_CHECKING:
    from PIL import ImageFont

_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
)
_OVERSAMPLING = 4


@cache
def glyphs(
    characters: str = string.digits + string.ascii_uppercase, size: int = 16, examples: int = 40, seed: int = 0
) -> ImageData:
    """Renderings of ``characters``, one class each in the order given, ``examples`` of every class. No download.

    A rendering takes a random face of DejaVu or STIX that has the character, turns it by up to 12°, shears it by up to
    0.2, scales it so that its longer side fills 60 to 90 % of the image, moves it within what is left, and averages it
    down to ``size`` x ``size`` gray levels, the glyph near 1 and the ground 0. All of it follows from ``seed``; other
    versions of Pillow may differ in single gray levels.

    Every class is split as :func:`split_by_class` does. Raises as :func:`glyph_images`, and ``ValueError`` for fewer
    than 4 ``examples``.

    >>> data = glyphs("αβγ", size=12, examples=10)
    >>> {name: tuple(data.split(name)[0].shape) for name in ("train", "validation", "test")}
    {'train': (21, 1, 12, 12), 'validation': (3, 1, 12, 12), 'test': (6, 1, 12, 12)}
    """
    return split_by_class("glyphs", glyph_images(characters, size, examples, seed).float() / 255)


def glyph_images(characters: str, size: int, examples: int, seed: int = 0) -> Tensor:
    """The renderings of :func:`glyphs`, not split: uint8 ``(characters, examples, 1, size, size)``.

    Raises ``ValueError`` for a character that occurs twice, that no face has or that is blank, and for a ``size`` below
    4; ``ImportError`` without matplotlib.
    """
    if size < 4:
        raise ValueError(f"size must be at least 4 pixels, got {size}")
    if repeated := sorted({c for c in characters if characters.count(c) > 1}):
        raise ValueError(f"every character is a class of its own, {''.join(repeated)!r} occurs more than once")
    faces = _faces()
    homes = {c: [path for path, known in faces.items() if ord(c) in known] for c in characters}
    if missing := [c for c, found in homes.items() if not found]:
        raise ValueError(
            f"no face of DejaVu or STIX has {''.join(missing)!r}; scripts() lists characters that have one"
        )
    generator = Generator().manual_seed(seed)
    images = [[_render(generator, c, homes[c], size) for _ in range(examples)] for c in characters]
    return torch.tensor(images, dtype=torch.uint8).reshape(len(characters), examples, 1, size, size)


@cache
def scripts(least: int = 20) -> dict[str, str]:
    """The letters that DejaVu Sans has, by script (the first word of their Unicode names), where there are ``least``.

    Letters with diacritics that Unicode composes of others are left out. Letters of different scripts may look the
    same: Latin, Greek and Cyrillic share a dozen capitals.

    >>> scripts()["armenian"][:5]
    'ԱԲԳԴԵ'
    """
    found: dict[str, str] = {}
    for code in sorted(_faces()[_folder() / "DejaVuSans.ttf"]):
        letter = chr(code)
        if unicodedata.category(letter) in ("Lu", "Ll", "Lo") and not unicodedata.decomposition(letter):
            script = unicodedata.name(letter).split()[0].lower()
            found[script] = found.get(script, "") + letter
    return {script: letters for script, letters in sorted(found.items()) if len(letters) >= least}


@cache
def _faces() -> dict[Path, frozenset[int]]:
    """Font files, and the code points that each has a glyph for."""
    paths = [_folder() / f"{name}.ttf" for name in _FACES]
    from matplotlib.ft2font import FT2Font

    return {path: frozenset(FT2Font(str(path)).get_charmap()) for path in paths}


def _folder() -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("glyphs() needs the fonts of matplotlib: pip install 'learnedopt[train]'") from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _render(generator: Generator, character: str, homes: list[Path], size: int) -> list[int]:
    """Gray levels of one random rendering, row by row."""
    from PIL import Image, ImageDraw

    path = homes[int(torch.randint(len(homes), (), generator=generator))]
    angle, shear, fill, right, down = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    # Drawn upright in the middle of a wide canvas, then turned and sheared, cut out and placed.
    side = size * _OVERSAMPLING
    canvas = Image.new("L", (3 * side, 3 * side))
    ImageDraw.Draw(canvas).text((1.5 * side, 1.5 * side), character, fill=255, font=_font(path, side), anchor="mm")
    slant = 0.4 * (shear - 0.5)
    slanted = canvas.transform(
        canvas.size, Image.Transform.AFFINE, (1, slant, -1.5 * side * slant, 0, 1, 0), Image.Resampling.BILINEAR
    ).rotate(24 * (angle - 0.5), Image.Resampling.BILINEAR)
    box = slanted.getbbox()
    if box is None:
        raise ValueError(f"{character!r} is blank in {path.name}")
    cut = slanted.crop(box)
    scale = (0.6 + 0.3 * fill) * side / max(cut.size)
    width, height = (max(1, round(scale * length)) for length in cut.size)
    placed = Image.new("L", (side, side))
    corner = (round(right * (side - width)), round(down * (side - height)))
    placed.paste(cut.resize((width, height), Image.Resampling.BOX), corner)
    return list(placed.reduce(_OVERSAMPLING).tobytes())


@cache
def _font(path: Path, size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
