"""What holds for every learner."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from learnedopt.fewshot.backbones import MLP, Conv4
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import evaluate
from learnedopt.fewshot.fast import vectorized
from learnedopt.fewshot.learner import Learner, LearnerShape
from learnedopt.fewshot.learners import LEARNERS, MAMLConfig
from learnedopt.fewshot.learners.inner_loop import InnerLoopLearner
from learnedopt.fewshot.normalization import batch_norms
from learnedopt.fewshot.sources import ClassSet, FewShotTask, Sinusoid, TrainingSource
from learnedopt.rules import MetaLSTMConfig
from tests.fewshot.support import (
    CLASSES,
    EXAMPLE,
    SHORT,
    WAYS,
    Smooth,
    backbone,
    episodes,
    equal_outputs,
    generator,
    make,
    meta_gradient,
)

KINDS = sorted(LEARNERS)
MODES = ("transductive", "support", "running")
INNER_LOOP = ("anil", "finetune", "maml", "maml_pp", "meta_lstm", "meta_sgd", "reptile")
PRETRAINED = ("finetune", "nearest_neighbour")
EPISODIC = sorted({*KINDS} - {*PRETRAINED})
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(kind, {}) for kind in KINDS],
    ("maml", {"first_order": True, "steps": 3}),
    ("matching", {"full_context": True}),
    ("matching", {"learned_scale": True, "scale": 4.0}),
    ("maml_pp", {"learned_rates": False, "per_step_norm_weights": False, "per_step_norm_statistics": False}),
    ("meta_lstm", {"first_order": False, "steps": 3}),
    ("meta_lstm", {"gate_shift": -0.5, "gate_shifts": (-0.5, 0.5)}),
    ("finetune", {"adapted": "head"}),
    ("meta_lstm", {"adapted": "head", "readout": "shared"}),
    ("meta_sgd", {"readout": "shared"}),
    ("maml_pp", {"readout": "shared"}),
]


@pytest.fixture(scope="module")
def task() -> FewShotTask:
    draws = generator()
    images = torch.rand(CLASSES, 1, *EXAMPLE, generator=draws) + torch.rand(CLASSES, 6, *EXAMPLE, generator=draws)
    names = tuple(f"class {number}" for number in range(CLASSES))
    return FewShotTask(ClassSet("toy/train", names, images.flatten(0, 1), (6,) * CLASSES), WAYS, 2, 3)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_every_learner_can_be_trained_and_evaluated(
    kind: str, settings: dict[str, Any], mode: str, task: FewShotTask
) -> None:
    learner = make(kind, normalization=mode, **settings).float()
    before = [weight.clone() for weight in learner.parameters()]
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    loss = learner.training_step(TrainingSource(task, 2), generator(3))
    assert loss.shape == ()
    loss.backward()
    optimizer.step()
    after = list(learner.parameters())
    assert all(weight.isfinite().all() for weight in after)
    moved = [not torch.equal(old, new) for old, new in zip(before, after)]
    assert sum(moved) >= 2
    result = evaluate(learner, task.frozen(5))
    assert result.n == 5
    assert 0 <= result.mean <= 1
    assert result.transductive == learner.transductive == (mode == "transductive")


@pytest.mark.parametrize("kind", INNER_LOOP)
def test_inner_loops_do_regression(kind: str) -> None:
    learner = LEARNERS[kind](episodes_at_once=2).build(nn.Linear(1, 4), LearnerShape((1,), None), generator())
    source = Sinusoid(shots=5, queries=3)
    learner.training_step(TrainingSource(source, 3), generator()).backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in learner.parameters())
    result = evaluate(learner, source.frozen(4))
    assert (result.metric, result.n, result.transductive) == ("mse", 4, False)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {*INNER_LOOP}))
def test_comparing_features_is_for_classes(kind: str) -> None:
    with pytest.raises(ValueError, match="cannot do regression"):
        LEARNERS[kind]().build(nn.Linear(1, 4), LearnerShape((1,), None))


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_fitting_changes_nothing(kind: str, settings: dict[str, Any], mode: str, training: bool) -> None:
    learner = make(kind, normalization=mode, **settings).train(training)
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    random_state = torch.get_rng_state()
    some = episodes()
    learner.fit(some.support_x, some.support_y).predict(some.query_x)
    assert state.keys() == learner.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())
    assert all(weight.grad is None for weight in learner.parameters())
    assert learner.training == training
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_renaming_the_classes_renames_the_predictions(kind: str, settings: dict[str, Any], mode: str) -> None:
    """Where all classes start alike: nothing but the support labels says which is which."""
    learner = make(kind, normalization=mode, **settings).eval()
    equal_outputs(learner)
    some, names = episodes(), torch.tensor([2, 0, 1])
    plain = learner.fit(some.support_x, some.support_y).predict(some.query_x)
    renamed = learner.fit(some.support_x, names[some.support_y]).predict(some.query_x)
    assert plain.std(-1).min() > 0
    torch.testing.assert_close(renamed[..., names], plain)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_query_sees_the_others_only_where_that_is_declared(kind: str, settings: dict[str, Any], mode: str) -> None:
    learner = make(kind, normalization=mode, **settings).eval()
    some = episodes()
    adapted = learner.fit(some.support_x, some.support_y)
    clean = adapted.predict(some.query_x)
    poisoned_x = some.query_x.clone()
    poisoned_x[:, 0] = 1e3
    poisoned = adapted.predict(poisoned_x)
    same = torch.allclose(poisoned[:, 1:], clean[:, 1:], rtol=1e-10, atol=1e-10)
    assert same == (not learner.transductive)
    assert torch.equal(adapted.predict(some.query_x), clean)


def test_without_batch_normalization_nothing_is_transductive() -> None:
    learner = make("maml", batch_norm=False, normalization="transductive").eval()
    assert not learner.transductive
    some = episodes()
    adapted = learner.fit(some.support_x, some.support_y)
    torch.testing.assert_close(adapted.predict(some.query_x[:, :1]), adapted.predict(some.query_x)[:, :1])


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_episodes_together_are_as_one_by_one(kind: str, settings: dict[str, Any], mode: str, training: bool) -> None:
    learner = make(kind, normalization=mode, **settings).train(training)
    some = episodes()
    together = learner.fit(some.support_x, some.support_y).predict(some.query_x)
    for number in range(3):
        alone = learner.fit(some.support_x[number], some.support_y[number]).predict(some.query_x[number])
        torch.testing.assert_close(together[number], alone)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_fast_way_and_the_loop_agree(kind: str, settings: dict[str, Any], mode: str) -> None:
    some, found = episodes(), []
    for at_once in (1, 2, 3):
        learner = make(kind, normalization=mode, episodes_at_once=at_once, **settings)
        loss = learner.meta_loss(some)
        gradient = meta_gradient(learner, some) if loss.requires_grad else torch.zeros(())
        found.append((loss.detach(), gradient, learner.state_dict()))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize(("downsample", "sizes"), [("pool", [16, 16, 13]), ("stride", [45])])
def test_how_many_episodes_go_together_depends_on_the_network(downsample: Any, sizes: list[int]) -> None:
    """The rule that :attr:`LearnerConfig.episodes_at_once` states, seen in how episodes are grouped."""
    image, labels = torch.rand(45, 2, 1, 16, 16), torch.tensor([0, 1]).expand(45, 2)
    backbone = Conv4(32, downsample)
    learner = LEARNERS["maml"]().build(backbone, LearnerShape((1, 16, 16), 2), generator())
    assert learner.fit(image, labels).sizes == sizes
    module = backbone.build((1, 16, 16))
    module.register_forward_hook(lambda module, inputs, outputs: outputs)
    assert LEARNERS["maml"]().build(module, LearnerShape((1, 16, 16), 2)).fit(image, labels).sizes == [1] * 45
    assert LEARNERS["protonet"]().build(backbone, LearnerShape((1, 16, 16), 2)).fit(image, labels).sizes == [1] * 45
    x, y = torch.rand(45, 2, 4), torch.tensor([0, 1]).expand(45, 2)
    for kind in ("maml", "protonet"):
        assert LEARNERS[kind]().build(MLP((5,)), LearnerShape((4,), 2)).fit(x, y).sizes == [45]
        assert LEARNERS[kind]().build(Smooth(), LearnerShape((4,), 2)).fit(x, y).sizes == [1] * 45


class Opaque(nn.Sequential):
    """Layers that the package cannot tell."""


def images(count: int) -> Episodes:
    draws = generator(4)
    means = torch.randn(count, WAYS, 1, 2, 7, 6, generator=draws, dtype=torch.float64)
    x = means + torch.randn(count, WAYS, 4, 2, 7, 6, generator=draws, dtype=torch.float64)
    labels = torch.arange(WAYS).repeat_interleave(2).expand(count, -1)
    return Episodes(x[:, :, :2].flatten(1, 2), labels, x[:, :, 2:].flatten(1, 2), labels, WAYS)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("kind", "settings"), [case for case in VARIANTS if case[0] in EPISODIC])
@pytest.mark.parametrize("mode", MODES)
def test_convolutions_are_run_as_the_module_would_run_them(
    kind: str, settings: dict[str, Any], mode: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, meta-gradients, statistics and predictions, however many episodes go together; here and on GPUs."""
    monkeypatch.setattr(vectorized, "_grouped", lambda device: grouped)
    some, found = images(3), []
    for container, at_once in ((Opaque, 1), (nn.Sequential, 1), (nn.Sequential, 2), (nn.Sequential, 3)):
        torch.manual_seed(0)
        layers = container(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(3, 1, (3, 2), stride=(2, 1), padding=1),
            nn.BatchNorm2d(1),
            nn.ReLU(),
        ).to(memory_format=torch.channels_last)
        config = LEARNERS[kind](
            **{**SHORT.get(kind, {}), **settings, "normalization": mode, "episodes_at_once": at_once}
        )
        learner = config.build(layers.double(), LearnerShape((2, 7, 6), WAYS, CLASSES), generator(2)).double()
        loss = learner.meta_loss(some)
        gradient = meta_gradient(learner, some)
        state = [value for name, value in learner.state_dict().items() if "running" in name]
        with torch.no_grad():
            predicted = learner.eval().fit(some.support_x, some.support_y).predict(some.query_x)
        found.append((loss.detach(), gradient, state, predicted))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-6, atol=1e-8)
    assert found[0][1].abs().max() > 1e-3


