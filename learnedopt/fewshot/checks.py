"""What a learner must know of somebody's backbone, and what it cannot use, found by trial when it is built."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from learnedopt.fewshot.fast.vectorized import is_plain
from learnedopt.fewshot.normalization import statistics


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


def check_gradients(backbone: nn.Module, example_shape: tuple[int, ...], names: Collection[str]) -> None:
    """Raise ``ValueError`` if the backbone runs a part of itself after its call, as activation checkpointing does.

    The weights and statistics of an episode are in the module during the call alone. What runs for the gradient takes
    others, and the gradient is wrong. So it is compared with that of a copy which has these weights for its own.

    Args:
        backbone: With its batch normalization replaced by :func:`learnedopt.fewshot.normalization.episodic`.
        example_shape: Of one example.
        names: Parameters that are an episode's own.
    """
    like = next((weight for weight in backbone.parameters() if weight.requires_grad), None)
    if like is None or like.is_meta or is_plain(backbone):
        return
    theirs = copy.deepcopy(backbone).train()
    weights = dict(theirs.named_parameters())
    seed = torch.cuda.manual_seed if like.is_cuda else torch.default_generator.manual_seed
    with torch.random.fork_rng([like.device] if like.is_cuda else []), torch.enable_grad():
        # Examples require gradients, without which reentrant checkpoints pass none on.
        x = torch.rand(4, *example_shape, dtype=like.dtype, device=like.device).requires_grad_()
        with torch.no_grad():
            for weight in weights.values():
                weight.add_(0.1 * torch.randn_like(weight))
        ours = copy.deepcopy(theirs)
        with torch.no_grad():
            for name in names:
                ours.get_parameter(name).mul_(1.5)
        own: dict[str, Tensor] = {name: weights[name] for name in names}

        def gradients(outputs: Tensor) -> tuple[Tensor, ...]:
            loss = outputs.cos().sum()
            return torch.autograd.grad(loss, [x, *own.values()], materialize_grads=True) if loss.requires_grad else ()

        refusal = (
            "the backbone runs a part of itself later than it is called, to compute gradients, as activation "
            "checkpointing does. The weights and statistics of an episode are gone by then, and gradients would be "
            "wrong: switch that off"
        )
        try:
            with statistics(3):
                seed(0)  # both drop out the same
                expected = gradients(theirs(x.clone()))
                seed(0)
                outputs = torch.func.functional_call(ours, own, (x.clone(),))
            found = gradients(outputs)
        except RuntimeError as error:
            raise ValueError(f"{refusal} ({str(error).splitlines()[0]})") from error
    size = sum(float(gradient.norm()) for gradient in expected)
    if any(float((a - b).norm()) > 1e-2 * float(b.norm()) + 1e-5 * size for a, b in zip(found, expected)):
        raise ValueError(refusal)
