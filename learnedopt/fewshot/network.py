"""A learner's network: somebody's backbone and a read-out, and what a learner must know of the backbone."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from learnedopt.fewshot.normalization import statistics


class Network(nn.Module):
    """A backbone and a read-out of its features."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.backbone(x).flatten(1))
        return outputs


def feature_size(backbone: nn.Module, example_shape: tuple[int, ...]) -> int:
    """How many features a backbone makes of one example.

    Raises:
        ValueError: it does not take such examples.
    """
    like = next(backbone.parameters(), torch.empty(0))
    training = backbone.training
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, *example_shape, dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the backbone does not take examples of shape {example_shape}: {error}") from error
    finally:
        backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != 2:
        raise ValueError("a backbone must return one tensor (n, ...), features of each example")
    return math.prod(features.shape[1:])


def check_stateless(backbone: nn.Module, example_shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` if a forward pass in training changes buffers: a fit must leave no trace in the learner.

    Args:
        backbone: With its batch normalization replaced by :func:`learnedopt.fewshot.normalization.episodic`.
        example_shape: Of one example.
    """
    trial = copy.deepcopy(backbone).train()
    like = next(trial.parameters(), torch.empty(0))
    if like.is_meta:  # without numbers, as in building a network for its shapes
        return
    before = {name: value.clone() for name, value in trial.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), statistics():
        for weight in trial.parameters():  # what follows the weights is still now, and moves in training
            weight.add_(torch.randn_like(weight))
        trial(torch.rand(4, *example_shape, dtype=like.dtype, device=like.device))
    if changed := [name for name, value in trial.named_buffers() if not torch.equal(value, before[name])]:
        raise ValueError(
            f"a forward pass of the backbone changes its buffers {', '.join(changed)}, and fitting to an episode must "
            "leave no trace: take modules without running state (of normalizations track_running_stats=False); "
            "torch's batch normalization is the exception"
        )


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
