"""Every estimator against meta-gradients that are known: unbiased where it says so, biased as it says where not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from learnedopt.meta import (
    ES,
    ESTIMATORS,
    PES,
    AdamTeacher,
    Episode,
    Estimator,
    FullBPTT,
    Imitation,
    MetaObjective,
    SGDTeacher,
    TruncatedBPTT,
    VarianceMixture,
    start_episode,
    unroll,
)
from learnedopt.rules import RuleConfig, State, StateSpec, UpdateRule
from learnedopt.tasks import Batch, Params, Split, Task
from tests.meta.support import FAMILIES, KINDS, assert_same, random_rule

each_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True)
class SGDConfig(RuleConfig):
    kind: ClassVar[str] = "test-sgd"


class SGDRule(UpdateRule):
    """Gradient descent with a learned log learning rate and a learned momentum."""

    config_class = SGDConfig

    def __init__(self) -> None:
        super().__init__(SGDConfig())
        self.log_lr = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.momentum = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

    def state_spec(self) -> dict[str, StateSpec]:
        return {"velocity": StateSpec()}

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        velocity = self.momentum * state["velocity"] - self.log_lr.exp() * grad
        return velocity, {"velocity": velocity}


@dataclass(frozen=True, eq=False)
class Bowl(Task):
    """Half the curvature times the square, in one dimension, always from the same start: nothing is random."""

    copies: int

    def init(self, generator: Generator) -> Params:
        return {"theta": torch.full((self.copies, 1), 1.5)}

    def sample(self, generator: Generator, split: Split = "train") -> Batch:
        return (torch.full((self.copies,), 2.0),)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        return 0.5 * batch[0] * params["theta"].square().sum()


STEPS = 3
STD = 0.2
OBJECTIVE = MetaObjective("loss")


def window_losses(
    weights: np.ndarray, start: tuple[float, float] = (1.5, 0.0)
) -> tuple[list[float], tuple[float, float]]:
    """Mean losses of windows that each have their own ``(log lr, momentum)``, by plain arithmetic; and the end."""
    theta, velocity = start
    means = []
    for log_lr, momentum in weights:
        losses = []
        for _ in range(STEPS):
            velocity = momentum * velocity - np.exp(log_lr) * 2.0 * theta
            theta = theta + velocity
            losses.append(theta * theta)
        means.append(float(np.mean(losses)))
    return means, (theta, velocity)


CENTER = np.array([-2.0, 0.3])


def slope(value: Callable[[np.ndarray], float], step: float = 1e-5) -> np.ndarray:
    return np.array([(value(CENTER + step * e) - value(CENTER - step * e)) / (2 * step) for e in np.eye(2)])


def smoothed(value: Callable[[np.ndarray], float], windows: int, nodes: int = 9) -> np.ndarray:
    """The gradient of the expectation over Gaussian perturbations of each window's weights, by quadrature."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    w = w / w.sum()
    total = np.zeros(2)
    for choice in itertools.product(range(nodes), repeat=2 * windows):
        noise, weight = x[list(choice)].reshape(windows, 2), w[list(choice)].prod()
        # d/dc E f(c + s n) = E f(c + s n) n / s, and every window's weights move with the same center.
        total += weight * value(CENTER + STD * noise) * noise.sum(0) / STD
    return total


def whole(weights: np.ndarray, windows: int) -> float:
    return sum(window_losses(np.broadcast_to(weights, (windows, 2)))[0])


def episode_gradients(estimator: Estimator, windows: int, pairs: int, repeats: int) -> Tensor:
    """The sum over an episode's windows, ``(repeats, P)``."""
    rule, sums = SGDRule(), []
    for seed in range(repeats):
        generator = Generator().manual_seed(seed)
        episode = estimator.start(rule, Bowl(pairs), generator)
        total = torch.zeros(2, dtype=torch.float64)
        for _ in range(windows):
            estimate, episode = estimator.estimate(rule, episode, STEPS, generator, OBJECTIVE)
            total += estimate.gradient
        sums.append(total)
    return torch.stack(sums)


def assert_unbiased(samples: Tensor, truth: np.ndarray) -> None:
    mean, error = samples.mean(0).numpy(), (samples.std(0) / len(samples) ** 0.5).numpy()
    assert (error < 0.05 * np.abs(truth)).all(), "too few samples to tell"
    assert (np.abs(mean - truth) < 4 * error).all(), (mean, error, truth)


