"""Learners that adapt a network, against what one would write by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnedopt import zoo
from learnedopt.fewshot.episodes import Episodes
from learnedopt.fewshot.evaluate import evaluate
from learnedopt.fewshot.learner import Learner, LearnerShape
from learnedopt.fewshot.learners import (
    LEARNERS,
    Finetune,
    FinetuneConfig,
    MAMLConfig,
    MAMLPlusPlus,
    MAMLPlusPlusConfig,
    MetaLSTMLearner,
    MetaLSTMLearnerConfig,
    MetaSGDConfig,
    NearestNeighbour,
    Reptile,
    ReptileConfig,
)
from learnedopt.fewshot.learners.inner_loop import AdaptedNetwork, InnerLoopLearner
from learnedopt.fewshot.normalization import batch_norms
from learnedopt.fewshot.sources import ClassSet, FewShotTask, TrainingSource
from learnedopt.optim import MetaLSTMOptimizer
from learnedopt.rules import MetaLSTMConfig
from tests.fewshot.support import assert_gradient_is_exact, backbone, episodes, generator, make, meta_gradient


def plain(learner: Learner) -> nn.Sequential:
    """The same network from nothing but torch's modules, with the learner's weights, in training mode."""
    assert isinstance(learner, InnerLoopLearner)
    head = learner.model.head
    assert isinstance(head, nn.Linear)
    outputs = max(head.out_features, learner.shape.ways or 1)  # a shared row is copied to all
    network = nn.Sequential(backbone(bool(batch_norms(learner.model))), nn.Linear(head.in_features, outputs)).double()
    own = dict(learner.model.named_parameters())
    names = {"0": "backbone", "1": "head"}
    with torch.no_grad():
        for name, value in network.named_parameters():
            first, rest = name.split(".", 1)
            value.copy_(own[f"{names[first]}.{rest}"])
    return network.train()


def adapted_weights(learner: Learner, of: Episodes) -> dict[str, Tensor]:
    """Those of the first episode."""
    (part, *_) = learner.fit(of.support_x[:1], of.support_y[:1]).parts
    assert isinstance(part, AdaptedNetwork)
    return {name: value[0] for name, value in part.params.items()}


SECOND_ORDER: list[tuple[str, dict[str, Any]]] = [
    ("maml", {"steps": 2}),
    ("maml", {"steps": 2, "adapted": "all", "normalization": "support"}),
    ("maml", {"steps": 2, "normalization": "transductive", "episodes_at_once": 1}),
    ("anil", {"steps": 2}),
    ("anil", {"steps": 2, "readout": "shared"}),
    ("meta_sgd", {"steps": 2, "initial_rates": (0.1, 0.5)}),
    ("maml_pp", {"steps": 2, "multi_step_loss": 1.0}),
    ("maml_pp", {"steps": 2, "learned_rates": False, "per_step_norm_weights": False}),
    ("meta_lstm", {"steps": 3, "first_order": False, "rule": MetaLSTMConfig(hidden_size=3)}),
    ("meta_lstm", {"steps": 2, "first_order": False, "normalization": "support", "rule": MetaLSTMConfig(4)}),
]


@pytest.mark.parametrize(("kind", "settings"), SECOND_ORDER)
def test_the_meta_gradient_is_that_of_finite_differences(kind: str, settings: dict[str, Any]) -> None:
    learner = make(kind, **settings)
    if isinstance(learner, MetaLSTMLearner):  # its fresh gates hardly open
        nn.init.constant_(learner.rule.input_gate.bias, -0.5)
        nn.init.constant_(learner.rule.forget_gate.bias, 1.0)
        for weight in learner.rule.lstm.parameters():
            nn.init.normal_(weight, std=0.3, generator=generator())
    assert_gradient_is_exact(learner, episodes(2))


@pytest.mark.parametrize("kind", ["maml", "meta_lstm", "anil"])
def test_first_order_is_another_gradient_and_the_same_loss(kind: str) -> None:
    some = episodes(2)
    exact, first = (make(kind, steps=2, first_order=value) for value in (False, True))
    assert torch.equal(exact.meta_loss(some), first.meta_loss(some))
    assert not torch.allclose(meta_gradient(exact, some), meta_gradient(first, some), rtol=1e-3)


def test_first_order_maml_is_gradient_descent_and_the_gradient_where_it_ends() -> None:
    """The first-order meta-gradient, from a copied network, ``torch.optim.SGD`` and two calls of ``backward``."""
    learner = make("maml", steps=3, first_order=True, adapted="all", learning_rate=0.3, inner_loss="mean")
    some = episodes(2)
    total: dict[str, Tensor] = {}
    for number in range(2):
        network = plain(learner)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(some.support_x[number]), some.support_y[number]).backward()
            optimizer.step()
        optimizer.zero_grad()
        (F.cross_entropy(network(some.query_x[number]), some.query_y[number]) / 2).backward()
        for name, weight in network.named_parameters():
            assert weight.grad is not None
            total[name] = total.get(name, torch.zeros(())) + weight.grad
    expected = torch.cat([value.flatten() for value in total.values()])
    torch.testing.assert_close(meta_gradient(learner, some), expected)


def test_the_sum_over_classes_is_a_larger_rate() -> None:
    """The convention of MAML's code: with N ways its rate of 0.4 is N · 0.4 for the mean."""
    some = episodes()
    summed = make("maml", inner_loss="sum_over_classes", learning_rate=0.4)
    mean = make("maml", inner_loss="mean", learning_rate=3 * 0.4)
    torch.testing.assert_close(summed.meta_loss(some), mean.meta_loss(some))
    functions = episodes(ways=None)
    losses = [
        make("maml", ways=None, learning_rate=0.1, inner_loss=how).meta_loss(functions)
        for how in ("mean", "sum_over_classes")
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("kind", ["maml", "anil", "meta_lstm"])
def test_a_shared_readout_is_equal_rows(kind: str) -> None:
    """The same predictions, and the gradient of its one row the sum of theirs."""
    some = episodes()
    shared, rows = make(kind, readout="shared"), make(kind)
    weights = shared.state_dict()
    rows.load_state_dict(
        {
            name: weights[name].expand_as(value) if name.startswith("model.head.") else weights[name]
            for name, value in rows.state_dict().items()
        }
    )
    predictions = [learner.fit(some.support_x, some.support_y).predict(some.query_x) for learner in (shared, rows)]
    torch.testing.assert_close(*predictions)
    gradients = []
    for learner in (shared, rows):
        learner.meta_loss(some).backward()
        gradients.append(
            {
                name: weight.grad.sum(0, keepdim=True) if name.startswith("model.head.") else weight.grad
                for name, weight in learner.named_parameters()
                if weight.grad is not None
            }
        )
    assert gradients[0]["model.head.weight"].any()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["maml", "anil", "meta_sgd", "maml_pp", "meta_lstm"])
