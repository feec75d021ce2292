"""Recurrent language models of characters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from learnedopt.data import TextData, python_docs
from learnedopt.tasks.base import Params, TaskFamily
from learnedopt.tasks.characters import CharacterTask
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, integer, log_integer, log_uniform
from learnedopt.tasks.layers import weight

Cell = Literal["tanh", "gru", "lstm"]
_BLOCKS: dict[Cell, int] = {"tanh": 1, "gru": 3, "lstm": 4}


@dataclass(frozen=True, eq=False)
class CharRNNTask(CharacterTask):
    """Embedding, one recurrent layer, linear output at every step; the hidden state starts at zero."""

    copies: int
    text: TextData
    cell: Cell
    embedding: int
    width: int
    length: int
    gain: float
    batch_size: int

    def init(self, generator: Generator) -> Params:
        vocabulary, blocks = len(self.text.vocabulary), _BLOCKS[self.cell] * self.width
        gain, copies = self.gain, self.copies
        return {
            "embedding": weight(generator, copies, vocabulary, self.embedding, fan_in=1, gain=0.5 * gain),
            "input": weight(generator, copies, self.embedding, blocks, fan_in=self.embedding, gain=gain),
            "recurrent": weight(generator, copies, self.width, blocks, fan_in=self.width, gain=gain),
            "bias": torch.zeros(copies, blocks),
            "output": weight(generator, copies, self.width, vocabulary, fan_in=self.width, gain=gain),
            "output_bias": torch.zeros(copies, vocabulary),
        }

    def logits(self, params: Params, x: Tensor) -> Tensor:
        # Everything but the recurrence itself is done for all steps at once.
        drive = x @ params["embedding"] @ params["input"] + params["bias"]
        hidden = {"tanh": self._tanh, "gru": self._gru, "lstm": self._lstm}[self.cell](drive, params["recurrent"])
        return torch.stack(hidden, dim=-2) @ params["output"] + params["output_bias"]

    def _tanh(self, drive: Tensor, recurrent: Tensor) -> list[Tensor]:
        first, *rest = drive.unbind(-2)
        hidden = [torch.tanh(first)]
        for a in rest:
            hidden.append(torch.tanh(a + hidden[-1] @ recurrent))
        return hidden

    def _gru(self, drive: Tensor, recurrent: Tensor) -> list[Tensor]:
        parts = [2 * self.width, self.width]
        h = torch.zeros_like(drive[..., 0, : self.width])
        hidden = []
        for gates, candidate in zip(*(part.unbind(-2) for part in drive.split(parts, dim=-1))):
            from_gates, from_candidate = (h @ recurrent).split(parts, dim=-1)
            reset, keep = torch.sigmoid(gates + from_gates).chunk(2, dim=-1)
            new = torch.tanh(candidate + reset * from_candidate)
            h = new + keep * (h - new)
            hidden.append(h)
        return hidden

    def _lstm(self, drive: Tensor, recurrent: Tensor) -> list[Tensor]:
        h = memory = torch.zeros_like(drive[..., 0, : self.width])
        hidden = []
        for a in drive.unbind(-2):
            gates, candidate = (a + h @ recurrent).split([3 * self.width, self.width], dim=-1)
            forget, into, out = torch.sigmoid(gates).chunk(3, dim=-1)
            memory = forget * memory + into * torch.tanh(candidate)
            h = out * torch.tanh(memory)
            hidden.append(h)
        return hidden


@dataclass(frozen=True)
class CharRNN(TaskFamily):
    """Recurrent nets with a tanh, GRU or LSTM cell.

    >>> task = CharRNN(cells=("gru",)).draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.cell
    'gru'
    """

    text: TextData = field(default_factory=python_docs)
    cells: tuple[Cell, ...] = ("tanh", "gru", "lstm")
    embeddings: IntRange = (4, 16)
    widths: IntRange = (8, 32)
    lengths: IntRange = (5, 10)
    gains: Range = (0.5, 1.5)
    batch_sizes: IntRange = (4, 12)

    def __post_init__(self) -> None:
        check_known("cell", self.cells, _BLOCKS)

    def draw(self, generator: Generator, copies: int) -> CharRNNTask:
        return CharRNNTask(
            copies=copies,
            text=self.text,
            cell=choice(generator, self.cells),
            embedding=log_integer(generator, self.embeddings),
            width=log_integer(generator, self.widths),
            length=integer(generator, self.lengths),
            gain=log_uniform(generator, self.gains),
            batch_size=log_integer(generator, self.batch_sizes),
        )
