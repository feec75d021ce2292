"""One network, many episodes: each with parameters and statistics of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from learnedopt.fewshot.fast.convolution import Geometry, convolution
from learnedopt.fewshot.network import Network
from learnedopt.fewshot.normalization import (
    EpisodicBatchNorm,
    Statistics,
    batch_norms,
    has_hooks,
    in_channels,
    statistics,
)


def apply(
    module: nn.Module,
    params: dict[str, Tensor],
    x: Tensor,
    *,
    shared: dict[str, Tensor] | None = None,
    rows: int | None = None,
    running: bool = False,
    twice: bool = False,
    record: Callable[[Statistics], None] | None = None,
) -> Tensor:
    """Run a network on a batch of episodes, each with parameters and statistics of its own.

    Args:
        module: ``(n, *example)`` to ``(n, outputs)``.
        params: Parameters by name that differ between episodes, each ``(E, *shape)``; the module has the others.
        x: ``(E, n, *example)``.
        shared: Parameters and buffers by name to use in place of the module's own, in all episodes.
        rows, running, twice: As in :func:`statistics`.
        record: Called with the statistics used, each ``(E, channels)``.

    Returns:
        ``(E, n, outputs)``.
    """
    shared = shared or {}
    if not params and (running or not batch_norms(module)):
        with statistics(running=True):
            flat = torch.func.functional_call(module, shared, (x.flatten(0, 1),), tie_weights=False)
        return flat.unflatten(0, x.shape[:2])
    layers = _layers(module, "", {})
    if layers is not None and (x.ndim == 5 or not any(isinstance(layer, _OF_IMAGES) for _, layer in layers)):
        found: Statistics = {}
        with statistics(rows, running=running, twice=twice, record=None if record is None else found):
            outputs = _run_layers(_pooled_first(layers), {**shared, **params}, x, running, twice)
        if record is not None:
            record(found)
        return outputs
    norms: list[EpisodicBatchNorm] = []
    together = len(x) > 1

    def one(own: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        used: Statistics = {}
        # The fused forms of attention have no second derivatives, nor a rule for vmap.
        attention = sdpa_kernel(SDPBackend.MATH) if twice or together else nullcontext()
        with attention, statistics(rows, running=running, twice=twice, record=None if record is None else used):
            outputs = torch.func.functional_call(module, {**shared, **own}, (x,), tie_weights=False)
        norms[:] = used
        return outputs, list(used.values())

    if len(x) == 1:
        # squeeze, because the derivative of x[0] would be an array of zeros and a copy into it.
        outputs, alone = one({name: value.squeeze(0) for name, value in params.items()}, x.squeeze(0))
        if record is not None:
            record({norm: (mean[None], variance[None]) for norm, (mean, variance) in zip(norms, alone)})
        return outputs.unsqueeze(0)

    outputs, used = torch.func.vmap(one, randomness="different")(params, x)
    if record is not None:
        record(dict(zip(norms, used)))
    return outputs


def is_plain(module: nn.Module) -> bool:
    """Whether it is a sequence of layers that :func:`apply` knows, and runs itself."""
    return _layers(module, "", {}) is not None


def numbers_per_image(module: nn.Module, example_shape: tuple[int, ...]) -> float:
    """How many numbers the first convolution makes of an example: commonly the largest array of the network.

    0 without convolutions, or without a :class:`Network`; infinity where that is not a plain sequence of layers.
    """
    network = next((child for child in module.modules() if isinstance(child, Network)), None)
    if network is None:
        return 0.0
    layers = _layers(network, "", {})
    of_images = [layer for _, layer in layers or () if isinstance(layer, _OF_IMAGES)]
    if layers is None or (of_images and len(example_shape) != 3):
        return math.inf
    for layer in of_images:
        if isinstance(layer, nn.Conv2d):
            return float(layer.out_channels * math.prod(_pixels(layer, *example_shape[1:])))
    return 0.0


_OF_IMAGES = (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
_ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)


def _layers(module: nn.Module, prefix: str, seen: dict[nn.Module, str]) -> list[tuple[str, nn.Module]] | None:
    """The layers of a plain network, with the names of their parameters; ``None`` if it is anything else.

    Running these on arrays with an axis of episodes takes less time than ``vmap``, which reaches the same products by
    way of many more operations, and in second derivatives of convolutions takes one episode after another.
    """
    if has_hooks(module):
        return None
    # A module that has two places goes by the name of the first.
    prefix = seen.setdefault(module, prefix)
    if type(module) in (nn.Linear, EpisodicBatchNorm, *_ELEMENTWISE) or _plain(module):
        return [(prefix, module)]
    if type(module) is nn.Sequential:
        children = [(name, child) for name, child in module._modules.items() if child is not None]
    elif type(module) is Network:
        children = [("backbone", module.backbone), ("", nn.Flatten()), ("head", module.head)]
    else:
        return None
    found: list[tuple[str, nn.Module]] = []
    for name, child in children:
        layers = _layers(child, f"{prefix}{name}.", seen)
        if layers is None:
            return None
        found += layers
    return found


def _plain(module: nn.Module) -> bool:
    """Whether it is a layer with settings that :func:`_run_layers` knows."""
    if type(module) is nn.Flatten:
        return (module.start_dim, module.end_dim) == (1, -1)
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    if type(module) is nn.MaxPool2d:
        return not module.return_indices
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def _pooled_first(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """ReLUs after the max-pooling that follows them: the same values and gradients, of fewer numbers."""
    layers = list(layers)
    for i, (_, layer) in enumerate(layers[1:]):
        if type(layer) is nn.MaxPool2d and type(layers[i][1]) is nn.ReLU:
            layers[i], layers[i + 1] = layers[i + 1], layers[i]
    return layers


def _run_layers(
    layers: list[tuple[str, nn.Module]], values: dict[str, Tensor], x: Tensor, running: bool, twice: bool
) -> Tensor:
    """``(E, n, *example)`` through the layers, with weights ``(E, *shape)``, or shared ``(*shape)``."""
    # Vectors are (E, n, features). Until it is flattened, what has more axes is (n, E * channels, ...): channels of
    # different episodes are different channels, so that one operation does all.
    episodes, vectors = len(x), x.ndim <= 3
    x = x if vectors else _episodes_in_channels(x)
    for (prefix, layer), following in zip(layers, [*(layer for _, layer in layers[1:]), None]):
        if isinstance(layer, nn.Flatten):
            x = x if vectors else _episodes_first(x, episodes).flatten(2)
            vectors = True
        elif isinstance(layer, nn.Linear):
            x = x if vectors else _episodes_first(x, episodes)
            weight = values.get(f"{prefix}weight", layer.weight)
            x = _linear(x, weight, values.get(f"{prefix}bias", layer.bias))
            x = x if vectors else _episodes_in_channels(x)
        elif isinstance(layer, nn.Conv2d):
            weight, bias = (values.get(prefix + name, getattr(layer, name)) for name in ("weight", "bias"))
            if bias is not None and isinstance(following, EpisodicBatchNorm) and not running:
                bias = bias.detach()  # cancels in x - mean: its gradient is zero, and slow to compute
            x = _convolution(layer, x, weight, bias, episodes, twice)
        elif isinstance(layer, EpisodicBatchNorm):
            x = _episodes_in_channels(x) if vectors else x
            x = layer.episodes(x, episodes, values, prefix)
            x = _episodes_first(x, episodes) if vectors else x
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            x = x.mean((-2, -1), keepdim=True)
        else:
            x = layer(x)
    return x if vectors else _episodes_first(x, episodes)


def _episodes_in_channels(x: Tensor) -> Tensor:
    """``(E, n, channels, ...)`` to ``(n, E * channels, ...)``."""
    return x.transpose(0, 1).flatten(1, 2)


def _episodes_first(x: Tensor, episodes: int) -> Tensor:
    """``(n, E * channels, ...)`` to ``(E, n, channels, ...)``."""
    return x.unflatten(1, (episodes, -1)).transpose(0, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(E, ..., inputs)`` to ``(E, ..., outputs)``."""
    if weight.ndim == 2 and (bias is None or bias.ndim == 1):
        return F.linear(x, weight, bias)
    rows = x.flatten(1, -2)
    weight = weight.expand(len(x), *weight.shape[-2:]).mT
    if bias is None:
        outputs = torch.bmm(rows, weight)
    else:
        outputs = torch.baddbmm(bias.expand(len(x), -1).unsqueeze(1), rows, weight)
    return outputs.unflatten(1, x.shape[1:-1])