def test_a_shared_readout_takes_episodes_of_any_ways(kind: str) -> None:
    learner = make(kind, readout="shared").eval()
    for ways in (2, 5):
        some = episodes(ways=ways)
        made_for_them = make(kind, readout="shared", ways=ways).eval()
        made_for_them.load_state_dict(learner.state_dict())
        predictions = learner.fit(some.support_x, some.support_y).predict(some.query_x)
        assert predictions.shape[-1] == ways
        assert torch.equal(predictions, made_for_them.fit(some.support_x, some.support_y).predict(some.query_x))
        assert torch.equal(learner.meta_loss(some), made_for_them.meta_loss(some))
    with pytest.raises(ValueError, match="was made for 3 ways, and the episodes have 5: build it with ways=5"):
        make(kind).meta_loss(episodes(ways=5))


def test_a_shared_readout_is_refused_where_it_means_nothing() -> None:
    for kind in ("finetune", "reptile"):
        with pytest.raises(ValueError, match="readout must be 'per_class'"):
            LEARNERS[kind](readout="shared")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no classes to share a read-out"):
        make("maml", ways=None, readout="shared")
    with pytest.raises(ValueError, match="readout of a maml cannot change once it is built"):
        make("maml").with_config(readout="shared")
    with pytest.raises(ValueError, match="readout must be one of"):
        MAMLConfig(readout="both")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adapted", "count"),
    [("all", 6), ("all_but_norm", 4), ("head", 2)],
)
def test_only_what_is_to_be_adapted_is(adapted: str, count: int) -> None:
    learner = make("maml", adapted=adapted).eval()
    weights = adapted_weights(learner, episodes())
    assert len(weights) == count
    own = dict(learner.named_parameters())
    biases_before_norm = {"backbone.body.0.bias"}  # batch normalization takes them away: no gradient
    for name, value in weights.items():
        assert torch.allclose(value, own[f"model.{name}"], atol=1e-10) == (name in biases_before_norm)
    assert not any("body.1" in name for name in weights) or adapted == "all"


