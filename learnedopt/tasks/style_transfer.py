"""Neural style transfer: the parameters are the pixels of an image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from learnedopt.data import ImageData, photographs, textures
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.draws import minibatch
from learnedopt.tasks.features import ConvFeatures, random_features


@dataclass(frozen=True, eq=False)
class StyleTransferTask(Task):
    """One draw of :class:`StyleTransfer`, a content and a style of its own for each copy.

    The batch, always the same one, is the content's activations and the style's Gram matrix of every block. There are
    no examples to hold out: every split is the one objective. What can be held out is images, see the family.
    """

    copies: int
    features: ConvFeatures
    size: tuple[int, int]
    initial_std: float
    content_block: int
    content_weight: float
    style_weight: float
    variation_weight: float
    targets: Batch = field(repr=False)

    def init(self, generator: Generator) -> Params:
        return {"image": 0.5 + self.initial_std * torch.randn(self.copies, 3, *self.size, generator=generator)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return self.targets

    def loss(self, params: Params, batch: Batch) -> Tensor:
        content, *styles = batch
        image = params["image"]
        activations = [x[0] for x in self.features(image[None])]
        style = torch.stack([_distance(gram(x), target) for x, target in zip(activations, styles)]).mean()
        return (
            self.content_weight * _distance(activations[self.content_block], content)
            + self.style_weight * style
            + self.variation_weight * total_variation(image)
        )


@dataclass(frozen=True)
class StyleTransfer(TaskFamily):
    r"""Paint the content of one image in the style of another (Gatys et al. 2015, arXiv:1508.06576).

    With the activations F of ``features`` at the end of each of L blocks and their Gram matrices G,

    .. math::
        \alpha\, d(F_k(\theta), F_k(\text{content})) + \frac\beta L \sum_l d(G_l(\theta), G_l(\text{style}))
        + \gamma\, \mathrm{TV}(\theta), \qquad d(a, b) = \|a - b\|^2 / \|b\|^2,

    :math:`G = F F^\top / (\text{height} \cdot \text{width})`, k = ``content_block``, and TV the mean squared difference
    of neighboring pixels. It is the objective of Andrychowicz et al. 2016, section 3.4, but for the distances: they
    are relative to the target, so that one choice of weights serves any features. Colors are in [0, 1] and not
    clipped; pixels start as :math:`\mathcal N(\frac 12, \mathtt{initial\_std}^2)`.

    Without arguments, tiles of scikit-learn's photographs are painted in drawn textures, as :func:`random_features` see
    them; ``features=vgg16_features(path)`` are a trained net's, as in the paper, whose images have 64 x 64 pixels. A
    task draws its images from the ``split`` of ``contents`` and ``styles``, so that rules can be judged on images they
    were not trained on. All contents have one size; styles may have another. The paper trains with one style only.

    Raises ``ValueError`` where images are not in color, too small for the features' blocks, or there is no
    ``content_block``.

    >>> task = StyleTransfer(split="test").draw(torch.Generator().manual_seed(0), copies=2)
    >>> task.init(torch.Generator().manual_seed(0))["image"].shape
    torch.Size([2, 3, 32, 32])
    """

    contents: ImageData = field(default_factory=photographs)
    styles: ImageData = field(default_factory=textures)
    features: ConvFeatures = field(default_factory=random_features)
    split: Split = "train"
    content_block: int = 2
    content_weight: float = 1.0
    style_weight: float = 1.0
    variation_weight: float = 1.0
    initial_std: float = 0.1

    def __post_init__(self) -> None:
        blocks = len(self.features.blocks)
        for data in (self.contents, self.styles):
            channels, height, width = data.train[0][0].shape
            if channels != 3 or min(height, width) < 2 ** (blocks - 1):
                raise ValueError(
                    f"{data.name} has images of shape {(channels, height, width)}; {self.features.name} needs three "
                    f"colors and at least {2 ** (blocks - 1)} pixels a side"
                )
        if not 0 <= self.content_block < blocks:
            raise ValueError(f"content_block must be from 0 to {blocks - 1}, got {self.content_block}")

    @torch.no_grad()
    def draw(self, generator: Generator, copies: int) -> StyleTransferTask:
        content, style = (
            minibatch(generator, copies, 1, data.split(self.split)[0])[0][:, 0] for data in (self.contents, self.styles)
        )
        targets = [self.features(content)[self.content_block], *(gram(x) for x in self.features(style))]
        height, width = content.shape[2:]
        return StyleTransferTask(
            copies=copies,
            features=self.features,
            size=(height, width),
            initial_std=self.initial_std,
            content_block=self.content_block,
            content_weight=self.content_weight,
            style_weight=self.style_weight,
            variation_weight=self.variation_weight,
            targets=tuple(targets),
        )


def gram(activations: Tensor) -> Tensor:
    """Mean products of channels over all places, ``(..., C, height, width) -> (..., C, C)``."""
    flat = activations.flatten(-2)
    return flat @ flat.mT / flat.shape[-1]


def total_variation(image: Tensor) -> Tensor:
    """The mean squared difference of pixels below and beside each other, of an image ``(..., height, width)``."""
    return image.diff(dim=-1).square().mean() + image.diff(dim=-2).square().mean()


def _distance(a: Tensor, target: Tensor) -> Tensor:
    return (a - target).square().sum() / target.square().sum()
