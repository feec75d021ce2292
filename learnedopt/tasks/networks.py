"""Small networks of all architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from learnedopt.tasks.augment import Mixture
from learnedopt.tasks.autoencoder import Autoencoder
from learnedopt.tasks.base import TaskFamily
from learnedopt.tasks.char_attention import CharAttention
from learnedopt.tasks.char_rnn import CharRNN
from learnedopt.tasks.conv import Conv
from learnedopt.tasks.random_mlp import RandomMLP
from learnedopt.tasks.regression import Regression


def _architectures() -> tuple[TaskFamily, ...]:
    return RandomMLP(), Conv(), Autoencoder(), CharRNN(), CharAttention(), Regression()


@dataclass(frozen=True)
class Networks(Mixture):
    """Draws the architecture too: perceptron, convolutional, autoencoder, recurrent, attention, or regression net.

    Each architecture's own family then draws its width, depth, activation, norm, initial scale and batch size.

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> len({type(Networks().draw(generator, copies=1)) for _ in range(60)})
    6
    """

    families: Sequence[TaskFamily] = field(default_factory=_architectures)
