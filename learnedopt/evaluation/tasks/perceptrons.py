"""Fully connected networks: wide, deep, residual, mixing, normalized."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.evaluation.tasks.base import RowsTask, classifier
from learnedopt.evaluation.tasks.sources import flat_images, letters, shuffled, tabular
from learnedopt.tasks.base import Batch, Params, Task
from learnedopt.tasks.layers import init_mlp, mlp, normalize, weight


def wide_mlp(copies: int) -> Task:
    """Two hidden layers of 128 ReLU units: Georgian letters."""
    rows = flat_images(letters("georgian", 26))

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (144, 128, 128, 26), gain=2**0.5)

    return classifier(copies, rows, 32, initial, partial(mlp, activation="relu"))


def deep_tanh(copies: int) -> Task:
    """Ten hidden layers of 24 tanh units, without norm or shortcut: Hebrew letters."""
    rows = flat_images(letters("hebrew", 20))

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (144, *[24] * 10, 20))

    return classifier(copies, rows, 32, initial, partial(mlp, activation="tanh"))


def residual_quantiles(copies: int) -> Task:
    """Four residual blocks with layer norm and SiLU; the pinball loss of three quantiles on the diabetes table."""
    width, depth, levels = 24, 4, torch.tensor([0.1, 0.5, 0.9])

    def initial(generator: Generator, copies: int) -> Params:
        params = {"enter": weight(generator, copies, 10, width, fan_in=10)}
        for i in range(depth):
            params[f"{i}.scale"], params[f"{i}.shift"] = torch.ones(copies, width), torch.zeros(copies, width)
            params[f"{i}.up"] = weight(generator, copies, width, 2 * width, fan_in=width)
            params[f"{i}.up_bias"] = torch.zeros(copies, 2 * width)
            params[f"{i}.down"] = weight(generator, copies, 2 * width, width, fan_in=2 * width)
            params[f"{i}.down_bias"] = torch.zeros(copies, width)
        params["output"] = weight(generator, copies, width, len(levels), fan_in=width)
        params["output_bias"] = torch.zeros(copies, len(levels))
        return params

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        h = x @ params["enter"]
        for i in range(depth):
            normed = F.layer_norm(h, (width,)) * params[f"{i}.scale"] + params[f"{i}.shift"]
            inner = F.silu(normed @ params[f"{i}.up"] + params[f"{i}.up_bias"])
            h = h + inner @ params[f"{i}.down"] + params[f"{i}.down_bias"]
        error = y[:, None] - (h @ params["output"] + params["output_bias"])
        return torch.maximum(levels.to(error) * error, (levels.to(error) - 1) * error).mean()

    return RowsTask(copies, tabular("diabetes"), 32, initial, objective)


def mlp_mixer(copies: int) -> Task:
    """Two mixer layers over nine patches of 4 x 4: Tifinagh letters.

    Source: Tolstikhin et al., *MLP-Mixer*, 2021 (arXiv:2105.01601).
    """
    rows, patches, width, depth = flat_images(letters("tifinagh", 30)), 9, 20, 2

    def initial(generator: Generator, copies: int) -> Params:
        params = {"enter": weight(generator, copies, 16, width, fan_in=16)}
        for i in range(depth):
            for part, size, hidden in (("patches", patches, 16), ("channels", width, 2 * width)):
                params[f"{i}.{part}.scale"] = torch.ones(copies, width)
                params[f"{i}.{part}.up"] = weight(generator, copies, size, hidden, fan_in=size)
                params[f"{i}.{part}.up_bias"] = torch.zeros(copies, hidden)
                params[f"{i}.{part}.down"] = weight(generator, copies, hidden, size, fan_in=hidden)
                params[f"{i}.{part}.down_bias"] = torch.zeros(copies, size)
        params["output"] = weight(generator, copies, width, 30, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 30)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        h = x.unflatten(-1, (3, 4, 3, 4)).transpose(-3, -2).flatten(-2).flatten(-3, -2) @ params["enter"]
        for i in range(depth):
            for part in ("patches", "channels"):
                inner = F.layer_norm(h, (width,)) * params[f"{i}.{part}.scale"]
                inner = inner.transpose(-1, -2) if part == "patches" else inner
                inner = F.gelu(inner @ params[f"{i}.{part}.up"] + params[f"{i}.{part}.up_bias"])
                inner = inner @ params[f"{i}.{part}.down"] + params[f"{i}.{part}.down_bias"]
                h = h + (inner.transpose(-1, -2) if part == "patches" else inner)
        return h.mean(-2) @ params["output"] + params["output_bias"]

    return classifier(copies, rows, 16, initial, scores)


def tabular_gelu(copies: int) -> Task:
    """Two hidden layers of 48 GELU units: the breast cancer table."""

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (30, 48, 48, 2))

    return classifier(copies, tabular("breast_cancer"), 32, initial, partial(mlp, activation="gelu"))


def normalized_hinge(copies: int) -> Task:
    """Two layers of 32 units with batch norm and leaky ReLU; the multi-class hinge loss on the wine table."""

    def initial(generator: Generator, copies: int) -> Params:
        params = init_mlp(generator, copies, (13, 32, 32, 3))
        return params | {f"{i}.scale": torch.ones(copies, 32) for i in range(2)}

    def scores(params: Params, x: Tensor) -> Tensor:
        for i in range(2):
            x = normalize(x @ params[f"{i}.weight"], "batch") * params[f"{i}.scale"] + params[f"{i}.bias"]
            x = F.leaky_relu(x, 0.1)
        return x @ params["2.weight"] + params["2.bias"]

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        out = scores(params, x)
        margins = 1 + out - out.gather(-1, y[:, None])
        wrong = torch.arange(3, device=y.device) != y[:, None]
        return (margins.relu() * wrong).sum(-1).mean()

    return RowsTask(copies, tabular("wine"), 16, initial, objective, scores=scores)


def distillation(copies: int) -> Task:
    """A student with one layer of 40 ELU units learns the softened outputs of a fixed network on Cyrillic letters.

    The teacher is a random network of two layers. The loss is the Kullback-Leibler divergence at temperature 2, times
    its square.

    Source: Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015 (arXiv:1503.02531).
    """
    rows, temperature = flat_images(letters("cyrillic", 24)), 2.0
    teacher = {
        name: value[0] for name, value in init_mlp(Generator().manual_seed(0), 1, (144, 64, 10), gain=3.0).items()
    }

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (144, 40, 10))

    def objective(params: Params, batch: Batch) -> Tensor:
        x, _ = batch
        target = torch.log_softmax(mlp({k: v.to(x) for k, v in teacher.items()}, x, "tanh") / temperature, dim=-1)
        student = torch.log_softmax(mlp(params, x, "elu") / temperature, dim=-1)
        return temperature**2 * (target.exp() * (target - student)).sum(-1).mean()

    return RowsTask(copies, rows, 32, initial, objective)


def mixture_density(copies: int) -> Task:
    """The negative log-likelihood of a mixture of five Gaussians, whose parameters a tanh net reads from x.

    The data invert ``x = y + 0.3 sin(2πy) + noise``, y uniform in [0, 1], so that an x has several ys. What is
    predicted is ``10 y``, whose density is below 1: the loss stays positive.

    Source: Bishop, *Mixture Density Networks*, 1994, section 5.
    """
    rows = shuffled(torch.rand(2000, 1, generator=Generator().manual_seed(0)))

    def initial(generator: Generator, copies: int) -> Params:
        return init_mlp(generator, copies, (1, 24, 24, 15))

    def augment(generator: Generator, batch: Batch) -> Batch:
        (y,) = batch
        noise = 0.05 * torch.randn(y.shape, generator=generator)
        return y + 0.3 * torch.sin(2 * torch.pi * y) + noise, 10 * y

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        logits, mean, spread = mlp(params, x, "tanh").chunk(3, dim=-1)
        # Bounded below, because a component could otherwise shrink onto a point.
        std = F.softplus(spread) + 0.1
        log_density = -0.5 * ((y - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(torch.log_softmax(logits, -1) + log_density, dim=-1).mean()

    return RowsTask(copies, rows, 32, initial, objective, augment)