def test_full_backpropagation_is_the_derivative() -> None:
    estimator = FullBPTT()
    assert estimator.steps(STEPS, 4 * STEPS) == 4 * STEPS
    rule, generator = SGDRule(), Generator()
    estimate, _ = estimator.estimate(rule, estimator.start(rule, Bowl(1), generator), 4 * STEPS, generator, OBJECTIVE)
    expected = slope(lambda weights: whole(weights, 4) / 4)
    np.testing.assert_allclose(estimate.gradient.numpy(), expected, rtol=1e-7)
    assert estimate.meta_loss.item() == pytest.approx(whole(CENTER, 4) / 4)


def test_truncated_backpropagation_misses_what_a_window_does_to_the_next() -> None:
    (samples,) = episode_gradients(TruncatedBPTT(second_order=True), windows=2, pairs=1, repeats=1)
    _, middle = window_losses(CENTER[None])
    alone = slope(lambda weights: window_losses(weights[None])[0][0])
    later = slope(lambda weights: window_losses(weights[None], middle)[0][0])
    np.testing.assert_allclose(samples.numpy(), alone + later, rtol=1e-7)
    full = slope(lambda weights: whole(weights, 2))
    assert (np.abs(alone + later) < 0.95 * np.abs(full)).all()


def test_first_order_truncation_also_misses_what_an_update_does_to_gradients() -> None:
    (samples,) = episode_gradients(TruncatedBPTT(), windows=1, pairs=1, repeats=1)

    def constant_gradients(weights: np.ndarray) -> float:
        path, losses = [], []
        theta, velocity = 1.5, 0.0
        for _ in range(STEPS):  # the gradients that there are at the center
            path.append(2.0 * theta)
            velocity = CENTER[1] * velocity - np.exp(CENTER[0]) * path[-1]
            theta += velocity
        theta, velocity = 1.5, 0.0
        for gradient in path:
            velocity = weights[1] * velocity - np.exp(weights[0]) * gradient
            theta += velocity
            losses.append(theta * theta)
        return float(np.mean(losses))

    np.testing.assert_allclose(samples.numpy(), slope(constant_gradients), rtol=1e-7)
    assert (np.abs(samples.numpy() / slope(lambda weights: whole(weights, 1)) - 1) > 0.05).all()


@pytest.mark.parametrize("estimator", [ES(STD), PES(STD), VarianceMixture(STD)], ids=lambda e: type(e).__name__)
def test_on_one_window_the_smoothed_gradient_is_estimated_without_bias(estimator: Estimator) -> None:
    # The mixture weighs by variances of the very pairs it mixes: unbiased up to the error of those, hence many pairs.
    samples = episode_gradients(estimator, windows=1, pairs=500, repeats=60)
    truth = smoothed(lambda weights: window_losses(weights)[0][0], windows=1)
    assert_unbiased(samples, truth)
    # The smoothing is wide enough to be seen: this is not the gradient at the center.
    assert (np.abs(truth - slope(lambda weights: whole(weights, 1))) > 0.01 * np.abs(truth)).all()


def test_over_several_windows_pes_is_unbiased_and_es_truncates() -> None:
    truth = smoothed(lambda weights: sum(window_losses(weights)[0]), windows=2)
    assert_unbiased(episode_gradients(PES(STD), windows=2, pairs=500, repeats=100), truth)
    truncated = episode_gradients(ES(STD), windows=2, pairs=500, repeats=20).mean(0).numpy()
    assert (np.abs(truncated) < 0.95 * np.abs(truth)).all()


def test_a_mixture_has_no_more_variance_than_either_part() -> None:
    variance = {
        name: episode_gradients(estimator, windows=1, pairs=30, repeats=60).var(0)
        for name, estimator in {"mixture": VarianceMixture(STD), "es": ES(STD)}.items()
    }
    assert (variance["mixture"] < 0.5 * variance["es"]).all()


class Exploding(SGDRule):
    """Right values, and backpropagated gradients that are not finite."""

    def forward(self, param: Tensor, grad: Tensor, state: State, statistics: Tensor) -> tuple[Tensor, State]:
        velocity, after = super().forward(param, grad, state, statistics)
        return velocity + 0.0 * self.log_lr.mul(0.0).sqrt(), after


