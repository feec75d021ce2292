"""The sets of tasks, frozen: a result of one version stays comparable with those of the next.

A task is changed only by giving it another name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from learnedopt.data import ImageData, cifar10, label_subset, mnist, textures
from learnedopt.evaluation.tasks import convolutions, perceptrons, representations, sequences
from learnedopt.evaluation.tasks.base import Always
from learnedopt.tasks import ConvPool, MLPClassification, Quadratics, StyleTransfer, TaskFamily
from learnedopt.tasks.base import Task

SetName = Literal["paper", "chen", "selection", "heldout"]


@dataclass(frozen=True)
class BenchmarkTask:
    """A task of a set."""

    name: str
    kind: Literal["function", "dense", "convolutional", "recurrent", "attention", "other"]
    distance: str
    """What about it the meta-training of the default rule has not seen."""
    make: Callable[[Path | None], TaskFamily] = field(repr=False)
    """Its family, from the folder of downloaded data."""
    needs_root: bool = False
    shared: bool = True
    """Whether all copies have the same data, and differ only in where they start and in what order they see them."""

    def family(self, root: Path | None = None) -> TaskFamily:
        """Raises ``ValueError`` if the task needs downloaded data and there is no ``root``."""
        if self.needs_root and root is None:
            raise ValueError(f"task {self.name!r} needs downloaded data: say where they are with --root")
        return self.make(root)


def _fixed(
    name: str,
    kind: Literal["function", "dense", "convolutional", "recurrent", "attention", "other"],
    make: Callable[[int], Task],
    distance: str,
) -> BenchmarkTask:
    return BenchmarkTask(name, kind, distance, lambda root: Always(make))


def _mnist(root: Path | None, hidden: tuple[int, ...] = (20,), activation: str = "sigmoid") -> TaskFamily:
    assert root is not None
    return MLPClassification(mnist(root), (hidden,), (activation,), initial_std=None)


def _on_test_images(data: ImageData) -> ImageData:
    """Trained on test images, as in the authors' code: ten thousand, few enough to be learned by heart.

    Nothing is left to test on; validation images stay apart.
    """
    return replace(data, name=f"{data.name}-test", train=data.test)


def _chen_mlp(root: Path | None, hidden: tuple[int, ...] = (20,), activation: str = "sigmoid") -> TaskFamily:
    assert root is not None
    return MLPClassification(_on_test_images(mnist(root)), (hidden,), (activation,))


def _chen_conv(root: Path | None, load: Callable[[Path], ImageData]) -> TaskFamily:
    assert root is not None
    return Always(partial(convolutions.two_convolutions, data=_on_test_images(load(root))))


def _cifar(root: Path | None, labels: tuple[int, ...] | None = None) -> TaskFamily:
    assert root is not None
    data = cifar10(root)
    return ConvPool(data if labels is None else label_subset(data, labels))


_needs = partial(BenchmarkTask, needs_root=True)

TASK_SETS: dict[SetName, tuple[BenchmarkTask, ...]] = {
    "paper": (
        BenchmarkTask("quadratic", "function", "no function of this kind", lambda root: Quadratics(), shared=False),
        BenchmarkTask(
            "quadratic-uniform",
            "function",
            "no function of this kind",
            lambda root: Quadratics(entries="uniform"),
            shared=False,
        ),
        _needs("mnist", "dense", "MNIST; otherwise within the training distribution", _mnist),
        _needs("mnist-40", "dense", "MNIST, 40 units", partial(_mnist, hidden=(40,))),
        _needs("mnist-two-layers", "dense", "MNIST; otherwise within", partial(_mnist, hidden=(20, 20))),
        _needs("mnist-relu", "dense", "MNIST; otherwise within", partial(_mnist, activation="relu")),
        _needs("cifar10", "convolutional", "color images, pooling, hidden layer, size", _cifar),
        _needs("cifar5", "convolutional", "as cifar10, five classes", partial(_cifar, labels=(0, 1, 2, 3, 4))),
        _needs("cifar2", "convolutional", "as cifar10, two classes", partial(_cifar, labels=(0, 1))),
        BenchmarkTask(
            "neural-art",
            "other",
            "the pixels of an image are the parameters",
            lambda root: StyleTransfer(textures()),
            shared=False,
        ),
    ),
    # Chen et al. 2020 (arXiv:2010.09089), where runs are 10,000 steps long.
    "chen": (
        _needs("chen-mlp", "dense", "MNIST; otherwise within", _chen_mlp),
        _needs("chen-relu", "dense", "MNIST; otherwise within", partial(_chen_mlp, activation="relu")),
        _needs("chen-two-layers", "dense", "MNIST; otherwise within", partial(_chen_mlp, hidden=(20, 20))),
        _needs("chen-conv-mnist", "convolutional", "MNIST, pooling", partial(_chen_conv, load=mnist)),
        _needs("chen-conv-cifar10", "convolutional", "color images, pooling", partial(_chen_conv, load=cifar10)),
    ),
    "selection": (
        _fixed("tabular-gelu", "dense", perceptrons.tabular_gelu, "tabular data"),
        _fixed("normalised-hinge", "dense", perceptrons.normalized_hinge, "tabular data, hinge loss, batch norm"),
        _fixed("distillation", "dense", perceptrons.distillation, "soft targets, other images"),
        _fixed("mixture-density", "dense", perceptrons.mixture_density, "likelihood of a mixture"),
        _fixed("separable-conv", "convolutional", convolutions.separable_conv, "depthwise, SiLU, other images"),
        _fixed("dilated-conv", "convolutional", convolutions.dilated_conv, "one dimension, dilation, residual, waves"),
        _fixed("forecasting", "recurrent", sequences.forecasting, "another cell, real-valued series, length, L1 loss"),
        _fixed("sorting", "attention", sequences.sorting_transformer, "post-norm, no mask, numbers for characters"),
    ),
    "heldout": (
        _fixed(
            "wide-mlp", "dense", perceptrons.wide_mlp, "other images, 26 classes; wider than some, narrower than others"
        ),
        _fixed(
            "deep-tanh",
            "dense",
            perceptrons.deep_tanh,
            "other images; 10 hidden layers as in training, narrower than those",
        ),
        _fixed("residual-quantiles", "dense", perceptrons.residual_quantiles, "residual, SiLU, quantile loss, tabular"),
        _fixed("mlp-mixer", "dense", perceptrons.mlp_mixer, "mixing of patches, residual; other images"),
        _fixed(
            "residual-conv", "convolutional", convolutions.residual_conv, "residual, pooling; color images of textures"
        ),
        _fixed("denoising", "convolutional", convolutions.denoising, "dense prediction, L1 loss, photographs"),
        _fixed("row-lstm", "recurrent", sequences.row_lstm, "two layers, sequence classification, other images"),
        _fixed("gru-names", "recurrent", sequences.gru_names, "other text; cell, width and length as in training"),
        _fixed(
            "code-transformer",
            "attention",
            sequences.code_transformer,
            "other text and vocabulary, width, length; heads and block as in training",
        ),
        _fixed("vae", "other", representations.vae, "variational objective, noise in the loss, other images"),
        _fixed("siren", "other", representations.siren, "sine units, coordinates to colors"),
        _fixed("skip-gram", "other", representations.skip_gram, "embeddings, rare gradients, negative sampling"),
        _fixed("contrastive", "other", representations.contrastive, "contrastive loss over the batch, other images"),
        _fixed("graph-wedges", "other", representations.graph_wedges, "graphs, Poisson regression"),
    ),
}
"""Every set by name. Names of tasks are unique over all sets."""


def task_names(names: Sequence[str]) -> list[str]:
    """The names of the tasks that these stand for, each a set, a task, or a family ``module:NAME``; no repetition.

    Raises ``ValueError`` for a name that is none of them.

    >>> task_names(["siren", "selection", "mine:family"])[:2]
    ['siren', 'tabular-gelu']
    """
    found: dict[str, None] = {}
    for name in names:
        if name in TASK_SETS:
            found |= dict.fromkeys(task.name for task in TASK_SETS[name])
        elif name in _EVERY or ":" in name:
            found[name] = None
        else:
            raise ValueError(
                f"{name!r} is no set of tasks ({', '.join(TASK_SETS)}), no task ({', '.join(sorted(_EVERY))}), and no "
                "module:NAME of a family of tasks"
            )
    return list(found)


def find_tasks(names: Sequence[str]) -> list[BenchmarkTask]:
    """The tasks that :func:`task_names` gives. A ``module:NAME`` must be a :class:`~learnedopt.tasks.TaskFamily`.

    Raises:
        ValueError: as :func:`task_names`; or a module or what it should hold is not there, or is no family.
    """
    return [_EVERY[name] if name in _EVERY else _own(name) for name in task_names(names)]


def _own(name: str) -> BenchmarkTask:
    module, _, attribute = name.partition(":")
    try:
        family = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"there is no task {name!r}: {error}. `python -m learnedopt` finds modules of the folder that it is run in"
        ) from error
    if not isinstance(family, TaskFamily):
        raise ValueError(f"{name!r} must be a learnedopt.tasks.TaskFamily, it is of the type {type(family).__name__}")
    # What is tuned on, judged on and timed are draws of their own.
    drawn = [family.draw(torch.Generator().manual_seed(seed), 1) for seed in range(5)]
    shapes = [
        {key: value.shape for key, value in task.init(torch.Generator().manual_seed(0)).items()} for task in drawn
    ]
    if any(other != shapes[0] for other in shapes):
        raise ValueError(
            f"{name!r} draws networks of several shapes, and the benchmark compares optimizers on one: narrow its "
            "ranges to single values, and take one family for each network"
        )
    return BenchmarkTask(name, "other", UNNAMED, lambda root: family, shared=False)


UNNAMED = "of no named set"
_EVERY = {task.name: task for tasks in TASK_SETS.values() for task in tasks}
