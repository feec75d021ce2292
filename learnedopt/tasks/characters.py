"""What the character models share: windows of text, and the next character as the class."""

from __future__ import annotations

import torch
from torch import Generator

from learnedopt.data import TextData
from learnedopt.tasks.base import Batch, Split
from learnedopt.tasks.layers import ClassificationTask


class CharacterTask(ClassificationTask):
    """Predict each next character of random windows of a text.

    A batch is the characters one-hot, ``(copies, batch_size, length, vocabulary)``, so that an embedding is a matrix
    product, and the characters that follow them, ``(copies, batch_size, length)``.
    """

    text: TextData
    length: int
    batch_size: int

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        tokens = self.text.split(split)
        starts = torch.randint(len(tokens) - self.length, (self.copies, self.batch_size, 1), generator=generator)
        window = tokens[starts + torch.arange(self.length + 1)]
        return torch.eye(len(self.text.vocabulary))[window[..., :-1]], window[..., 1:]
