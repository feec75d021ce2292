"""Contenders: run together they do what they would do alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.optim import Optimizer

from learnedopt.evaluation.contenders import (
    BASELINE_NAMES,
    HAND_WRITTEN,
    MULTIPLIERS,
    Contender,
    Setting,
    find_contender,
    learned,
)
from learnedopt.evaluation.measurement import DECAY, Problems, smooth, step_cost, train
from learnedopt.evaluation.muon import StackedMuon, is_hidden_matrix
from learnedopt.evaluation.tasks.base import Always, RowsTask
from learnedopt.evaluation.tasks.sources import shuffled
from learnedopt.rules import RULES, UpdateRule, build_rule
from learnedopt.tasks.base import Batch, Params, Task
from learnedopt.tasks.layers import init_mlp, mlp

STEPS, COPIES = 6, 2


def small(copies: int) -> Task:
    """Names as networks have them: hidden matrices, an output layer, biases."""
    generator = Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)

    def initial(generator: Generator, copies: int) -> Params:
        hidden, output = init_mlp(generator, copies, (4, 6, 5)), init_mlp(generator, copies, (5, 1))
        return hidden | {f"output.{name}": value for name, value in output.items()}

    def objective(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        hidden = mlp({k: v for k, v in params.items() if "output" not in k}, x, "relu")
        return F.mse_loss(torch.tanh(hidden) @ params["output.0.weight"] + params["output.0.bias"], y)

    return RowsTask(copies, shuffled(x, x.prod(1, keepdim=True)), 8, initial, objective)


FAMILY = Always(small)
PROBLEMS = Problems(FAMILY, seed=7, copies=COPIES)


def alone(contender: Contender, setting: Setting, copy: int) -> tuple[Params, list[float]]:
    """One copy by itself, in the loop that everybody writes; losses on the batches of the probe."""
    generator = Generator().manual_seed(7)
    task = FAMILY.draw(generator, COPIES)
    params = {name: value[copy].clone().requires_grad_() for name, value in task.init(generator).items()}
    if contender.layout == "stacked":
        hidden = [value for name, value in params.items() if is_hidden_matrix(name, value.ndim)]
        rest = [value for name, value in params.items() if not is_hidden_matrix(name, value.ndim)]
        options = {"lr": setting.lr, "weight_decay": setting.weight_decay}
        optimizers: list[Optimizer] = [
            torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options),  # type: ignore[arg-type]
            torch.optim.AdamW(rest, **options),  # type: ignore[arg-type]
        ]
    else:
        optimizers = [contender.make(list(params.values()), setting)]
    probe = Generator().manual_seed(0)
    batches = [tuple(x[0] for x in FAMILY.draw(probe, 1).sample(probe)) for _ in range(4)]
    losses = []
    for step in range(STEPS + 1):
        for optimizer in optimizers:
            if contender.averages:
                optimizer.eval()  # type: ignore[attr-defined]
        losses.append(float(np.mean([task.loss(params, batch).item() for batch in batches])))
        if step == STEPS:
            break
        batch = tuple(item[copy] for item in task.sample(generator))
        for optimizer in optimizers:
            if contender.averages:
                optimizer.train()  # type: ignore[attr-defined]
            if contender.schedule is not None:
                optimizer.param_groups[0]["lr"] = setting.lr * contender.schedule(step, STEPS)
            optimizer.zero_grad()
        loss = task.loss(params, batch)
        loss.backward()
        for optimizer in optimizers:
            if hasattr(optimizer, "observe"):
                optimizer.observe(loss)
            optimizer.step()
    return params, losses


def contenders() -> dict[str, Contender]:
    found = {name: HAND_WRITTEN[name]() for name in HAND_WRITTEN if name != "schedule-free"}
    for kind in RULES:
        rule = build_rule({"kind": kind})
        found[kind] = learned(kind, noisy(rule))
    found["class"] = find_contender("torch.optim:Adagrad")
    return found


def noisy(rule: UpdateRule) -> UpdateRule:
    """An untrained rule may do nothing."""
    for index, param in enumerate(rule.parameters()):
        torch.nn.init.normal_(param, std=0.1, generator=Generator().manual_seed(index))
    return rule


def check(contender: Contender) -> None:
    # Not so fast that it diverges: then there would be little to compare.
    rate = 0.01 if contender.name in ("meta_lstm", "normalized_gradient") else contender.default.lr
    settings = [Setting(rate * factor, contender.default.weight_decay) for factor in (1.0, 3.0)]
    measured = train(PROBLEMS, contender, settings, STEPS, every=1)
    for place, setting in enumerate(settings):
        for copy in range(COPIES):
            _, losses = alone(contender, setting, copy)
            # Muon orthogonalizes in bfloat16, where other orders of summation show.
            tolerance = 2e-2 if contender.layout == "stacked" else 1e-4
            np.testing.assert_allclose(measured.losses[:, place, copy], smooth(np.array(losses), DECAY), tolerance)
    assert not np.allclose(measured.losses[-1, 0], measured.losses[-1, 1], rtol=1e-4)
    assert not np.allclose(measured.losses[-1], measured.losses[0], rtol=1e-4)


@pytest.mark.parametrize("name", contenders())
def test_together_equals_alone(name: str) -> None:
    check(contenders()[name])


def test_schedule_free_is_judged_at_its_average() -> None:
    pytest.importorskip("schedulefree")
    check(find_contender("schedule-free"))


def test_schedule_free_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(ImportError, match=r"pip install 'learnedopt\[bench\]'"):
        find_contender("schedule-free")


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_muon_is_torch_s(shape: tuple[int, int]) -> None:
    generator = Generator().manual_seed(0)
    start = torch.randn(2, 3, *shape, generator=generator)
    settings = [Setting(0.02, 0.1), Setting(0.1, 0.0)]
    stacked = start.clone()
    ours = StackedMuon({"weight": stacked}, settings)
    theirs = [[start[i, j].clone() for j in range(3)] for i in range(2)]
    optimizers = [
        torch.optim.Muon(row, s.lr, weight_decay=s.weight_decay or 0.0, adjust_lr_fn="match_rms_adamw")
        for row, s in zip(theirs, settings)
    ]
    for _ in range(4):
        stacked.grad = torch.randn(stacked.shape, generator=generator)
        for i, row in enumerate(theirs):
            for j, param in enumerate(row):
                param.grad = stacked.grad[i, j]
            optimizers[i].step()
        ours.step()
    torch.testing.assert_close(stacked, torch.stack([torch.stack(row) for row in theirs]), rtol=0, atol=6e-3)
    assert (stacked - start).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "ndim", "hidden"),
    [("0.weight", 2, True), ("0.bias", 1, False), ("output", 2, False), ("embedding", 2, False), ("conv", 4, False)],
)
def test_which_parameters_are_muon_s(name: str, ndim: int, hidden: bool) -> None:
    assert is_hidden_matrix(name, ndim) == hidden


@pytest.mark.parametrize("name", [name for name in BASELINE_NAMES if name != "schedule-free"])
def test_the_grids_are_as_large_as_they_should_be(name: str) -> None:
    contender = find_contender(name)
    assert len(contender.rates) >= 14 and list(contender.rates) == sorted(set(contender.rates))
    assert contender.rates[0] < contender.default.lr < contender.rates[-1]
    assert len(MULTIPLIERS) == len(contender.rates) and 1.0 in MULTIPLIERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamm", "'adamm' is no optimizer: not one of sgd, adam, "),
        ("torch.optim:Adamm", "'torch.optim:Adamm' is not an optimizer that can be made from parameters alone"),
        ("torch.optim:SparseAdam", "'torch.optim:SparseAdam' cannot take a step as the benchmark does"),
        ("torch.optim:LBFGS", "'torch.optim:LBFGS' cannot take a step as the benchmark does"),
        ("no.such.module:Adam", "is not an optimizer that can be made from parameters alone"),
        ("torch.nn:Linear", "is not an optimizer that can be made from parameters alone"),
    ],
)
def test_what_is_no_optimizer_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_contender(name)


def test_a_rule_with_other_weights_has_another_identity() -> None:
    rule = build_rule({"kind": "lstm"})
    before = learned("mine", rule).identity
    assert learned("yours", rule).identity == before
    assert learned("mine", noisy(rule)).identity != before


def test_a_copy_that_diverges_is_infinite_from_there_on_and_leaves_the_others_alone() -> None:
    settings = [Setting(0.05), Setting(1e4)]
    measured = train(PROBLEMS, find_contender("sgd"), settings, 30, every=1, held_out_at=range(0, 31, 10))
    alone = train(PROBLEMS, find_contender("sgd"), settings[:1], 30, every=1, held_out_at=range(0, 31, 10))
    np.testing.assert_allclose(measured.losses[:, 0], alone.losses[:, 0], rtol=1e-5)
    assert (measured.diverged[0] == -1).all() and (measured.diverged[1] >= 0).all()
    assert np.isinf(measured.losses[-1, 1]).all() and np.isinf(measured.held_out[-1, 1]).all()
    assert np.isfinite(measured.losses[0, 1]).all()


@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_a_copy_has_diverged_above_a_thousand_times_its_first_loss(start: float) -> None:
    """Of x squared, which gradient descent multiplies by 1.44 in each step: after nineteen, whatever x was."""

    def growing(copies: int) -> Task:
        rows = shuffled(torch.zeros(60, 1), torch.zeros(60, 1))
        return RowsTask(
            copies,
            rows,
            4,
            lambda generator, copies: {"x": torch.full((copies, 1), start)},
            lambda params, batch: params["x"].square().sum() + 0.0 * batch[0].sum(),
        )

    measured = train(Problems(Always(growing), 0, copies=1), find_contender("torch.optim:SGD"), [Setting(1.1)], 25)
    assert measured.diverged.tolist() == [[19]]


def test_settings_and_contenders_meet_the_same_starts_and_a_longer_run_contains_the_shorter() -> None:
    def losses(name: str, steps: int) -> np.ndarray:
        return train(Problems(FAMILY, seed=7, copies=3), find_contender(name), [Setting(0.01)], steps, every=2).losses

    assert np.array_equal(losses("sgd", 4)[0], losses("adam", 4)[0])
    assert np.array_equal(losses("adam", 4), losses("adam", 8)[:3])


def test_a_step_costs_something() -> None:
    for name in ("adam", "muon"):
        cost = step_cost(FAMILY, find_contender(name))
        assert cost.gradient > 0 and cost.optimizer > 0


def test_smoothing_is_a_weighted_mean_of_what_was_seen() -> None:
    losses = np.array([4.0, 2.0, 1.0])
    weights = 0.5 ** np.arange(2, -1, -1)
    assert smooth(losses, 0.5)[-1] == pytest.approx((losses * weights).sum() / weights.sum())
    assert np.isinf(smooth(np.array([1.0, np.inf, 1.0]), 0.5)[1:]).all()