def test_more_steps_in_evaluation() -> None:
    one, two = (make("maml", steps=1, test_steps=steps).eval() for steps in (None, 2))
    some = episodes()
    first, second = (adapted_weights(learner, some)["head.bias"] for learner in (one, two))
    assert not torch.equal(first, second)
    assert torch.equal(first, adapted_weights(two.train(), some)["head.bias"])


def test_equal_rates_make_meta_sgd_maml() -> None:
    some = episodes()
    learner = MetaSGDConfig(initial_rates=(0.2, 0.2)).build(backbone(), LearnerShape((4,), 3), generator()).double()
    other = MAMLConfig(learning_rate=0.2).build(backbone(), LearnerShape((4,), 3), generator()).double()
    torch.testing.assert_close(learner.meta_loss(some), other.meta_loss(some))


# The meta-LSTM.


@pytest.mark.parametrize(("steps", "shift"), [(12, 0.0), (5, -0.7)])
@pytest.mark.parametrize("feedback", ["gate", "preactivation"])
@pytest.mark.parametrize("readout", ["per_class", "shared"])
def test_the_meta_lstm_updates_as_its_optimizer_does(
    steps: int, shift: float, feedback: str, readout: str, tmp_path: Any
) -> None:
    """``MetaLSTMOptimizer`` in a plain training loop arrives where ``fit`` does, also by way of the zoo."""
    rule = MetaLSTMConfig(gate_feedback=feedback, gradient_divisor=2.0)  # type: ignore[arg-type]
    config = MetaLSTMLearnerConfig(steps=steps, readout=readout, rule=rule, gate_shift=shift)  # type: ignore[arg-type]
    learner = config.build(backbone(), LearnerShape((4,), 3), generator()).eval()
    assert isinstance(learner, MetaLSTMLearner)
    draws = generator(5)
    with torch.no_grad():
        for weight in learner.rule.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draws))
    some = episodes(1).to(dtype=torch.float32)
    learner = learner.float()
    weights = adapted_weights(learner, some)
    moved = learner.with_config(gate_shift=0.0)
    with torch.no_grad():
        moved.rule.input_gate.bias.add_(shift)
        torch.testing.assert_close(adapted_weights(moved, some), weights)
        moved.rule.input_gate.bias.sub_(shift)

    entry = zoo.save_rule(
        learner.export_rule(), tmp_path / "one", name="one", description="A test.", card="#", meta_training={}
    )
    network = plain(learner).float()
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    optimizer = MetaLSTMOptimizer(network.parameters(), rule=entry.path)
    optimizer.load_initialization()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(some.support_x[0]), some.support_y[0])
        loss.backward()
        optimizer.step(loss=loss)
    for value, expected in zip(network.parameters(), weights.values()):
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_meta_lstm_chooses_its_gate_on_validation() -> None:
    """And is trained without: what it learns is the gate."""
    draws = generator()
    images = 3 * torch.rand(7, 1, 4, generator=draws) + 0.1 * torch.rand(7, 6, 4, generator=draws)
    task = FewShotTask(ClassSet("toy", tuple("abcdefg"), images.flatten(0, 1), (6,) * 7), 3, 2, 3)
    rule = MetaLSTMConfig(input_bias=(-30.0, -30.0), forget_bias=(30.0, 30.0))  # stays where it begins
    learner = make("meta_lstm", rule=rule, gate_shifts=(0.0, 30.0), normalization="support").float()
    gradient = meta_gradient(learner, next(task.frozen(2).batches(2)))
    learner.eval()
    assert learner.choose_settings(task.frozen(8)) == {"gate_shift": 30.0}
    assert isinstance(learner.config, MetaLSTMLearnerConfig) and learner.config.gate_shift == 30.0
    assert evaluate(learner, task.frozen(8)).mean > evaluate(learner.with_config(gate_shift=0.0), task.frozen(8)).mean
    learner.train()
    assert torch.equal(meta_gradient(learner, next(task.frozen(2).batches(2))), gradient)
    fixed = make("meta_lstm", gate_shift=-1.0)
    assert fixed.choose_settings(episodes()) == {} and fixed.config == fixed.with_config(gate_shift=-1.0).config
    for wrong in ({"gate_shift": float("nan")}, {"gate_shifts": ()}, {"gate_shifts": (float("inf"),)}):
        with pytest.raises(ValueError, match="gate shifts must be finite, at least one"):
            make("meta_lstm", **wrong)