class Block(nn.Module):
    """Not a plain sequence of layers, and with a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.relu = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.relu(self.norm(self.linear(x)))
        return found


def blocks(kind: str, mode: str) -> tuple[Learner, Episodes]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        block = Block()
    settings: dict[str, Any] = {"normalization": mode}
    learner = LEARNERS[kind](**settings).build(block, LearnerShape((3,), 2, num_classes=4), generator())
    x, y = torch.randn(3, 6, 3, generator=generator(1)), torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)
    return learner, Episodes(x, y, x + 0.1, y, ways=2)


@pytest.mark.parametrize("kind", EPISODIC)
@pytest.mark.parametrize("mode", MODES)
def test_operations_in_place_after_batch_normalization(kind: str, mode: str) -> None:
    gradients = []
    for size in (1, 3):
        learner, of = blocks(kind, mode)
        learner.with_config(episodes_at_once=size).meta_loss(of).backward()
        gradients.append([weight.grad for weight in learner.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_within_inference_mode_is_fitting(kind: str) -> None:
    learner, of = blocks(kind, "support")
    expected = learner.eval().fit(of.support_x, of.support_y).predict(of.query_x)
    with torch.inference_mode():
        x, y = of.support_x.clone(), of.support_y.clone()
        found = learner.fit(x, y).predict(of.query_x.clone())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", EPISODIC)
def test_examples_have_gradients_however_many_episodes_go_together(kind: str) -> None:
    if kind == "reptile":
        pytest.skip("its loss is a number beside its pseudo-gradient")
    learner, of = blocks(kind, "transductive")
    gradients = []
    for size in (1, 3):
        x = of.query_x.clone().requires_grad_()
        learner.with_config(episodes_at_once=size).meta_loss(replace(of, query_x=x)).backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and bool(gradients[0].any())
    torch.testing.assert_close(*gradients)


def test_the_read_out_has_the_dtype_of_the_backbone() -> None:
    learner = LEARNERS["maml"]().build(nn.Linear(3, 4).double(), LearnerShape((3,), 2))
    x = torch.eye(2, 3, dtype=torch.float64)
    assert learner.fit(x, torch.arange(2)).predict(x).dtype == torch.float64


class Louder(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * super().forward(x)


def test_batch_normalizations_of_other_kinds_are_refused() -> None:
    shape = LearnerShape((3,), 2)
    with pytest.raises(ValueError, match="Louder is a batch normalization of its own kind"):
        LEARNERS["maml"]().build(nn.Sequential(nn.Linear(3, 4), Louder(4)), shape)
    hooked = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    hooked[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks, which would be lost"):
        LEARNERS["protonet"]().build(hooked, shape)


class Added(nn.Module):
    """Layers whose weights are the sums of two: autograd hands both the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4, generator=generator(1), dtype=torch.float64))
        self.change = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ (self.weight + self.change).T)


