"""Text as tensors of characters."""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

# Fixed, so that a model of these characters has the same shape under every version of Python.
_PYTHON_DOCS_VOCABULARY = "\n " + string.ascii_lowercase + string.digits + "-.,_*=()'\":`[]{}|/<>+;@#%!"


@dataclass(frozen=True, eq=False)
class TextData:
    """Consecutive characters of a text in three disjoint stretches, each int64 ``(N,)`` of places in ``vocabulary``.

    >>> data = python_docs()
    >>> len(data.vocabulary), data.split("train").dtype
    (64, torch.int64)
    """

    name: str
    vocabulary: str = field(repr=False)
    train: Tensor = field(repr=False)
    validation: Tensor = field(repr=False)
    test: Tensor = field(repr=False)

    def split(self, name: Literal["train", "validation", "test"]) -> Tensor:
        """The characters of one split; raises ``ValueError`` for another name."""
        if name not in ("train", "validation", "test"):
            raise ValueError(f"split must be 'train', 'validation' or 'test', got {name!r}")
        tokens: Tensor = getattr(self, name)
        return tokens


@cache
def python_docs() -> TextData:
    """The language reference that Python carries for its ``help()``: about 400,000 characters of English, no download.

    Lower-cased, runs of spaces made one, characters outside a fixed vocabulary of 64 left out. The text itself
    differs a little between versions of Python.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics)).lower()
    text = text.translate(str.maketrans("’‘“”", "''\"\""))
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    known = set(_PYTHON_DOCS_VOCABULARY)
    text = "".join(character for character in text if character in known)
    return split_text("python_docs", text, _PYTHON_DOCS_VOCABULARY)


def text_file(path: str | PathLike[str]) -> TextData:
    """A UTF-8 text file, its vocabulary being the characters that occur in it, in order of their code points.

    Raises ``ValueError`` if it holds fewer than ten characters, too few to split.
    """
    text = Path(path).read_text(encoding="utf-8")
    if len(text) < 10:
        raise ValueError(f"{str(path)!r} holds {len(text)} characters; at least 10 are needed to split it in three")
    return split_text(Path(path).name, text, "".join(sorted(set(text))))


def split_text(name: str, text: str, vocabulary: str) -> TextData:
    """The first 80 % for training, the next 10 % for validation, the rest for testing."""
    place = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([place[character] for character in text], dtype=torch.int64)
    tenth = len(tokens) // 10
    train, validation, test = tokens.split([len(tokens) - 2 * tenth, tenth, tenth])
    return TextData(name, vocabulary, train, validation, test)