def test_the_meta_lstm_starts_as_published() -> None:
    learner = make("meta_lstm")
    assert isinstance(learner, MetaLSTMLearner)
    assert (MetaLSTMLearnerConfig().steps, learner.rule.config.hidden_size) == (12, 20)
    assert 4 <= learner.rule.forget_gate.bias.item() <= 5
    assert -5 <= learner.rule.input_gate.bias.item() <= -4
    with pytest.raises(ValueError, match="leave learner_shapes of the rule empty"):
        MetaLSTMLearnerConfig(rule=MetaLSTMConfig(learner_shapes=((1,),)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.again = self.layer
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.again(self.layer(x)[:, :1].expand(-1, 4)))


@pytest.mark.parametrize("kind", ["maml", "meta_lstm", "reptile", "meta_sgd"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_scalars_and_tied_weights_are_adapted_too(kind: str, at_once: int) -> None:
    settings: dict[str, Any] = {"steps": 2, "episodes_at_once": at_once}
    learner = LEARNERS[kind](**settings).build(Scaled(), LearnerShape((4,), 3), generator()).double()
    some = episodes()
    weights = adapted_weights(learner, some)
    assert set(weights) == {f"backbone.{name}" for name in ("layer.weight", "layer.bias", "scale")} | {
        "head.weight",
        "head.bias",
    }
    own = dict(learner.named_parameters())
    assert not any(torch.equal(value, own[f"model.{name}"]) for name, value in weights.items())
    adapted = learner.fit(some.support_x, some.support_y)
    alone = torch.stack([learner.fit(x, y).predict(q) for x, y, q in zip(some.support_x, some.support_y, some.query_x)])
    torch.testing.assert_close(adapted.predict(some.query_x), alone)


# Reptile.


def test_running_averages_of_every_step_are_means_of_their_own() -> None:
    """With ``momentum=None``, where the share of a new value depends on how many there have been."""
    norm = nn.BatchNorm1d(4, momentum=None)
    learner = MAMLPlusPlusConfig(steps=1, normalization="running").build(norm, LearnerShape((4,), 2)).double()
    some = episodes(1, ways=2)
    learner.meta_loss(some)
    (own,) = batch_norms(learner).values()
    assert own.running_mean is not None and own.running_var is not None
    for row, x in enumerate((some.support_x[0], some.query_x[0])):
        torch.testing.assert_close(own.running_mean[row], x.mean(0))
        torch.testing.assert_close(own.running_var[row], x.var(0))


def test_reptile_is_adam_without_momentum() -> None:
    """From a copied network and ``torch.optim.Adam``: the pseudo-gradient, and the second moments that go on."""
    config = ReptileConfig(steps=3, batch_size=6, learning_rate=0.02, beta2=0.9)
    learner = config.build(backbone(), LearnerShape((4,), 3), generator()).double()
    assert isinstance(learner, Reptile)
    some = episodes(1)
    network = plain(learner)
    start = torch.cat([weight.detach().flatten() for weight in network.parameters()])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02, betas=(0.0, 0.9))
    for round_ in range(2):
        for name, weight in network.named_parameters():
            own = dict(learner.model.named_parameters())
            weight.data.copy_(own[name.replace("0.", "backbone.", 1) if name[0] == "0" else f"head{name[1:]}"].data)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(some.support_x[0]), some.support_y[0])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        end = torch.cat([weight.detach().flatten() for weight in network.parameters()])
        torch.testing.assert_close(meta_gradient(learner, some), start - end)
        assert int(learner.updates) == 3 * (round_ + 1)
    # The last loss is the value; a further call begins from moments that have gone on, and so ends elsewhere.
    again = learner.meta_loss(some)
    assert abs(again.item() - losses[-1]) < 1e-2
    assert learner.eval().meta_loss(some).item() != again.item()


def test_reptile_learns_what_it_adapts() -> None:
    with pytest.raises(ValueError, match="adapted must be 'all'"):
        ReptileConfig(adapted="head")


def test_a_minibatch_is_never_of_one_class() -> None:
    """Support sets come ordered by class, and training on one class after another would unlearn the others."""
    from learnedopt.fewshot.learners.reptile import _minibatches

    found = _minibatches(25, 5)
    rows = torch.stack([next(found) for _ in range(20)])
    assert all(sorted(pass_.flatten().tolist()) == list(range(25)) for pass_ in rows.split(5))
    classes = rows // 5
    assert (classes.amax(1) > classes.amin(1)).all()
    assert next(_minibatches(3, 5)).tolist() != [] and len(next(_minibatches(3, 5))) == 3


# MAML++.

OFF: dict[str, Any] = {
    "multi_step_loss": 0.0,
    "learned_rates": False,
    "per_step_norm_weights": False,
    "per_step_norm_statistics": False,
}


def test_with_everything_off_it_is_maml() -> None:
    some = episodes()
    shared: dict[str, Any] = {"steps": 2, "learning_rate": 0.1, "inner_loss": "mean"}
    plus, maml = make("maml_pp", **OFF, **shared), make("maml", **shared)
    assert torch.equal(meta_gradient(plus, some), meta_gradient(maml, some))


def test_the_losses_after_each_step_fade() -> None:
    learner = make("maml_pp", steps=4, multi_step_loss=0.5)
    assert isinstance(learner, MAMLPlusPlus)
    assert learner.step_weights() == [0.25] * 4
    learner.set_progress(0.25)
    assert learner.step_weights() == [0.125, 0.125, 0.125, 0.625]
    learner.set_progress(0.499)
    assert learner.step_weights()[0] == pytest.approx(0.03 / 4)
    learner.set_progress(0.5)
    assert learner.step_weights() == [0, 0, 0, 1]


def test_second_derivatives_come_in_when_it_is_time() -> None:
    some = episodes()
    learner, first = make("maml_pp", first_order_share=0.3, **OFF), make("maml_pp", first_order=True, **OFF)
    assert torch.equal(meta_gradient(learner, some), meta_gradient(first, some))
    learner.set_progress(0.3)
    assert torch.equal(meta_gradient(learner, some), meta_gradient(make("maml_pp", **OFF), some))


def test_every_number_of_updates_has_its_own_batch_normalization() -> None:
    learner = make("maml_pp", steps=2, normalization="running", multi_step_loss=0.0)
    (norm,) = batch_norms(learner).values()
    assert norm.weight.shape == (3, 5)
    assert norm.running_mean is not None
    learner.meta_loss(episodes()).backward()
    rows = norm.running_mean
    assert rows.shape == (3, 5)
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[1], rows[2])
    assert norm.weight.grad is not None
    assert norm.weight.grad.any(1).all()
    with torch.no_grad():
        norm.weight[2] = 0.0  # what the queries see
    some = episodes()
    predictions = learner.eval().fit(some.support_x, some.support_y).predict(some.query_x)
    torch.testing.assert_close(predictions, predictions[:, :1].expand_as(predictions))