@pytest.mark.parametrize("kind", EPISODIC)
def test_gradients_of_weights_that_are_added_are_counted_once(kind: str) -> None:
    found = []
    for at_once in (1, 3):
        learner = (
            LEARNERS[kind](episodes_at_once=at_once)
            .build(Added(), LearnerShape(EXAMPLE, WAYS, CLASSES), generator(2))
            .double()
        )
        found.append(meta_gradient(learner, episodes()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", EPISODIC)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_meta_loss_in_evaluation_does_not_depend_on_how_many_go_together(kind: str, batch_norm: bool) -> None:
    losses = [make(kind, batch_norm, episodes_at_once=n).eval().meta_loss(episodes()).detach() for n in (1, 3)]
    torch.testing.assert_close(losses[0], losses[1])


def test_the_meta_loss_scales_and_is_constant_without_gradients() -> None:
    some = episodes()
    learner = make("maml", episodes_at_once=1)
    gradient = meta_gradient(learner, some)
    learner.zero_grad()
    (3 * learner.meta_loss(some)).backward()
    grads = [weight.grad for weight in learner.parameters() if weight.grad is not None]
    torch.testing.assert_close(torch.cat([grad.flatten() for grad in grads]), 3 * gradient)
    with torch.no_grad():
        constant = learner.meta_loss(some)
    assert not constant.requires_grad
    torch.testing.assert_close(constant, learner.meta_loss(some).detach())


@pytest.mark.parametrize("kind", EPISODIC)
def test_training_moves_running_averages_once_for_every_pass(kind: str) -> None:
    learner = make(kind, normalization="running")
    (norm,) = batch_norms(learner).values()
    assert norm.running_mean is not None and norm.num_batches_tracked is not None
    before = norm.running_mean.clone()
    learner.eval().meta_loss(episodes())
    assert torch.equal(norm.running_mean, before)
    learner.train().meta_loss(episodes())
    assert not torch.equal(norm.running_mean, before)
    # One for the support set before each update and one for queries at the end, which those that compare take together.
    # MAML++ has queries after each of two updates, Reptile none.
    passes = {"protonet": 1, "matching": 1, "meta_lstm": 4, "maml_pp": 4}
    assert norm.num_batches_tracked.sum() == 3 * passes.get(kind, 2)


def test_other_settings_for_the_same_weights() -> None:
    learner = make("protonet", normalization="running")
    other = learner.with_config(normalization="transductive")
    assert (learner.transductive, other.transductive) == (False, True)
    with torch.no_grad():
        next(learner.parameters()).add_(1)
    assert all(torch.equal(mine, its) for mine, its in zip(learner.parameters(), other.parameters()))
    with pytest.raises(ValueError, match="keeps no running averages: build it with normalization='running'"):
        make("maml").with_config(normalization="running")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("maml", {"adapted": "all"}),
        ("matching", {"learned_scale": True}),
        ("maml_pp", {"steps": 6}),
        ("meta_sgd", {"initial_rates": (0.0, 0.1)}),
        ("meta_lstm", {"rule": MetaLSTMConfig(hidden_size=3)}),
    ],
)
def test_what_weights_there_are_cannot_change(kind: str, change: dict[str, Any]) -> None:
    learner = make(kind)
    with pytest.raises(ValueError, match=f"{next(iter(change))} of a {kind} cannot change once it is built"):
        learner.with_config(**change)
    own = {name: getattr(learner.config, name) for name in change}
    assert learner.with_config(**own).config == learner.config


