"""One network, many episodes: each with parameters and statistics of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt.fewshot.normalization import EpisodicBatchNorm, Statistics, batch_norms, statistics


class Network(nn.Module):
    """A backbone and a read-out of its features."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.backbone(x).flatten(1))
        return outputs


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
    tied: dict[str, str] | None = None,
) -> Tensor:
    """Run a network on a batch of episodes, each with parameters and statistics of its own.

    Args:
        module: ``(n, *example)`` to ``(n, outputs)``.
        params: Parameters by name that differ between episodes, each ``(E, *shape)``; the module has the others.
        x: ``(E, n, *example)``.
        shared: Parameters and buffers by name to use in place of the module's own, in all episodes.
        rows, running, twice: As in :func:`statistics`.
        record: Called with the statistics used, each ``(E, channels)``.
        tied: What :func:`tied_names` gives for the module, where ``params`` holds parameters that may be tied.

    Returns:
        ``(E, n, outputs)``.
    """
    shared = shared or {}
    if tied:
        params = params | {name: params[first] for name, first in tied.items() if first in params}
    if len(x) == 1:
        # squeeze, because the derivative of x[0] would be an array of zeros and a copy into it.
        found: Statistics = {}
        own = {name: value.squeeze(0) for name, value in params.items()}
        with statistics(rows, running=running, twice=twice, record=None if record is None else found):
            outputs = torch.func.functional_call(
                module, {**shared, **own}, (x.squeeze(0),), tie_weights=False
            ).unsqueeze(0)
        if record is not None:
            record({norm: (mean[None], variance[None]) for norm, (mean, variance) in found.items()})
        return outputs
    if not params and (running or not batch_norms(module)):
        with statistics(running=True):
            flat = torch.func.functional_call(module, shared, (x.flatten(0, 1),), tie_weights=False)
        return flat.unflatten(0, x.shape[:2])
    layers = _layers(module, "", {})
    if layers is not None:
        found = {}
        with statistics(rows, running=running, twice=twice, record=None if record is None else found):
            outputs = _run_layers(layers, {**shared, **params}, x)
        if record is not None:
            record(found)
        return outputs
    norms: list[EpisodicBatchNorm] = []

    def one(own: dict[str, Tensor], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        used: Statistics = {}
        with statistics(rows, running=running, twice=twice, record=None if record is None else used):
            outputs = torch.func.functional_call(module, {**shared, **own}, (x,), tie_weights=False)
        norms[:] = used
        return outputs, list(used.values())

    outputs, used = torch.func.vmap(one, randomness="different")(params, x)
    if record is not None:
        record(dict(zip(norms, used)))
    return outputs


def tied_names(module: nn.Module) -> dict[str, str]:
    """Parameters that two modules share: further names, and the name in ``named_parameters``.

    ``functional_call`` could find them itself, but takes long over it, and leaves a module that has two places in the
    network with the parameters of the call.
    """
    first: dict[nn.Parameter, str] = {}
    owned = (
        (f"{prefix}.{name}" if prefix else name, value)
        for prefix, child in module.named_modules()
        for name, value in child._parameters.items()
        if value is not None
    )
    return {name: first[value] for name, value in owned if first.setdefault(value, name) != name}


_ELEMENTWISE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh)


def _layers(module: nn.Module, prefix: str, seen: dict[nn.Module, str]) -> list[tuple[str, nn.Module]] | None:
    """The layers of a plain network, with the names of their parameters; ``None`` if it is anything else.

    Running these on arrays with an axis of episodes takes less time than ``vmap``, which reaches the same matrix
    products by way of many more operations, and makes of convolutions such with groups, which are slow on a CPU.
    """
    if module._forward_hooks or module._forward_pre_hooks:
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


def _run_layers(layers: list[tuple[str, nn.Module]], values: dict[str, Tensor], x: Tensor) -> Tensor:
    """``(E, n, *example)`` through the layers, with weights ``(E, *shape)``, or shared ``(*shape)``."""
    # Vectors are (E, n, features); what has more axes is (E, channels, n, ...) until it is flattened.
    x = x.transpose(1, 2) if x.ndim > 3 else x
    for prefix, layer in layers:
        if isinstance(layer, nn.Flatten):
            x = x.transpose(1, 2).flatten(2) if x.ndim > 3 else x
        elif isinstance(layer, nn.Linear):
            weight = values.get(f"{prefix}weight", layer.weight)
            x = _linear(x, weight, values.get(f"{prefix}bias", layer.bias))
        elif isinstance(layer, nn.Conv2d):
            weight = values.get(f"{prefix}weight", layer.weight)
            x = _convolution(layer, x, weight, values.get(f"{prefix}bias", layer.bias))
        elif isinstance(layer, EpisodicBatchNorm):
            vectors = x.ndim == 3
            x = layer.episodes(x.mT if vectors else x, values, prefix)
            x = x.mT if vectors else x
        elif isinstance(layer, nn.MaxPool2d):
            x = layer(x.flatten(0, 2)).unflatten(0, x.shape[:3])
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            x = x.mean((-2, -1), keepdim=True)
        else:
            x = layer(x)
    return x.transpose(1, 2) if x.ndim > 3 else x


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


def _convolution(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(E, inputs, n, height, width)`` to ``(E, outputs, n, ...)``.

    Weights of each episode are multiplied with the patches of images that they meet, all episodes in one product.
    """
    padding, stride, dilation = layer.padding, layer.stride, layer.dilation
    assert not isinstance(padding, str)
    episodes, inputs, n = x.shape[:3]
    if weight.ndim == 4 and (bias is None or bias.ndim == 1):
        images = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight, bias, stride, padding, dilation)
        return images.unflatten(0, (episodes, n)).transpose(1, 2)
    patches = F.unfold(x.flatten(1, 2), layer.kernel_size, dilation, padding, stride)
    patches = patches.view(episodes, inputs, n, *layer.kernel_size, -1)
    # Places in a patch first, then channels: the order of weights in the memory format that the networks have.
    patches = patches.permute(0, 3, 4, 1, 2, 5).reshape(episodes, -1, n * patches.shape[-1])
    rows = weight.expand(episodes, *weight.shape[-4:]).permute(0, 1, 3, 4, 2).flatten(2)
    if bias is None:
        outputs = torch.bmm(rows, patches)
    else:
        outputs = torch.baddbmm(bias.expand(episodes, -1).unsqueeze(2), rows, patches)
    height = (x.shape[3] + 2 * padding[0] - dilation[0] * (layer.kernel_size[0] - 1) - 1) // stride[0] + 1
    return outputs.view(episodes, -1, n, height, patches.shape[-1] // (n * height))