def test_there_is_nothing_learned_for_further_steps() -> None:
    with pytest.raises(ValueError, match="test_steps=6 is more than steps=5"):
        MAMLPlusPlusConfig(test_steps=6)
    with pytest.raises(ValueError, match="the features do not change from step to step"):
        MAMLPlusPlusConfig(adapted="head")
    MAMLPlusPlusConfig(test_steps=6, learned_rates=False, per_step_norm_weights=False, per_step_norm_statistics=False)


# Finetuning.


@pytest.mark.parametrize("adapted", ["all", "head"])
def test_finetuning_is_gradient_descent_with_a_new_read_out(adapted: str) -> None:
    config = FinetuneConfig(steps=4, learning_rate=0.3, decay=0.5, adapted=adapted, normalization="support")  # type: ignore[arg-type]
    learner = config.build(backbone(), LearnerShape((4,), 3, 7), generator()).double().eval()
    some = episodes(1)
    weights = adapted_weights(learner, some)
    network = copy.deepcopy(plain(learner))
    head = network[1] = nn.Linear(5, 3).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD((network if adapted == "all" else head).parameters(), lr=0.3)
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.3 / (1 + 0.5 * step)
        optimizer.zero_grad()
        F.cross_entropy(network(some.support_x[0]), some.support_y[0]).backward()
        optimizer.step()
    expected = {f"head.{name}": value.detach() for name, value in head.named_parameters()}
    if adapted == "all":
        expected |= {f"backbone.{name}": value.detach() for name, value in network[0].named_parameters()}
    torch.testing.assert_close(weights, expected)


