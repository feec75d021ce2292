"""Convolutional networks, on images and on signals."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from learnedopt.data import ImageData
from learnedopt.evaluation.tasks.base import RowsTask, classifier
from learnedopt.evaluation.tasks.sources import by_split, gray_patches, letters, small_textures, waveforms
from learnedopt.tasks.base import Batch, Params, Task
from learnedopt.tasks.layers import normalize, weight


def residual_conv(copies: int) -> Task:
    """A convolution of stride two, a residual block, max pooling, another block, all with batch norm: textures."""
    data, width = small_textures(), 8
    rows = by_split(data.split)

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for name, fan_in in [("stem", 3), *((f"{i}.{part}", width) for i in range(2) for part in ("a", "b"))]:
            params[f"{name}.weight"] = weight(generator, copies, width, fan_in, 3, 3, fan_in=9 * fan_in, gain=2**0.5)
            params[f"{name}.scale"], params[f"{name}.shift"] = torch.ones(copies, width), torch.zeros(copies, width)
        params["output"] = weight(generator, copies, width, 6, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 6)
        return params

    def layer(params: Params, name: str, x: Tensor, stride: int = 1) -> Tensor:
        x = normalize(F.conv2d(x, params[f"{name}.weight"], stride=stride, padding=1), "batch")
        return x * params[f"{name}.scale"][:, None, None] + params[f"{name}.shift"][:, None, None]

    def scores(params: Params, x: Tensor) -> Tensor:
        x = layer(params, "stem", x, stride=2).relu()
        for i in range(2):
            x = (x + layer(params, f"{i}.b", layer(params, f"{i}.a", x).relu())).relu()
            x = F.max_pool2d(x, 2) if i == 0 else x
        return x.mean((-2, -1)) @ params["output"] + params["output_bias"]

    return classifier(copies, rows, 16, initial, scores)


def denoising(copies: int) -> Task:
    """Three convolutions with leaky ReLU predict the noise in patches of photographs; mean absolute error."""
    widths = (1, 8, 8, 1)

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            params[f"{i}.weight"] = weight(generator, copies, fan_out, fan_in, 3, 3, fan_in=9 * fan_in)
            params[f"{i}.bias"] = torch.zeros(copies, fan_out)
        return params

    def augment(generator: Generator, batch: Batch) -> Batch:
        (x,) = batch
        noise = 0.2 * torch.randn(x.shape, generator=generator)
        return x - 0.5 + noise, noise

    def objective(params: Params, batch: Batch) -> Tensor:
        x, noise = batch
        for i in range(3):
            x = F.conv2d(x, params[f"{i}.weight"], params[f"{i}.bias"], padding=1)
            x = F.leaky_relu(x, 0.1) if i < 2 else x
        return (x - noise).abs().mean()

    return RowsTask(copies, gray_patches(), 16, initial, objective, augment)


def two_convolutions(copies: int, data: ImageData) -> Task:
    """Convolutions of 16 filters of 3 x 3 and 32 of 5 x 5, each with ReLU and max pooling, and a dense layer."""
    channels, *sides = data.train[0][0].shape
    layers = ((16, channels, 3), (32, 16, 5))
    pixels = 32 * math.prod(side // 4 for side in sides)

    def initial(generator: Generator, copies: int) -> Params:
        params: Params = {}
        for i, (width, fan_in, kernel) in enumerate(layers):
            shape = (width, fan_in, kernel, kernel)
            params[f"{i}.weight"] = weight(generator, copies, *shape, fan_in=fan_in * kernel**2, gain=2**0.5)
            params[f"{i}.bias"] = torch.zeros(copies, width)
        params["output"] = weight(generator, copies, pixels, data.num_classes, fan_in=pixels)
        params["output_bias"] = torch.zeros(copies, data.num_classes)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        for i, (_, _, kernel) in enumerate(layers):
            x = F.conv2d(x, params[f"{i}.weight"], params[f"{i}.bias"], padding=kernel // 2)
            x = F.max_pool2d(x.relu(), 2)
        return x.flatten(1) @ params["output"] + params["output_bias"]

    return classifier(copies, by_split(data.split), 128, initial, scores)


def separable_conv(copies: int) -> Task:
    """Two depthwise convolutions of stride two, each mixed by a matrix, layer norm and SiLU: Arabic letters.

    Source: Howard et al., *MobileNets*, 2017 (arXiv:1704.04861).
    """
    rows, widths = by_split(letters("arabic", 24).split), (8, 16)

    def initial(generator: Generator, copies: int) -> Params:
        params = {"stem": weight(generator, copies, 8, 1, 3, 3, fan_in=9)}
        fan_in = 8
        for i, width in enumerate(widths):
            params[f"{i}.depth"] = weight(generator, copies, fan_in, 1, 3, 3, fan_in=9)
            params[f"{i}.point"] = weight(generator, copies, fan_in, width, fan_in=fan_in, gain=2**0.5)
            params[f"{i}.bias"] = torch.zeros(copies, width)
            fan_in = width
        params["output"] = weight(generator, copies, fan_in * 4, 24, fan_in=fan_in * 4)
        params["output_bias"] = torch.zeros(copies, 24)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        x = F.silu(F.conv2d(x, params["stem"], stride=2, padding=1))
        for i in range(2):
            x = F.conv2d(x, params[f"{i}.depth"], stride=2, padding=1, groups=x.shape[1])
            x = torch.einsum("bchw,cd->bdhw", x, params[f"{i}.point"])
            x = F.silu(normalize(x, "layer") + params[f"{i}.bias"][:, None, None])
        return x.flatten(1) @ params["output"] + params["output_bias"]

    return classifier(copies, rows, 16, initial, scores)


def dilated_conv(copies: int) -> Task:
    """Three residual convolutions along time, dilated by 1, 2 and 4, group norm: kinds of noisy waves."""
    width, layers = 10, 3

    def initial(generator: Generator, copies: int) -> Params:
        params = {"enter": weight(generator, copies, 1, width, fan_in=1)}
        for i in range(layers):
            params[f"{i}.weight"] = weight(generator, copies, width, width, 3, fan_in=3 * width, gain=2**0.5)
            params[f"{i}.bias"] = torch.zeros(copies, width)
        params["output"] = weight(generator, copies, width, 3, fan_in=width)
        params["output_bias"] = torch.zeros(copies, 3)
        return params

    def scores(params: Params, x: Tensor) -> Tensor:
        h = (x[..., None] @ params["enter"]).transpose(-1, -2)
        for i in range(layers):
            inner = F.conv1d(normalize(h, "group"), params[f"{i}.weight"], padding=2**i, dilation=2**i)
            h = h + (inner + params[f"{i}.bias"][:, None]).relu()
        return h.mean(-1) @ params["output"] + params["output_bias"]

    return classifier(copies, waveforms(), 16, initial, scores)
