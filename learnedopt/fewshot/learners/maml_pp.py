"""MAML++: what makes MAML train stably, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.learner import LearnerShape, episode_losses
from learnedopt.fewshot.learners.inner_loop import Record
from learnedopt.fewshot.learners.maml import MAML, MAMLConfig
from learnedopt.fewshot.normalization import EpisodicBatchNorm


@dataclass(frozen=True)
class MAMLPlusPlusConfig(MAMLConfig):
    """Settings of :class:`MAMLPlusPlus`; the defaults are the authors' for Omniglot.

    Schedules depend on the progress of training (:meth:`Learner.set_progress`). Cosine annealing, the remaining part of
    the method, is a schedule of the outer learning rate, and set where that is.
    """

    kind: ClassVar[str] = "maml_pp"
    built_in: ClassVar[frozenset[str]] = MAMLConfig.built_in | {
        "steps",
        "learning_rate",
        "learned_rates",
        "per_step_norm_weights",
        "per_step_norm_statistics",
    }
    steps: int = 5
    test_steps: int | None = None
    inner_loss: Literal["mean", "sum_over_classes"] = "mean"
    learning_rate: float = 0.1
    """Where all rates of the inner loop start."""
    multi_step_loss: float = 0.1
    """Share of training during which the queries' loss counts after every update, less and less but after the last."""
    first_order_share: float = 0.0
    """Share of training, from its beginning, during which the gradients of the inner loop are constants
    (derivative-order annealing). The paper's is a third; its code has none."""
    learned_rates: bool = True
    """One learned rate for each step and each tensor (LSLR)."""
    per_step_norm_weights: bool = True
    """Scale and shift of batch normalization of their own after every number of updates (BNWB)."""
    per_step_norm_statistics: bool = True
    """Running averages of their own after every number of updates (BNRS); used with ``normalization="running"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("multi_step_loss", "first_order_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of training, from 0 to 1, got {getattr(self, name)}")
        if self.adapted == "head" and (self.per_step_norm_weights or self.per_step_norm_statistics):
            raise ValueError(
                "with adapted='head' the features do not change from step to step: switch off per_step_norm_weights "
                "and per_step_norm_statistics"
            )
        if self.adapted == "all" and self.per_step_norm_weights:
            raise ValueError(
                "with per_step_norm_weights the scale and shift of batch normalization are learned for each step and "
                "not adapted: take adapted='all_but_norm', or switch per_step_norm_weights off"
            )
        per_step = self.learned_rates or self.per_step_norm_weights or self.per_step_norm_statistics
        if per_step and (self.test_steps or 0) > self.steps:
            raise ValueError(
                f"test_steps={self.test_steps} is more than steps={self.steps}, and what is learned for each step ends "
                "there: take fewer, or switch off learned_rates, per_step_norm_weights and per_step_norm_statistics"
            )

    def make(self, backbone: nn.Module, shape: LearnerShape) -> MAMLPlusPlus:
        return MAMLPlusPlus(self, backbone, shape)


class MAMLPlusPlus(MAML):
    r"""MAML with a loss after every inner step, rates per layer and step, and batch normalization per step.

    In the first share m of training, at progress p, the losses after the T updates are weighted

    .. math::
        w_t = \max\Bigl(\frac{1 - p/m}{T}, \frac{0.03}{T}\Bigr) \ (t < T), \qquad w_T = 1 - \sum_{t<T} w_t

    and after it only the last counts. Tables of batch normalization have T + 1 rows: the one of k serves the network
    after k updates, for support and queries alike.

    Source: Antoniou, Edwards & Storkey, "How to train your MAML", ICLR 2019 (arXiv:1810.09502), section 4; the floor of
    the weights is their code's.
    """

    config: MAMLPlusPlusConfig

    def __init__(self, config: MAMLPlusPlusConfig, backbone: nn.Module, shape: LearnerShape) -> None:
        super().__init__(config, backbone, shape)
        if config.learned_rates:
            like = next(self.model.parameters())
            self.rates = nn.Parameter(like.new_full((config.steps, len(self.adapted_names)), config.learning_rate))
        for norm in self.norms.values():
            if config.per_step_norm_weights and norm.affine:
                for name, value in list(norm.named_parameters()):
                    setattr(norm, name, nn.Parameter(value.detach().repeat(config.steps + 1, 1)))
            if config.per_step_norm_statistics:
                for name, average in list(norm.named_buffers()):
                    setattr(norm, name, average.repeat(config.steps + 1, *[1] * average.ndim))

    @property
    def second_order(self) -> bool:
        annealed = float(self.progress) >= self.config.first_order_share
        return super().second_order and annealed

    def rate(self, name: str, step: int) -> Tensor | float:
        if not self.config.learned_rates:
            return self.config.learning_rate
        return self.rates[step, self.adapted_names.index(name)]

    def shared(self, updates: int) -> dict[str, Tensor]:
        found = {}
        for path, norm in self.norms.items():
            for name in ("weight", "bias", "running_mean", "running_var"):
                table = getattr(norm, name)
                if table is not None and table.ndim == 2:
                    found[f"{path}.{name}"] = table[updates]
        return found

    def track(self, norm: EpisodicBatchNorm, updates: int, mean: Tensor, variance: Tensor) -> None:
        norm.track(mean, variance, updates if self.config.per_step_norm_statistics else None)

    def step_weights(self) -> list[float]:
        """What the queries' loss after each update counts in training, now; they sum to one."""
        count, share = self.steps, self.config.multi_step_loss
        progress = float(self.progress)
        if progress >= share:
            return [0.0] * (count - 1) + [1.0]
        early = max(1 - progress / share, 0.03) / count
        return [early] * (count - 1) + [1 - early * (count - 1)]

    def query_losses(self, episodes: Episodes, record: Record | None) -> Tensor:
        if not self.training:
            return super().query_losses(episodes, record)
        weights = self.step_weights()
        total = episodes.query_x.new_zeros(len(episodes))
        path = self.trajectory(episodes.support_x, episodes.support_y, episodes.ways, record)
        for updates, (weight, params) in enumerate(zip(weights, path), start=1):
            if weight:
                predictions = self.query(params, updates, episodes.support_x, episodes.query_x, record)
                total = total + weight * episode_losses(predictions, episodes.query_y)
        return total