def test_a_learner_begins_in_training_mode() -> None:
    learner = LEARNERS["finetune"]().build(backbone().eval(), LearnerShape(EXAMPLE, WAYS, CLASSES))
    assert all(module.training for module in learner.modules())


def test_the_backbone_handed_over_is_copied() -> None:
    module = backbone()
    learner = LEARNERS["maml"]().build(module, LearnerShape(EXAMPLE, WAYS), generator())
    some = episodes()
    learner.double().meta_loss(some).backward()
    assert any(isinstance(child, nn.BatchNorm1d) for child in module.modules())
    assert all(weight.grad is None for weight in module.parameters())
    mine = dict(learner.named_parameters())
    assert all(torch.equal(mine[f"model.backbone.{name}"], value) for name, value in module.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_from_the_generator(kind: str) -> None:
    state = torch.get_rng_state()
    shape = LearnerShape((1, 16, 16), WAYS, CLASSES)
    one, same, other = (LEARNERS[kind]().build(Conv4(2), shape, generator(seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_settings_survive_json(kind: str, settings: dict[str, Any]) -> None:
    config = LEARNERS[kind](normalization="support", **settings)
    values = json.loads(json.dumps(config.to_dict()))
    assert LEARNERS[kind].from_dict(values) == config
    with pytest.raises(ValueError, match=r"unknown setting\(s\) \['depth'\]"):
        LEARNERS[kind].from_dict({**values, "depth": 3})
    with pytest.raises(ValueError, match="these are settings of kind 'other'"):
        LEARNERS[kind].from_dict({**values, "kind": "other"})


class Recurrent(nn.Module):
    """``vmap`` has no rule for it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(2, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():  # nor can it go on where a tensor decides
            raise ValueError("not a number")
        outputs: torch.Tensor = self.cell(x.unflatten(1, (2, 2)))[0]
        return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_that_cannot_be_vectorized_need_no_setting(kind: str) -> None:
    learner = LEARNERS[kind](**SHORT.get(kind, {})).build(Recurrent(), LearnerShape(EXAMPLE, WAYS, CLASSES)).double()
    if kind in EPISODIC:
        assert meta_gradient(learner, episodes()).abs().max() > 0
    assert evaluate(learner, episodes()).n == 3


def test_attention_is_evaluated_as_it_is_trained() -> None:
    """In evaluation torch has another way through it, without derivatives."""
    layer = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.TransformerEncoderLayer(2, 1, 4, batch_first=True))
    learner = MAMLConfig(first_order=True).build(layer, LearnerShape(EXAMPLE, WAYS)).double()
    learner.meta_loss(episodes()).backward()
    assert evaluate(learner, episodes()).n == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "buffer"),
    [
        ([nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True)], "1.running_mean"),
        ([nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))], "0.parametrizations.weight.0._u"),
    ],
)
def test_state_that_a_fit_would_change_is_refused(kind: str, layers: list[nn.Module], buffer: str) -> None:
    with pytest.raises(ValueError, match=f"a forward pass of the backbone changes its buffers {buffer}"):
        LEARNERS[kind]().build(nn.Sequential(*layers), LearnerShape(EXAMPLE, WAYS, CLASSES))


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_that_do_not_fit_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"does not take examples of shape \(4,\)"):
        LEARNERS[kind]().build(nn.Linear(3, 5), LearnerShape(EXAMPLE, WAYS, CLASSES))
    for wrong in (Conv4, "conv4"):
        with pytest.raises(TypeError, match=r"backbone must be a module, or settings such as Conv4\(\)"):
            LEARNERS[kind]().build(wrong, LearnerShape(EXAMPLE, WAYS, CLASSES))  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_what_was_fitted_can_be_copied_and_stored(kind: str, settings: dict[str, Any]) -> None:
    learner, some = make(kind, **settings).eval(), episodes()
    adapted = learner.fit(some.support_x, some.support_y)
    expected = adapted.predict(some.query_x)
    copies = copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))
    with torch.no_grad():
        for weight in learner.parameters():
            weight.zero_()
    for found in copies:
        assert torch.equal(found.predict(some.query_x), expected)


@pytest.mark.parametrize(("kind", "settings"), VARIANTS)
def test_a_learner_is_of_the_type_of_its_backbone(kind: str, settings: dict[str, Any]) -> None:
    learner = LEARNERS[kind](**settings).build(backbone(), LearnerShape(EXAMPLE, WAYS, CLASSES), generator())
    network = {weight.dtype for name, weight in learner.named_parameters() if "rule" not in name}
    assert network == {torch.float64}
    if not any("rule" in name for name, _ in learner.named_parameters()):
        some = episodes()
        assert learner.fit(some.support_x, some.support_y).predict(some.query_x).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_brings_what_it_draws_to_the_type_of_the_weights(kind: str) -> None:
    classes = ClassSet("noise", tuple(map(str, range(CLASSES))), torch.rand(6 * CLASSES, *EXAMPLE), (6,) * CLASSES)
    source = TrainingSource(FewShotTask(classes, WAYS, 2, 2))
    assert make(kind).training_step(source, generator()).dtype == torch.float64


def test_frozen_parameters_are_not_adapted() -> None:
    module = backbone()
    frozen = module.get_parameter("body.0.weight").requires_grad_(False)
    learner = MAMLConfig(adapted="all").build(module, LearnerShape(EXAMPLE, WAYS)).double()
    assert isinstance(learner, InnerLoopLearner)
    assert "backbone.body.0.weight" not in learner.adapted_names and "backbone.body.0.bias" in learner.adapted_names
    learner.meta_loss(episodes()).backward()
    own = learner.get_parameter("model.backbone.body.0.weight")
    assert own.grad is None and torch.equal(own, frozen)


def test_shapes_may_be_lists() -> None:
    assert LearnerShape([4], 2) == LearnerShape((4,), 2)  # type: ignore[arg-type]
    assert MLP([8, 8]) == MLP((8, 8))  # type: ignore[arg-type]


def test_statistics_of_one_query_are_refused() -> None:
    adapted = make("maml").eval().fit(SOME.support_x, SOME.support_y)
    with pytest.raises(ValueError, match="those of one query alone say nothing: predict all queries"):
        adapted.predict(SOME.query_x[:, :1])


def test_progress_is_part_of_the_state() -> None:
    learner, other = make("maml_pp"), make("maml_pp")
    learner.set_progress(0.25)
    other.load_state_dict(learner.state_dict())
    assert float(other.progress) == 0.25
    with pytest.raises(ValueError, match="a fraction from 0 to 1, got"):
        learner.set_progress(1.5)


SOME = episodes()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("maml", (SOME.support_x, SOME.support_y + 1), "labels run from 1 to 3"),
        ("maml", (SOME.support_x, SOME.support_y, 4), "made for 3 ways, and the episodes have 4: build it with ways=4"),
        ("protonet", (SOME.support_x, SOME.support_y, 4), r"of 4 classes, \[3\] have no support example"),
        ("protonet", (SOME.support_x, SOME.support_y.double()), "must be int64"),
        ("maml", (SOME.support_x[..., :2], SOME.support_y), r"with examples of shape \(4,\), got \(3, 6, 2\)"),
        ("maml", (SOME.support_x, SOME.support_y[:, :4]), "must agree in episodes and examples"),
        ("maml", (SOME.support_x[:0], SOME.support_y[:0]), "holds no episodes"),
        ("protonet", (SOME.support_x[:, :0], SOME.support_y[:, :0], 3), "support_x holds no examples"),
        ("maml", (SOME.support_x.byte(), SOME.support_y), r"support_x is torch.uint8, and examples must be floating"),
        ("matching", (SOME.support_x.float(), SOME.support_y), r"float32, and the learner's weights are torch.float64"),
        ("maml", (SOME.support_x, F.one_hot(SOME.support_y)), r"of one-hot labels, .argmax\(-1\)"),
        ("maml", (SOME.support_x, SOME.support_y.numpy()), "the support labels must be a tensor, got ndarray"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind).fit(*arguments)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (SOME.query_x[:2], "fitted to 3 episodes, and query_x holds 2"),
        (SOME.query_x[..., :3], r"examples of shape \(4,\), got \(3, 6, 3\)"),
        (SOME.query_x[:, :0], "query_x is empty"),
        (SOME.query_x.float(), "query_x is torch.float32, and the support set was torch.float64"),
    ],
)
def test_queries_that_do_not_fit_are_refused(query: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("protonet").fit(SOME.support_x, SOME.support_y).predict(query)


def test_regression_and_classification_are_not_mixed_up() -> None:
    functions = episodes(ways=None)
    with pytest.raises(ValueError, match="made for regression"):
        make("maml", ways=None).meta_loss(SOME)
    with pytest.raises(ValueError, match="must be int64"):
        make("maml").fit(functions.support_x, functions.support_y)
    with pytest.raises(ValueError, match=r"made for 1 output\(s\), and the targets have 2"):
        make("maml", ways=None).fit(functions.support_x, functions.support_y.repeat(1, 1, 2))
    x, y = functions.support_x, functions.support_y
    for targets in (y.repeat(1, 1, 2), y[..., 0], y.long()):
        with pytest.raises(ValueError, match="targets must be floating"):
            Episodes(x, y, x, targets, None)
    x = SOME.support_x[..., :3]
    with pytest.raises(ValueError, match=r"made for examples of shape \(4,\)"):
        make("maml").meta_loss(Episodes(x, SOME.support_y, x, SOME.support_y, WAYS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization": "batch"}, "normalization must be one of"),
        ({"episodes_at_once": 0}, "episodes_at_once must be a whole number of at least 1"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 1.5}, "steps must be a whole number of at least 1, got 1.5"),
        ({"test_steps": 0}, "test_steps must be a whole number of at least 1"),
        ({"adapted": "tail"}, "adapted must be one of"),
        ({"inner_loss": "sum"}, "inner_loss must be one of"),
        ({"learning_rate": float("inf")}, "learning_rate must be positive and finite"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LEARNERS["maml"](**settings)


def test_tables_of_batch_normalization_are_not_adapted() -> None:
    with pytest.raises(ValueError, match="take adapted='all_but_norm'"):
        make("maml_pp", adapted="all")
    learner = make("maml_pp", adapted="all", per_step_norm_weights=False)
    assert bool(learner.meta_loss(episodes()).isfinite())


@pytest.mark.parametrize("kind", PRETRAINED)
def test_pretraining_needs_the_number_of_classes(kind: str) -> None:
    with pytest.raises(ValueError, match="give num_classes"):
        LEARNERS[kind]().build(backbone(), LearnerShape(EXAMPLE, WAYS))


def test_a_backbone_for_other_examples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take examples of shape \(3,\)"):
        LEARNERS["maml"]().build(backbone(), LearnerShape((3,), WAYS))
    with pytest.raises(ValueError, match="ways must be at least 2"):
        LearnerShape((3,), ways=1)
