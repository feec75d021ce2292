"""Small transformers on characters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data import TextData, python_docs
from learnedopt.tasks.base import Params, TaskFamily
from learnedopt.tasks.characters import CharacterTask
from learnedopt.tasks.draws import IntRange, Range, check_known, choice, integer, log_uniform
from learnedopt.tasks.layers import ACTIVATIONS, weight


@dataclass(frozen=True, eq=False)
class CharAttentionTask(CharacterTask):
    """A causal transformer: learned positions, layer norm before each block, hidden layer twice the width."""

    copies: int
    text: TextData
    layers: int
    heads: int
    width: int
    length: int
    activation: str
    gain: float
    batch_size: int

    def init(self, generator: Generator) -> Params:
        vocabulary, width, copies = len(self.text.vocabulary), self.width, self.copies

        def dense(fan_in: int, fan_out: int) -> Tensor:
            return weight(generator, copies, fan_in, fan_out, fan_in=fan_in, gain=self.gain)

        params = {
            "embedding": weight(generator, copies, vocabulary, width, fan_in=1, gain=0.3 * self.gain),
            "position": weight(generator, copies, self.length, width, fan_in=1, gain=0.1 * self.gain),
        }
        for i in range(self.layers):
            params |= {
                f"{i}.norm1": torch.ones(copies, width),
                f"{i}.qkv": dense(width, 3 * width),
                f"{i}.mix": dense(width, width),
                f"{i}.norm2": torch.ones(copies, width),
                f"{i}.up": dense(width, 2 * width),
                f"{i}.up_bias": torch.zeros(copies, 2 * width),
                f"{i}.down": dense(2 * width, width),
                f"{i}.down_bias": torch.zeros(copies, width),
            }
        params["output"] = dense(width, vocabulary)
        params["output_bias"] = torch.zeros(copies, vocabulary)
        return params

    def logits(self, params: Params, x: Tensor) -> Tensor:
        h = x @ params["embedding"] + params["position"]
        for i in range(self.layers):
            normed = F.layer_norm(h, (self.width,)) * params[f"{i}.norm1"]
            h = h + self._attend(normed @ params[f"{i}.qkv"]) @ params[f"{i}.mix"]
            normed = F.layer_norm(h, (self.width,)) * params[f"{i}.norm2"]
            inner = ACTIVATIONS[self.activation](normed @ params[f"{i}.up"] + params[f"{i}.up_bias"])
            h = h + inner @ params[f"{i}.down"] + params[f"{i}.down_bias"]
        return h @ params["output"] + params["output_bias"]

    def _attend(self, qkv: Tensor) -> Tensor:
        """Causal attention of every head: ``(batch, length, 3 * width) -> (batch, length, width)``."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        future = torch.full((self.length, self.length), -math.inf, dtype=qkv.dtype, device=qkv.device).triu(1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return (torch.softmax(scores + future, dim=-1) @ v).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class CharAttention(TaskFamily):
    """Transformers of one or two layers; ``head_widths`` are per head.

    >>> task = CharAttention(layers=(2, 2)).draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.layers
    2
    """

    text: TextData = field(default_factory=python_docs)
    layers: IntRange = (1, 2)
    heads: IntRange = (1, 2)
    head_widths: tuple[int, ...] = (8, 12, 16)
    lengths: IntRange = (5, 10)
    activations: tuple[str, ...] = ("relu", "gelu")
    gains: Range = (0.5, 1.5)
    batch_sizes: IntRange = (4, 8)

    def __post_init__(self) -> None:
        check_known("activation", self.activations, ACTIVATIONS)

    def draw(self, generator: Generator, copies: int) -> CharAttentionTask:
        heads = integer(generator, self.heads)
        return CharAttentionTask(
            copies=copies,
            text=self.text,
            layers=integer(generator, self.layers),
            heads=heads,
            width=heads * choice(generator, self.head_widths),
            length=integer(generator, self.lengths),
            activation=choice(generator, self.activations),
            gain=log_uniform(generator, self.gains),
            batch_size=integer(generator, self.batch_sizes),
        )