def test_a_mixture_follows_the_losses_where_backpropagation_explodes() -> None:
    gradients = []
    for rule, estimator in ((Exploding(), VarianceMixture(STD)), (SGDRule(), ES(STD))):
        generator = Generator().manual_seed(0)
        episode = estimator.start(rule, Bowl(8), generator)
        gradients.append(estimator.estimate(rule, episode, STEPS, generator, OBJECTIVE)[0].gradient)
    assert gradients[0].isfinite().all()
    assert gradients[0][0] == pytest.approx(gradients[1][0].item())


def run(estimator: Estimator, kind: str, family: str = "mlp", windows: int = 2) -> tuple[Tensor, Episode]:
    rule, generator = random_rule(kind), Generator().manual_seed(0)
    episode = estimator.start(rule, FAMILIES[family].draw(generator, 3), generator)
    gradients = []
    for _ in range(windows):
        estimate, episode = estimator.estimate(rule, episode, 2, generator, OBJECTIVE)
        gradients.append(estimate.gradient)
    return torch.stack(gradients), episode


ALL = [*(estimator() for estimator in ESTIMATORS.values()), Imitation(), Imitation(SGDTeacher())]


@each_kind
@pytest.mark.parametrize("estimator", ALL, ids=str)
def test_every_estimator_runs_every_rule_and_leaves_it_alone(estimator: Estimator, kind: str) -> None:
    rule, generator = random_rule(kind), Generator().manual_seed(0)
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    episode = estimator.start(rule, FAMILIES["mlp"].draw(generator, 3), generator)
    theta, memory = episode.theta.clone(), {name: value.clone() for name, value in episode.memory.items()}
    estimate, after = estimator.estimate(rule, episode, 2, generator, OBJECTIVE)
    assert estimate.gradient.shape == (sum(value.numel() for value in rule.parameters()),)
    assert estimate.gradient.isfinite().all()
    assert estimate.gradient.any()
    assert not (estimate.gradient.requires_grad or estimate.meta_loss.requires_grad)
    assert after.step == episode.step + 2
    assert torch.equal(episode.theta, theta)
    assert_same(episode.memory, memory)
    assert_same(dict(rule.state_dict()), before)
    assert all(value.grad is None for value in rule.parameters())
    assert not any(value.requires_grad for value in (after.theta, *after.state.values(), *after.memory.values()))


@each_kind
def test_keeping_only_states_changes_no_gradient(kind: str) -> None:
    for second_order in (False, True):
        plain, _ = run(TruncatedBPTT(second_order), kind)
        recomputed, _ = run(TruncatedBPTT(second_order, recompute=True), kind)
        assert torch.equal(plain, recomputed)


