"""Running optimizers on tasks: paired, exact per copy, divergence counted."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from benchmarks.harness.baselines import BASELINES
from benchmarks.harness.runs import MakeOptimizer, run, run_problems
from learnedopt.evaluation import DIVERGED
from learnedopt.optim import LearnedOptimizer
from learnedopt.rules import AdamLSTMRule, LSTMConfig, LSTMRule, MetaLSTMConfig, MetaLSTMRule, UpdateRule
from learnedopt.tasks import MLPClassification, Quadratics, Task
from learnedopt.tasks.base import Batch, Params, Split


class Recording(Task):
    """A task that keeps what it has handed out."""

    def __init__(self, task: Task) -> None:
        self.task, self.copies = task, task.copies
        self.starts: list[Params] = []
        self.batches: list[Batch] = []

    def init(self, generator: Generator) -> Params:
        params = self.task.init(generator)
        self.starts.append({name: value.clone() for name, value in params.items()})
        return params

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        self.batches.append(self.task.sample(generator, split))
        return self.batches[-1]

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return self.task.loss(params, batch)


class Steepness(Task):
    """Copy i is ``s_i x^2`` with ``x_0 = 1``: gradient descent with rate lr multiplies x by ``1 - 2 lr s_i``."""

    def __init__(self, *steepness: float) -> None:
        self.steepness = torch.tensor(steepness)
        self.copies = len(steepness)

    def init(self, generator: Generator) -> Params:
        return {"x": torch.ones(self.copies)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return (self.steepness,)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return batch[0] * params["x"].square()


def baseline(name: str, lr: float) -> MakeOptimizer:
    return lambda params: BASELINES[name](params, lr)


def sgd(lr: float) -> MakeOptimizer:
    return baseline("sgd", lr)


@pytest.mark.parametrize("name", BASELINES)
def test_stacked_equals_separate(name: str) -> None:
    """Elementwise optimizers may be given all copies at once."""
    family = MLPClassification(hidden_sizes=((5,),), batch_sizes=(16,), initial_std=0.3)
    separate, stacked = (
        run_problems(family, baseline(name, 0.05), 3, 10, 0, stacked=stacked) for stacked in (False, True)
    )
    torch.testing.assert_close(stacked.losses, separate.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stacked.params, separate.params, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stacked.losses[-1], stacked.losses[0], rtol=1e-3)


def test_the_loop_is_the_one_a_user_would_write(generator: Generator) -> None:
    task = MLPClassification(hidden_sizes=((5,),), batch_sizes=(16,), initial_std=0.3).draw(generator, copies=1)
    result = run(task, lambda params: torch.optim.Adam(params, lr=0.01), 5, Generator().manual_seed(1))

    generator = Generator().manual_seed(1)
    params = {name: value[0].requires_grad_() for name, value in task.init(generator).items()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = task.loss(params, tuple(item[0] for item in task.sample(generator)))
        losses.append(loss.item())
        if len(losses) == 6:
            break
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(result.losses[:, 0], torch.tensor(losses))
    torch.testing.assert_close(result.params, {name: value.detach()[None] for name, value in params.items()})


@pytest.mark.parametrize(
    "rule",
    [LSTMRule(LSTMConfig(hidden_size=3)), AdamLSTMRule(), MetaLSTMRule(MetaLSTMConfig())],
    ids=["lstm", "adam_lstm", "meta_lstm"],
)
def test_a_learned_optimizer_treats_each_copy_as_if_it_were_alone(rule: UpdateRule) -> None:
    """Also rules that look at whole tensors or at the loss."""
    for index, param in enumerate(rule.parameters()):  # an untrained rule may do nothing
        torch.nn.init.normal_(param, std=0.3, generator=Generator().manual_seed(index))
    scale = torch.tensor([1.0, 3.0])

    class Scaled(Steepness):
        def __init__(self, *copies: int) -> None:
            super().__init__(*scale[list(copies)].tolist())

        def init(self, generator: Generator) -> Params:
            return {"x": torch.ones(self.copies, 3), "y": torch.ones(self.copies)}

        def loss(self, params: Params, batch: Batch) -> Tensor:
            return batch[0] * (params["x"].square().sum() + params["y"].square())

    def make(params: Iterable[Tensor]) -> Optimizer:
        return LearnedOptimizer(params, rule=rule)

    def losses(*copies: int) -> Tensor:
        return run(Scaled(*copies), make, 5, Generator()).losses

    together = losses(0, 1)
    torch.testing.assert_close(together, torch.cat([losses(0), losses(1)], dim=1))
    assert (together[1:] != together[:-1]).all()


def test_equal_seeds_give_every_optimizer_the_same_start_and_batches(generator: Generator) -> None:
    recordings = []
    for name, stacked in [("sgd", True), ("adam", False)]:
        task = Recording(MLPClassification().draw(Generator().manual_seed(0), copies=2))
        run(task, baseline(name, 0.1), 4, Generator().manual_seed(1), stacked=stacked)
        recordings.append(task)
    first, second = recordings
    assert len(first.batches) == len(second.batches) == 5
    torch.testing.assert_close(first.starts, second.starts, rtol=0, atol=0)
    torch.testing.assert_close(first.batches, second.batches, rtol=0, atol=0)


def test_problems_depend_on_the_seed_and_differ_between_chunks() -> None:
    def initial(seed: int) -> Tensor:
        return run_problems(Quadratics(), sgd(0.0), 5, 1, seed, chunk=2).losses[0]

    assert initial(0).shape == (5,)
    assert torch.equal(initial(0), initial(0))
    assert len({*initial(0).tolist(), *initial(1).tolist()}) == 10


def test_fewer_steps_give_the_same_first_losses() -> None:
    """A run judged at step 100 and one judged at step 200 see the same problems."""
    short, long = (run_problems(Quadratics(), sgd(0.001), 4, steps, 0, chunk=2).losses for steps in (3, 6))
    assert torch.equal(short, long[:4])


@pytest.mark.parametrize("stacked", [False, True])
def test_a_diverged_copy_is_infinite_from_there_on_and_leaves_the_others_alone(stacked: bool) -> None:
    # Factors of -1.2 ** 2 = 1.44 per step in the loss: beyond 1000 after 19 steps, infinite in float32 much later.
    result = run(Steepness(0.25, 1.1), sgd(1.0), 30, Generator(), stacked=stacked).losses
    expected = 0.25 * 0.25 ** torch.arange(31.0)
    torch.testing.assert_close(result[:, 0], expected)
    assert result[:19, 1].isfinite().all()
    assert result[19:, 1].isinf().all()


def test_a_copy_that_comes_back_has_diverged_all_the_same() -> None:
    class Jumps(torch.optim.Optimizer):
        """Far away and back again."""

        def __init__(self, params: Iterable[Tensor]) -> None:
            super().__init__(params, {})
            self.places = iter([1.0, 2.0 * DIVERGED**0.5, 1.0, 1.0])

        @torch.no_grad()
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            place = next(self.places)
            for param in self.param_groups[0]["params"]:
                param.fill_(place)

    assert run(Steepness(1.0, 1.0), Jumps, 4, Generator()).losses[:, 0].isinf().tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", BASELINES)
def test_no_learning_rate_makes_a_run_raise(name: str) -> None:
    for lr in (1e30, 1e-30):
        losses = run_problems(Quadratics(), baseline(name, lr), 3, 20, 0, stacked=True).losses
        assert losses.shape == (21, 3)
        assert losses[-1].isinf().all() == (lr > 1)
        assert not losses.isnan().any()
