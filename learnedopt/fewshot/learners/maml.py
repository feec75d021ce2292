"""MAML and its near relatives: first-order MAML, ANIL, Meta-SGD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from learnedopt.fewshot.config import check_positive
from learnedopt.fewshot.learner import LearnerShape
from learnedopt.fewshot.learners.inner_loop import InnerLoopConfig, InnerLoopLearner, Params, Record


@dataclass(frozen=True)
class MAMLConfig(InnerLoopConfig):
    """Settings of :class:`MAML`; the defaults are the paper's for Omniglot, 5-way.

    20-way: ``learning_rate=0.1, steps=5``. Mini-ImageNet: ``learning_rate=0.01, steps=5, test_steps=10``. Sinusoid:
    ``learning_rate=0.01``.
    """

    kind: ClassVar[str] = "maml"
    adapted: Literal["all", "all_but_norm", "head"] = "all_but_norm"
    steps: int = 1
    test_steps: int | None = 3
    inner_loss: Literal["mean", "sum_over_classes"] = "sum_over_classes"
    learning_rate: float = 0.4
    """Of the inner loop; its scale depends on ``inner_loss``."""
    first_order: bool = False
    """Treat the gradients of the inner loop as constants (FOMAML)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "learning_rate")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> MAML:
        return MAML(self, backbone, shape)


class MAML(InnerLoopLearner):
    r"""Learns an initialization from which a few gradient steps on the support set go far.

    .. math::
        \theta_{t+1} = \theta_t - \alpha \nabla L_S(\theta_t), \qquad \min_{\theta_0} \sum L_Q(\theta_T(\theta_0))

    with :math:`L_S, L_Q` the losses of support and query set of each episode. The meta-gradient goes through the inner
    steps, second derivatives included; with ``first_order`` :math:`\partial \nabla L_S / \partial\theta := 0`.

    Source: Finn, Abbeel & Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017
    (arXiv:1703.03400), section 2; first order, section 5.2.

    >>> from learnedopt.fewshot.backbones import MLP
    >>> from learnedopt.fewshot.sources import Sinusoid
    >>> from learnedopt.fewshot.learner import LearnerShape
    >>> generator = torch.Generator().manual_seed(0)
    >>> learner = MAMLConfig(learning_rate=0.01).build(MLP(), LearnerShape((1,), ways=None), generator)
    >>> learner.meta_loss(Sinusoid().sample(25, generator)).backward()
    >>> all(weight.grad is not None for weight in learner.parameters())
    True
    """

    config: MAMLConfig

    def rate(self, name: str, step: int) -> Tensor | float:
        """What the gradient of a parameter is multiplied by in a step counted from 0."""
        return self.config.learning_rate

    @staticmethod
    def moved(value: Tensor, rate: Tensor | float, grad: Tensor) -> Tensor:
        """``value - rate * grad``, in one operation."""
        if isinstance(rate, Tensor):
            return torch.addcmul(value, rate, grad, value=-1)
        return torch.sub(value, grad, alpha=rate)

    @property
    def second_order(self) -> bool:
        """Whether gradients of the inner loop are differentiated, now."""
        return self.differentiable and not self.config.first_order

    def trajectory(self, x: Tensor, y: Tensor, ways: int | None, record: Record | None = None) -> Iterator[Params]:
        second_order = self.second_order
        support = self.support(x, record, second_order)
        params = self.initial(len(x), ways)
        for step in range(self.steps):
            _, grads = self.loss_and_grad(params, step, support, y, ways, second_order, record)
            params = {name: self.moved(value, self.rate(name, step), grads[name]) for name, value in params.items()}
            yield params


@dataclass(frozen=True)
class ANILConfig(MAMLConfig):
    """Settings of :class:`MAML` that adapts the read-out only ("almost no inner loop").

    Source: Raghu et al., "Rapid learning or feature reuse? Towards understanding the effectiveness of MAML", ICLR 2020
    (arXiv:1909.09157), section 4.
    """

    kind: ClassVar[str] = "anil"
    adapted: Literal["all", "all_but_norm", "head"] = "head"


@dataclass(frozen=True)
class MetaSGDConfig(MAMLConfig):
    """Settings of :class:`MetaSGD`. ``learning_rate`` counts for nothing."""

    kind: ClassVar[str] = "meta_sgd"
    built_in: ClassVar[frozenset[str]] = MAMLConfig.built_in | {"learning_rate", "initial_rates"}
    test_steps: int | None = None
    initial_rates: tuple[float, float] = (0.005, 0.1)
    """Range that the rates start in, uniformly; their scale depends on ``inner_loss``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.initial_rates
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"initial_rates must be a range (low, high) of at least 0, got {self.initial_rates}")

    def make(self, backbone: nn.Module, shape: LearnerShape) -> MetaSGD:
        return MetaSGD(self, backbone, shape)


class MetaSGD(MAML):
    r"""MAML that also learns the inner loop's rates, one for every coordinate, of any sign.

    .. math::
        \theta_{t+1} = \theta_t - \alpha \odot \nabla L_S(\theta_t), \qquad \min_{\theta_0, \alpha} \sum L_Q(\theta_T)

    Source: Li et al., "Meta-SGD: learning to learn quickly for few-shot learning", 2017 (arXiv:1707.09835), section 3.
    """

    config: MetaSGDConfig

    def __init__(self, config: MetaSGDConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape)
        own = dict(self.model.named_parameters())
        self.rates = nn.ParameterList(
            torch.empty_like(own[name]).uniform_(*config.initial_rates) for name in self.adapted_names
        )

    def rate(self, name: str, step: int) -> Tensor:
        found: Tensor = self.rates[self.adapted_names.index(name)]
        return found