def test_keeping_only_states_keeps_less() -> None:
    def kept(recompute: bool) -> int:
        rule, generator, storages = random_rule("lstm"), Generator().manual_seed(0), {}

        def note(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
            return tensor

        episode = start_episode(rule, FAMILIES["mlp"].draw(generator, 50), generator)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            unroll(rule, episode, 4, generator, recompute=recompute)
        return sum(size for _, size in storages.values())

    assert kept(recompute=True) < 0.5 * kept(recompute=False)


@each_kind
@pytest.mark.parametrize("estimator", [ES(1e-4), VarianceMixture(1e-4)], ids=str)
def test_antithetic_pairs_share_their_start_and_go_on_from_the_positive_one(estimator: Estimator, kind: str) -> None:
    _, episode = run(estimator, kind)
    for values in (episode.theta, episode.grad, episode.loss):
        plus, minus = values.chunk(2)
        assert torch.equal(plus, minus)
    for values in episode.state.values():
        plus, minus = values.chunk(2, dim=-1)
        assert torch.equal(plus, minus)


@each_kind
def test_with_little_noise_the_perturbed_runs_are_the_unperturbed_one(kind: str) -> None:
    rule = random_rule(kind)
    for estimator in (ES(1e-12), PES(1e-12), VarianceMixture(1e-12)):
        generator = Generator().manual_seed(0)
        episode = estimator.start(rule, FAMILIES["quadratic"].draw(generator, 3), generator)
        _, after = estimator.estimate(rule, episode, 3, generator, OBJECTIVE)
        generator.manual_seed(0)
        plain = start_episode(rule, FAMILIES["quadratic"].draw(generator, 3), generator)
        _, expected = unroll(rule, plain, 3, generator)
        torch.testing.assert_close(after.theta, expected.theta.repeat(2, 1), rtol=1e-8, atol=1e-8)
        for name, values in expected.state.items():
            doubled = torch.cat([values, values], dim=-1)
            torch.testing.assert_close(after.state[name], doubled, rtol=1e-8, atol=1e-8)


@each_kind
def test_held_out_losses_are_measured_and_training_batches_trained_on(kind: str) -> None:
    @dataclass(frozen=True, eq=False)
    class Splits(Bowl):
        def sample(self, generator: Generator, split: Split = "train") -> Batch:
            return (torch.full((self.copies,), {"train": 2.0, "validation": 3.0}[split]),)

    results, rules = {}, {}
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        rule, generator = random_rule(kind), Generator().manual_seed(0)
        episode = start_episode(rule, Splits(2), generator)
        results[split] = unroll(rule, episode, 3, generator, split=split)
        rules[split] = rule, results[split][0]
    assert torch.equal(results["train"][1].theta, results["validation"][1].theta)
    torch.testing.assert_close(results["validation"][0], 1.5 * results["train"][0])
    slopes = [torch.autograd.grad(losses.sum(), list(rule.parameters())) for rule, losses in rules.values()]
    for train, validation in zip(*slopes):
        torch.testing.assert_close(validation, 1.5 * train)


@pytest.mark.parametrize(
    "teacher",
    [
        AdamTeacher(lr=0.1),
        SGDTeacher(lr=0.05),
        SGDTeacher(momentum=0.0, nesterov=False),
        SGDTeacher(lr=0.05, decay_steps=2.0),
    ],
    ids=str,
)
def test_imitation_follows_the_teachers_path_whatever_the_windows(teacher: AdamTeacher | SGDTeacher) -> None:
    estimator, rule = Imitation(teacher), random_rule("lstm")
    ends = []
    for windows in ((6,), (2, 1, 3)):
        generator = Generator().manual_seed(0)
        episode = estimator.start(rule, FAMILIES["mlp"].draw(generator, 2), generator)
        for steps in windows:
            _, episode = estimator.estimate(rule, episode, steps, generator, OBJECTIVE)
        ends.append(episode)
    assert torch.equal(ends[0].theta, ends[1].theta)

    generator = Generator().manual_seed(0)
    task = FAMILIES["mlp"].draw(generator, 2)
    start = start_episode(rule, task, generator)
    theta = start.theta.clone().requires_grad_()
    optimizer, grad = teacher.optimizer(theta), start.grad
    for step in range(6):
        theta.grad = grad
        optimizer.param_groups[0]["lr"] = teacher.lr / (1 + step / (teacher.decay_steps or float("inf")))
        optimizer.step()
        _, grad = start.flat.loss_and_grad(theta, task.sample(generator))
    assert torch.equal(ends[0].theta, theta)


def test_the_loss_of_imitation_is_relative_to_the_teachers_steps() -> None:
    for lr in (1e-4, 1.0):
        rule, generator = SGDRule(), Generator()
        with torch.no_grad():
            rule.momentum.zero_()
            rule.log_lr.fill_(np.log(lr))
        for teacher, expected in ((lr, 0.0), (2 * lr, 0.25)):
            estimator = Imitation(SGDTeacher(lr=teacher, momentum=0.0, nesterov=False))
            episode = estimator.start(rule, Bowl(2), generator)
            estimate, _ = estimator.estimate(rule, episode, 3, generator, OBJECTIVE)
            assert estimate.meta_loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("lr", "decay_steps"), [(0.0, 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_a_teacher_needs_steps_of_some_length(lr: float, decay_steps: float) -> None:
    for teacher in (AdamTeacher, SGDTeacher):
        with pytest.raises(ValueError, match="a teacher needs a positive lr and decay_steps"):
            teacher(lr=lr, decay_steps=decay_steps)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_perturbations_need_a_width(std: float) -> None:
    for estimator in (ES, PES, VarianceMixture):
        with pytest.raises(ValueError, match="std must be positive and finite"):
            estimator(std)
    assert replace(ES(), std=1.0).std == 1.0
