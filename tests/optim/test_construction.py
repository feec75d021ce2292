"""What an optimizer accepts, and what it says about the rest."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import learnedopt
from learnedopt import LearnedOptimizer, LSTMOptimizer, MetaLSTMOptimizer, zoo
from learnedopt.rules import LSTMConfig, LSTMRule, MetaLSTMConfig, MetaLSTMRule, UpdateRule
from learnedopt.zoo import rule_fingerprint, save_rule
from tests.optim.reference import CASES, Case, ReferenceLoop, TraceRule, draw_grads, same_bits, trained

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def small_lstm(seed: int = 0) -> LSTMRule:
    return trained(LSTMRule(LSTMConfig(hidden_size=4)), seed)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture
def zoo_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo in which the defaults of the optimizers can be found."""
    for seed, name in enumerate(("default", "mnist-mlp", "conv-lstm")):
        save_rule(small_lstm(seed), tmp_path / name, name=name, description="-", card="-", meta_training={})
    monkeypatch.setattr(zoo, "root", lambda: tmp_path)
    return tmp_path


@each_case
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "Invalid learning rate: -0.001"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": math.inf}, "Invalid learning rate: inf"),
        ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
        ({"lr": torch.tensor(-0.5)}, "Invalid learning rate: -0.5"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"weight_decay": math.nan}, "Invalid weight_decay value: nan"),
    ],
)
def test_bad_numbers_are_refused_for_the_optimizer_and_for_a_group(
    case: Case, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        case.build([torch.ones(2, requires_grad=True)], **options)
    optimizer = case.build([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("lr", "decay", "warned"), [(1.0, 0.01, True), (1.0, 1e-5, False), (1e-3, 0.1, False)])
def test_weight_decay_meant_for_a_small_lr_is_noticed(lr: float, decay: float, warned: bool) -> None:
    groups: list[dict[str, Any]] = [{"params": [torch.ones(2)], "weight_decay": decay}, {"params": [torch.ones(2)]}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LearnedOptimizer(groups, rule=LSTMRule(), lr=lr)
    of_decay = [str(one.message) for one in caught if "weight_decay=" in str(one.message)]
    assert [message.split(" in every step")[0] for message in of_decay] == (
        ["weight_decay=0.01 at lr=1 takes 1 % off every weight"] if warned else []
    )


@pytest.mark.parametrize(("lr", "warned"), [(1e-3, True), (1e-2, True), (0.0, False), (0.02, False), (1.0, False)])
def test_a_rate_meant_for_adam_is_noticed_once(lr: float, warned: bool) -> None:
    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        optimizer = LearnedOptimizer([{"params": params[:1]}, {"params": params[1:2]}], lr=lr)
        optimizer.add_param_group({"params": params[2:]})
    assert len(found) == warned
    assert all("leave lr out: 1 is the rule as it was trained" in str(each.message) for each in found)
    assert all(each.filename == __file__ for each in found)


@each_case
def test_an_empty_parameter_list_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        case.build([])


def test_what_is_not_a_rule_is_refused() -> None:
    params = [torch.ones(2, requires_grad=True)]
    with pytest.raises(TypeError, match="name in the zoo, a folder, or an UpdateRule object, got Linear"):
        LearnedOptimizer(params, nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no-such-rule"):
        LearnedOptimizer(params, "no-such-rule")
    optimizer = LearnedOptimizer(params, TraceRule())
    with pytest.raises(ValueError, match="no-such-rule"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "rule": "no-such-rule"})
    assert len(optimizer.param_groups) == 1


def test_a_class_for_one_kind_of_rule_refuses_the_others() -> None:
    params = [torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"kind 'lstm', and 'meta_lstm' is of kind 'meta_lstm'.*LearnedOptimizer"):
        LSTMOptimizer(params, MetaLSTMRule())
    with pytest.raises(ValueError, match="kind 'meta_lstm', and 'lstm' is of kind 'lstm'"):
        MetaLSTMOptimizer(params, small_lstm())
    with pytest.raises(ValueError, match="kind 'lstm', and 'trace'"):
        LSTMOptimizer([{"params": params, "rule": TraceRule()}])


def test_the_meta_lstm_must_be_given_a_rule() -> None:
    with pytest.raises(ValueError, match="MetaLSTMOptimizer has no default rule: pass rule="):
        MetaLSTMOptimizer([torch.ones(2, requires_grad=True)])


@pytest.mark.parametrize(("optimizer", "name"), [(LearnedOptimizer, "default"), (LSTMOptimizer, "mnist-mlp")])
def test_without_a_rule_the_default_of_the_class_is_loaded(
    optimizer: type[LearnedOptimizer], name: str, zoo_root: Path
) -> None:
    (group,) = optimizer(model().parameters()).param_groups
    assert group["rule"] == name
    assert group["rule_sha256"] == rule_fingerprint(learnedopt.load_rule(name))


def test_the_default_is_not_read_where_every_group_brings_its_rule() -> None:
    net = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [
        {"params": [net.weight], "rule": small_lstm(1)},
        {"params": [net.bias], "rule": TraceRule()},
    ]
    optimizer = LearnedOptimizer(groups)
    assert [group["rule"] for group in optimizer.param_groups] == ["lstm", "trace"]


def test_a_rule_is_found_by_name_by_folder_and_as_an_object(zoo_root: Path) -> None:
    param = torch.ones(3, requires_grad=True)
    groups = [
        LearnedOptimizer([param], rule).param_groups[0]
        for rule in ("conv-lstm", str(zoo_root / "conv-lstm"), zoo_root / "conv-lstm", small_lstm(2))
    ]
    assert [group["rule"] for group in groups] == ["conv-lstm", "conv-lstm", "conv-lstm", "lstm"]
    assert len({group["rule_sha256"] for group in groups}) == 1


def test_groups_run_their_own_rules_with_their_own_options(zoo_root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rules: list[UpdateRule] = [TraceRule(), small_lstm(0), small_lstm(2), small_lstm(0)]
    params = [torch.randn(4, generator=generator).requires_grad_() for _ in rules]
    draw_grads(generator, params)
    groups: list[dict[str, Any]] = [
        {"params": [params[0]], "rule": rules[0], "lr": 0.5},
        {"params": params[1:2]},
        {"params": [params[2]], "rule": "conv-lstm", "weight_decay": 0.2},
    ]
    optimizer = LearnedOptimizer(groups, rule="default", lr=0.7, weight_decay=0.1)
    optimizer.add_param_group({"params": params[3]})
    expected = []
    options = [(0.5, 0.1), (0.7, 0.1), (0.7, 0.2), (0.7, 0.1)]
    for param, rule, (lr, weight_decay) in zip(params, rules, options):
        reference = ReferenceLoop(rule, [param])
        assert param.grad is not None
        reference.step([param.grad], 0.0, lr, weight_decay)
        expected += reference.params
    optimizer.step()
    for param, value in zip(params, expected):
        torch.testing.assert_close(param.detach(), value)


def test_a_group_dictionary_is_not_changed_and_can_be_used_again() -> None:
    group = {"params": [torch.ones(2, requires_grad=True)], "rule": small_lstm()}
    before = dict(group)
    identities = [LearnedOptimizer([group], lr=lr).param_groups[0] for lr in (0.1, 0.2)]
    assert group == before
    assert [identity["lr"] for identity in identities] == [0.1, 0.2]


def test_groups_of_an_optimizer_serve_to_build_another_with_the_same_rule() -> None:
    rule = small_lstm()
    first = LearnedOptimizer([torch.ones(2, requires_grad=True)], rule, lr=0.3)
    second = LearnedOptimizer(first.param_groups, rule)
    assert second.param_groups == first.param_groups


@each_case
def test_the_rule_of_the_caller_is_copied_and_left_as_it_is(case: Case) -> None:
    rule = case.rule().train()
    weights = [weight.detach().clone() for weight in rule.parameters()]
    param = torch.ones(3, requires_grad=True)
    optimizer = case.optimizer([param], rule)
    param.grad = torch.ones(3)
    optimizer.step(loss=1.0)
    assert rule.training
    assert all(weight.requires_grad and weight.grad is None for weight in rule.parameters())
    assert same_bits(list(rule.parameters()), weights)

    twin = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.zero_()
    optimizer.add_param_group({"params": [twin]})
    twin.grad = torch.ones(3)
    param.grad = None
    param.requires_grad_(False)  # twin is alone again, as the default sees it
    optimizer.step(loss=1.0)
    assert torch.equal(twin, param)


@each_case
def test_named_parameters_generators_and_empty_groups(case: Case) -> None:
    net = model()
    named = case.optimizer(net.named_parameters(), case.rule())
    assert named.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    groups: list[dict[str, Any]] = [{"params": net.parameters()}, {"params": []}]
    grouped = case.optimizer(groups, case.rule())
    net(torch.ones(3)).sum().backward()
    grouped.step(loss=1.0)
    assert len(grouped.state) == 4


@each_case
def test_parameters_must_be_ordered_distinct_and_all_named_or_none(case: Case) -> None:
    one, two = (torch.ones(2, requires_grad=True) for _ in range(2))
    said = []  # torch warns of sets from 2.15 on
    for make in (torch.optim.SGD, lambda params: case.optimizer(params, case.rule())):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make({one, two})
        said.append([(warning.category, str(warning.message)) for warning in caught])
    assert said[0] == said[1]
    with pytest.raises(TypeError, match="ordered collections"):
        case.optimizer([{"params": {one, two}}], case.rule())
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        case.optimizer(one, case.rule())
    with pytest.raises(ValueError, match="more than one parameter group"):
        case.optimizer([{"params": one}, {"params": one}], case.rule())
    with pytest.raises(ValueError, match="with/without names"):
        case.optimizer([("one", one), two], case.rule())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        case.build([one * 2])


@each_case
def test_a_group_added_later_has_every_option(case: Case) -> None:
    optimizer = case.build([torch.ones(2, requires_grad=True)], lr=0.5, weight_decay=0.1, maximize=True)
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "lr": 0.25})
    first, second = optimizer.param_groups
    assert {**second, "params": None} == {**first, "params": None, "lr": 0.25}


@each_case
def test_printing_names_the_rule_and_not_its_weights(case: Case) -> None:
    optimizer = case.build([torch.ones(2, requires_grad=True)])
    assert f"rule: {case.rule().config.kind}" in repr(optimizer)
    assert "Parameter containing" not in repr(optimizer)


# The learned initialization of the meta-LSTM -----------------------------------------------------------------------


def learner_rule() -> MetaLSTMRule:
    return trained(MetaLSTMRule(MetaLSTMConfig(hidden_size=4, learner_shapes=((2, 3), (2,)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_learned_initialization_is_copied_into_the_parameters(dtype: torch.dtype) -> None:
    rule, net = learner_rule(), nn.Linear(3, 2, dtype=dtype)
    initial = rule.initial_params
    assert initial is not None
    groups: list[dict[str, Any]] = [{"params": net.weight}, {"params": net.bias}]
    MetaLSTMOptimizer(groups, rule).load_initialization()
    assert torch.equal(net.weight, initial[0].to(dtype)) and torch.equal(net.bias, initial[1].to(dtype))


def test_an_initialization_that_does_not_fit_changes_nothing() -> None:
    net = nn.Linear(3, 2)
    before = [param.detach().clone() for param in net.parameters()]
    swapped = MetaLSTMOptimizer([net.bias, net.weight], learner_rule())
    with pytest.raises(ValueError, match=r"learner of shapes \[\(2, 3\), \(2,\)\].*shapes \[\(2,\), \(2, 3\)\]"):
        swapped.load_initialization()
    with pytest.raises(ValueError, match="'meta_lstm' has no learned initialization"):
        MetaLSTMOptimizer(net.parameters(), MetaLSTMRule()).load_initialization()
    assert same_bits(list(net.parameters()), before)