def test_finetuning_chooses_its_rate_on_validation() -> None:
    draws = generator()
    images = 3 * torch.rand(7, 1, 4, generator=draws) + 0.3 * torch.rand(7, 6, 4, generator=draws)
    task = FewShotTask(ClassSet("toy", tuple("abcdefg"), images.flatten(0, 1), (6,) * 7), 3, 2, 3)
    learner = make("finetune", learning_rates=(1e-9, 0.5), decays=(0.0,), steps=5, normalization="support").float()
    assert isinstance(learner, Finetune)
    chosen = learner.choose_settings(task.frozen(8))
    assert chosen == {"learning_rate": 0.5, "decay": 0.0}
    assert learner.config.learning_rate == 0.5
    assert evaluate(learner, task.frozen(8)).mean > 0.5


def test_both_baselines_have_the_same_network() -> None:
    one, other = make("finetune"), make("nearest_neighbour")
    assert isinstance(other, NearestNeighbour)
    draws = generator()
    images = torch.rand(42, 4, generator=draws, dtype=torch.float64)
    source = TrainingSource(FewShotTask(ClassSet("toy", tuple("abcdefg"), images, (6,) * 7), 3, 2, 3))
    losses = [learner.training_step(source, generator()) for learner in (one, other)]
    assert torch.equal(*losses)
    other.load_state_dict(one.state_dict())
