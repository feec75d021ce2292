"""Recurrent networks and transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.evaluation.tasks.base import RowsTask, classifier
from learnedopt.evaluation.tasks.sources import (
    chaotic_series,
    character_names,
    flat_images,
    letters,
    python_code,
    shuffled,
)
from learnedopt.tasks.base import Batch, Params, Task
from learnedopt.tasks.char_attention import CharAttention
from learnedopt.tasks.char_rnn import CharRNN
from learnedopt.tasks.layers import weight


def row_lstm(copies: int) -> Task:
    """A two-layer LSTM of 20 units reads Armenian letters row by row; its last state decides."""
    rows, width, pixels = flat_images(letters("armenian", 26)), 20, 12

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for i, fan_in in enumerate((pixels, width)):
            params[f"{i}.input"] = weight(generator, copies, fan_in, 4 * width, fan_in=fan_in)
            params[f"{i}.recurrent"] = weight(generator, copies, width, 4 * width, fan_in=width)
            params[f"{i}.bias"] = torch.zeros(copies, 4 * width)
        params["output"] = weight(generator, copies, width, 26, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 26)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        sequence = x.unflatten(-1, (pixels, pixels))
        for i in range(2):
            drive = sequence @ params[f"{i}.input"] + params[f"{i}.bias"]
            h = memory = torch.zeros_like(drive[..., 0, :width])
            hidden = []
            for a in drive.unbind(-2):
                gates, candidate = (a + h @ params[f"{i}.recurrent"]).split([3 * width, width], dim=-1)
                forget, into, out = torch.sigmoid(gates).chunk(3, dim=-1)
                memory = forget * memory + into * torch.tanh(candidate)
                h = out * torch.tanh(memory)
                hidden.append(h)
            sequence = torch.stack(hidden, dim=-2)
        return sequence[..., -1, :] @ params["output"] + params["output_bias"]

    return classifier(copies, rows, 16, initial, scores)


def gru_names(copies: int) -> Task:
    """A GRU of 40 units predicts the next character in the names of Unicode's characters, 16 at a time."""
    family = CharRNN(character_names(), ("gru",), (16, 16), (40, 40), (16, 16), (1.0, 1.0), (8, 8))
    return family.draw(Generator().manual_seed(0), copies)


def code_transformer(copies: int) -> Task:
    """Two pre-norm layers of four heads, width 32, predict the next character of Python code, 16 at a time."""
    family = CharAttention(
        python_code(), (2, 2), (4, 4), (8,), (16, 16), activations=("gelu",), gains=(1.0, 1.0), batch_sizes=(8, 8)
    )
    return family.draw(Generator().manual_seed(0), copies)


def forecasting(copies: int) -> Task:
    """A minimal gated unit of 24 cells predicts each next value of a chaotic series; mean absolute error.

    Source: Zhou et al., *Minimal Gated Unit for Recurrent Neural Networks*, 2016 (arXiv:1603.09420).
    """
    width = 24

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for part in ("gate", "candidate"):
            params[f"{part}.input"] = weight(generator, copies, 1, width, fan_in=1)
            params[f"{part}.recurrent"] = weight(generator, copies, width, width, fan_in=width)
            params[f"{part}.bias"] = torch.zeros(copies, width)
        params["output"] = weight(generator, copies, width, 1, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 1)
        return params

    def objective(params: Params, batch: Batch) -> Tensor:
        (series,) = batch
        x, y = series[..., :-1, None], series[..., 1:, None]
        gate, candidate = (x @ params[f"{p}.input"] + params[f"{p}.bias"] for p in ("gate", "candidate"))
        h = torch.zeros_like(gate[..., 0, :])
        hidden = []
        for a, b in zip(gate.unbind(-2), candidate.unbind(-2)):
            open_ = torch.sigmoid(a + h @ params["gate.recurrent"])
            h = h + open_ * (torch.tanh(b + (open_ * h) @ params["candidate.recurrent"]) - h)
            hidden.append(h)
        return (torch.stack(hidden, dim=-2) @ params["output"] + params["output_bias"] - y).abs().mean()

    return RowsTask(copies, chaotic_series(), 16, initial, objective)


def sorting_transformer(copies: int) -> Task:
    """A post-norm transformer layer of two heads without mask: the rank of each of ten numbers in the list."""
    length, width, heads = 10, 24, 2
    values = torch.rand(3000, length, generator=Generator().manual_seed(0))
    rows = shuffled(values, values.argsort(1).argsort(1))

    def initial(generator: Generator, copies: int) -> Params:
        params = {"enter": weight(generator, copies, 2, width, fan_in=1)}
        for name, fan_in, fan_out in (
            ("qkv", width, 3 * width),
            ("mix", width, width),
            ("up", width, 2 * width),
            ("down", 2 * width, width),
            ("output", width, length),
        ):
            params[name] = weight(generator, copies, fan_in, fan_out, fan_in=fan_in)
            params[f"{name}_bias"] = torch.zeros(copies, fan_out)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        h = torch.stack([2 * x - 1, torch.ones_like(x)], dim=-1) @ params["enter"]
        qkv = (h @ params["qkv"] + params["qkv_bias"]).unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width / heads), dim=-1)
        mixed = (attention @ v).transpose(-3, -2).flatten(-2)
        h = F.layer_norm(h + mixed @ params["mix"] + params["mix_bias"], (width,))
        inner = (h @ params["up"] + params["up_bias"]).relu() @ params["down"] + params["down_bias"]
        return F.layer_norm(h + inner, (width,)) @ params["output"] + params["output_bias"]

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(scores(params, x).flatten(0, -2), y.flatten())

    return RowsTask(copies, rows, 16, initial, objective, scores=scores)
