"""The few-shot demonstration: five methods on drawn characters, 5-way 1-shot, from nothing to a table in minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learnedopt.fewshot.backbones import BackboneConfig, Conv4
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import Evaluation, evaluate
from learnedopt.fewshot.learner import LearnerConfig, LearnerShape
from learnedopt.fewshot.learners import (
    FinetuneConfig,
    MAMLConfig,
    MetaLSTMLearnerConfig,
    NearestNeighbourConfig,
    ProtoNetConfig,
)
from learnedopt.fewshot.training import EpisodeShape, FewShotRecipe, FewShotTrainConfig, episode_source
from learnedopt.rules import MetaLSTMConfig


@dataclass(frozen=True)
class FewShotDemo:
    """What is trained, and how long."""

    data: str = "glyphs"
    test: EpisodeShape = field(default_factory=EpisodeShape)
    episodes: int = 300
    """Frozen test episodes."""
    backbone: BackboneConfig = field(default_factory=lambda: Conv4(width=16, downsample="stride"))
    scale: float = 1.0
    """The number of training steps is multiplied by this."""


@dataclass(frozen=True)
class Result:
    """One method, trained and judged."""

    name: str
    evaluation: Evaluation
    steps: int
    seconds: float
    """Of training."""


def methods(demo: FewShotDemo) -> list[tuple[str, FewShotRecipe]]:
    """What the demonstration trains, by name; nearest neighbour shares the network of fine-tuning."""
    small = EpisodeShape(demo.test.ways, demo.test.shots, 5)

    def recipe(
        name: str, learner: LearnerConfig, train: EpisodeShape, steps: int, batch: int = 1, rate: float = 1e-2
    ) -> FewShotRecipe:
        steps = max(2, round(steps * demo.scale))
        training = FewShotTrainConfig(
            steps,
            batch,
            rate,
            schedule="cosine",
            clip_norm=1.0,
            validate_every=max(1, steps // 2),
            validation_episodes=30,
        )
        return FewShotRecipe(f"demo-{name}", name, demo.data, learner, demo.backbone, train, demo.test, training)

    finetune = FinetuneConfig(learning_rate=0.01, learning_rates=(0.5, 0.1, 0.01), decays=(0.0,))
    # Smaller inner rates than the published ones, and gates that start open: few steps of training go further.
    maml = MAMLConfig(learning_rate=0.1)
    meta_lstm = MetaLSTMLearnerConfig(steps=3, rule=MetaLSTMConfig(input_bias=(-1.0, 0.0)))
    return [
        ("fine-tuning", recipe("finetune", finetune, small, 1000, rate=3e-3)),
        ("prototypical network", recipe("protonet", ProtoNetConfig(), EpisodeShape(20, 1, 5), 600, rate=3e-3)),
        ("MAML", recipe("maml", maml, small, 1600, batch=8)),
        ("meta-LSTM", recipe("meta-lstm", meta_lstm, small, 3000, batch=4)),
    ]


def compare(
    demo: FewShotDemo, name: str, recipe: FewShotRecipe, stepped: Callable[[], object] = lambda: None
) -> list[Result]:
    """Train one method, calling ``stepped`` after every step, and judge it on the frozen test episodes."""
    trainer = recipe.trainer()
    for _ in trainer.run():
        stepped()
    episodes = episode_source(demo.data, demo.test, "test").frozen(demo.episodes)
    learner = trainer.best_learner()
    results = [Result(name, evaluate(learner, episodes), trainer.step, trainer.seconds)]
    if isinstance(recipe.learner, FinetuneConfig):
        shape = LearnerShape(trainer.source.source.example_shape, demo.test.ways, trainer.source.source.num_classes)
        neighbour = NearestNeighbourConfig().build(demo.backbone, shape, torch.Generator().manual_seed(0))
        neighbour.load_state_dict(trainer.best_weights)
        results.append(Result("nearest neighbour", evaluate(neighbour, episodes), trainer.step, trainer.seconds))
    return results


def table(results: Sequence[Result]) -> str:
    """One row per method."""
    width = max(len(result.name) for result in results)
    rows = [f"{'':<{width}}  {'accuracy':>16}  {'transductive':>12}  {'steps':>6}  {'seconds':>7}"]
    for result in results:
        rows.append(
            f"{result.name:<{width}}  {result.evaluation!s:>16}  "
            f"{'yes' if result.evaluation.transductive else 'no':>12}  {result.steps:>6}  {result.seconds:>7.0f}"
        )
    return "\n".join(rows)


def plot(episode: Episodes, path: Path) -> None:
    """Draw an episode: a row per class, its support examples left of the line, some queries right of it.

    Raises ``ImportError`` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'learnedopt[train]'") from error
    ways = episode.ways or 1
    support = episode.support_x[0].unflatten(0, (ways, -1))
    query = episode.query_x[0].unflatten(0, (ways, -1))[:, :8]
    columns = support.shape[1] + query.shape[1]
    figure = Figure(figsize=(columns, ways + 0.4), layout="constrained")
    for row in range(ways):
        for column, image in enumerate(torch.cat([support[row], query[row]])):
            axes = figure.add_subplot(ways, columns, row * columns + column + 1)
            axes.imshow(image.movedim(0, -1).squeeze(-1).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color("tab:red" if column < support.shape[1] else "0.8")
            if row == 0:
                axes.set_title("support" if column < support.shape[1] else "query", fontsize=8)
    figure.savefig(path, dpi=100)


def timed(demo: FewShotDemo) -> tuple[Episodes, float]:
    """The first test episode, and the seconds that drawing all characters took."""
    started = time.perf_counter()
    for part in ("train", "validation"):
        episode_source(demo.data, demo.test, part)
    episode = next(iter(episode_source(demo.data, demo.test, "test").frozen(1).batches(1)))
    return episode, time.perf_counter() - started