def _convolution(
    layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, episodes: int, twice: bool
) -> Tensor:
    """``(n, E * inputs, height, width)`` to ``(n, E * outputs, ...)``."""
    padding, stride, dilation = layer.padding, layer.stride, layer.dilation
    assert not isinstance(padding, str)
    if _grouped(x.device):
        x, weight = _channels_last(x), in_channels(weight, 4, episodes)
        bias = None if bias is None else in_channels(bias, 1, episodes)
        if episodes == 1 and not twice:  # where torch's own derivatives are as fast
            return F.conv2d(x, weight, bias, stride, padding, dilation)
        return convolution(x, weight, bias, Geometry(stride, padding, dilation, episodes))
    if episodes == 1 or (weight.ndim == 4 and (bias is None or bias.ndim == 1)):
        images = _episodes_first(x, episodes).flatten(0, 1)
        weight, bias = in_channels(weight, 4, 1), None if bias is None else in_channels(bias, 1, 1)
        images = F.conv2d(images, weight, bias, stride, padding, dilation)
        return _episodes_in_channels(images.unflatten(0, (episodes, -1)))
    # The weights of each episode are multiplied with the patches of images that they meet.
    patches = F.unfold(x, layer.kernel_size, dilation, padding, stride)
    rows = patches.unflatten(1, (episodes, -1)).permute(1, 2, 0, 3).flatten(2)
    weight = weight.expand(episodes, *weight.shape[-4:]).flatten(2)
    if bias is None:
        outputs = torch.bmm(weight, rows)
    else:
        outputs = torch.baddbmm(bias.expand(episodes, -1).unsqueeze(2), weight, rows)
    return outputs.unflatten(2, (len(x), *_pixels(layer, *x.shape[2:]))).permute(2, 0, 1, 3, 4).flatten(1, 2)


def _pixels(layer: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Of the outputs, for images of this size."""
    padding = layer.padding
    assert not isinstance(padding, str)
    rows, columns = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            (height, width), padding, layer.dilation, layer.kernel_size, layer.stride
        )
    )
    return rows, columns


def _grouped(device: torch.device) -> bool:
    """Whether convolutions in groups are fast: on a CPU they take a third of the time of products with patches."""
    return device.type == "cpu"


def _channels_last(x: Tensor) -> Tensor:
    """The memory format in which a CPU is fast, and in which the outputs will then be too."""
    # Not by memory_format, which vmap does not know, and which leaves the strides of a single channel as they are.
    return x.movedim(1, -1).contiguous().flatten(-2).unflatten(-1, (-1, x.shape[1])).movedim(-1, 1)
