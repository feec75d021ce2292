"""What a run can do beyond following one meta-gradient: averages, teachers, curricula, memory, backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from learnedopt.kernels.core import extension
from learnedopt.meta import (
    ES,
    ESTIMATORS,
    FullBPTT,
    FullES,
    Imitation,
    MetaTrainConfig,
    MetaTrainer,
    SGDTeacher,
    Stages,
    TruncatedBPTT,
    copies_that_fit,
)
from learnedopt.meta.backends import computed
from learnedopt.meta.memory import MOST, free_memory
from learnedopt.rules import AdamLSTMConfig, LSTMConfig, LSTMRule, RuleConfig, UpdateRule, build_rule
from learnedopt.tasks import Quadratics
from tests.meta.support import SMALL_MLP, assert_same

RULE = LSTMConfig(hidden_size=3)
FAMILY = Quadratics(dimension=3)
CONFIG = MetaTrainConfig(
    updates=12, unroll_length=2, horizon=(4, 4), copies=2, learning_rate=2e-2, validate_every=3, validation_horizon=4
)


def finished(config: MetaTrainConfig, rule: RuleConfig = RULE) -> tuple[MetaTrainer, list[dict[str, Any]]]:
    trainer = MetaTrainer(rule, FAMILY, config)
    return trainer, list(trainer.run())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_trains_below_the_untrained_rule(name: str) -> None:
    config = MetaTrainConfig(
        updates=40,
        unroll_length=10,
        horizon=(20, 20),
        copies=32,
        objective="log_ratio",
        estimator=ESTIMATORS[name](),  # type: ignore[arg-type]
        learning_rate=2e-2,
        validate_every=40,
        validation_horizon=20,
    )
    trainer = MetaTrainer(AdamLSTMConfig(hidden_size=4), Quadratics(dimension=4), config)
    untrained = trainer.validate()
    list(trainer.run())
    assert trainer.best_score < untrained - 0.4


@pytest.mark.parametrize(("estimator", "steps"), [(FullBPTT(), 12), (FullES(), 24)], ids=["bptt", "es"])
def test_a_full_estimator_takes_an_episode_at_a_time(estimator: FullBPTT | FullES, steps: int) -> None:
    config = replace(CONFIG, estimator=estimator, horizon=(6, 6))
    _, records = finished(config)
    assert {record["steps"] for record in records} == {steps}


def test_the_average_of_the_weights_is_what_is_validated_and_kept() -> None:
    decay = 0.8
    trainer = MetaTrainer(RULE, FAMILY, replace(CONFIG, ema_decay=decay))
    average = None
    for _ in trainer.run():
        weights = trainer.rule.get_parameter("readout.bias").detach().clone()
        average = weights if average is None else decay * average + (1 - decay) * weights
        torch.testing.assert_close(trainer.outer.weights()["readout.bias"], average)
    assert not torch.equal(trainer.outer.weights()["readout.bias"], weights)
    expected = MetaTrainer(RULE, FAMILY, replace(CONFIG))
    expected.rule.load_state_dict(trainer.outer.weights())
    assert trainer.validate() == expected.validate()


def test_averaging_does_not_change_what_is_trained() -> None:
    plain, _ = finished(CONFIG)
    averaged, _ = finished(replace(CONFIG, ema_decay=0.9))
    assert_same(dict(plain.rule.state_dict()), dict(averaged.rule.state_dict()))


def test_an_average_is_continued_bit_for_bit() -> None:
    config = replace(CONFIG, ema_decay=0.9)
    whole, _ = finished(config)
    first = MetaTrainer(RULE, FAMILY, config)
    list(zip(range(5), first.run()))
    second = MetaTrainer(RULE, FAMILY, config)
    second.load_state_dict(first.state_dict())
    list(second.run())
    assert_same(second.outer.weights(), whole.outer.weights())


def imitation(share: float, until: int | None = None) -> MetaTrainConfig:
    return replace(CONFIG, updates=40, imitation=Imitation(SGDTeacher(lr=0.01), share, until))


def test_a_share_of_the_episodes_imitates() -> None:
    trainer = MetaTrainer(RULE, FAMILY, imitation(0.3))
    kinds = [trainer.pool.start(serial, 0, 0).imitates for serial in range(300)]
    assert 0.2 < sum(kinds) / 300 < 0.4


def test_imitation_can_end() -> None:
    trainer = MetaTrainer(RULE, FAMILY, imitation(1.0, until=11))
    serials: dict[int, tuple[int, bool]] = {}
    for record in trainer.run():
        for slot in trainer.pool.slots.values():
            serials.setdefault(slot.serial, (record["update"], slot.imitates))
    assert all(imitates == (update < 11) for update, imitates in serials.values())
    assert {imitates for _, imitates in serials.values()} == {True, False}


def test_a_rule_learns_to_do_what_its_teacher_does() -> None:
    config = replace(imitation(1.0), updates=150, copies=16, horizon=(8, 8), unroll_length=4)
    trainer = MetaTrainer(replace(RULE, preprocessing="identity"), FAMILY, config)
    errors = [record["meta_loss"] for record in trainer.run()]
    assert errors[0] == pytest.approx(1.0, abs=0.01)  # it does nothing yet
    assert sum(errors[-10:]) / 10 < 0.3


STAGED = replace(CONFIG, updates=60, curriculum=Stages((2, 4, 8), patience=2))


def test_a_stage_ends_when_it_brings_no_more_and_hands_on_its_best_weights() -> None:
    trainer = MetaTrainer(RULE, FAMILY, STAGED)
    # 9.2 is what the second stage begins with, at its own length.
    scores = iter([3.0, 2.0, 2.5, 2.5] + [9.2] + [9.0, 9.5, 9.5] + [8.0, 7.0, 8.0, 8.0] + [0.0] * 20)
    trainer.validate = lambda: next(scores)  # type: ignore[method-assign]
    log, best = [], None
    for record in trainer.run():
        if "validation" not in record:
            continue
        log.append((record["stage"], record["validation"], record["best"]))
        if record["validation"] == 2.0:
            best = trainer.outer.weights()
        if len(log) == 4:
            assert best is not None
            assert_same(trainer.outer.weights(), best)
    assert [stage for stage, *_ in log] == [0] * 4 + [1] * 3 + [2] * 4
    assert log[-1] == (2, 8.0, 7.0)
    assert trainer.finished
    assert trainer.best_score == 7.0


def test_the_last_stage_has_to_do_better_than_the_one_before() -> None:
    trainer = MetaTrainer(RULE, FAMILY, STAGED)
    scores = iter([1.0, 2.0, 2.0, 5.5, 5.0, 6.0, 6.0, 7.0, 7.0])
    trainer.validate = lambda: next(scores)  # type: ignore[method-assign]
    for record in trainer.run():
        if record.get("validation") == 5.0:
            best = trainer.outer.weights()
    assert (trainer.stage, trainer.best_score) == (2, 5.0)
    assert_same(trainer.best_weights, best)


def test_a_stage_that_finds_nothing_better_keeps_what_it_began_with() -> None:
    trainer = MetaTrainer(RULE, FAMILY, STAGED)
    scores = iter([1.0, 2.0, 2.0, 4.0, 5.0, 6.0, 7.0, 7.0])
    trainer.validate = lambda: next(scores)  # type: ignore[method-assign]
    for record in trainer.run():
        if record.get("validation") == 1.0:
            best = trainer.outer.weights()
    assert (trainer.stage, trainer.best_score) == (2, 4.0)
    assert_same(trainer.best_weights, best)


def test_each_stage_has_its_length_and_is_validated_at_the_next() -> None:
    trainer = MetaTrainer(RULE, FAMILY, STAGED)
    lengths = []
    for stage in range(3):
        trainer.stage = stage
        lengths.append((trainer.pool.start(0, 0, stage).horizon, trainer.config.validation_horizon_at(stage)))
    assert lengths == [(2, 4), (4, 8), (8, 8)]


def test_a_stage_is_continued_bit_for_bit() -> None:
    whole, _ = finished(STAGED)
    assert whole.stage > 0
    trainer = MetaTrainer(RULE, FAMILY, STAGED)
    while not trainer.finished:
        list(trainer.run(time_limit=0.0))
        again = MetaTrainer(RULE, FAMILY, STAGED)
        again.load_state_dict(trainer.state_dict())
        trainer = again
    assert_same(trainer.outer.weights(), whole.outer.weights())
    assert trainer.best_score == whole.best_score


def test_the_end_of_training_does_not_open_another_stage() -> None:
    trainer = MetaTrainer(RULE, FAMILY, replace(STAGED, updates=9))
    scores = iter([1.0, 2.0, 3.0])
    trainer.validate = lambda: next(scores)  # type: ignore[method-assign]
    list(trainer.run())
    assert (trainer.stage, trainer.best_score) == (0, 1.0)


@pytest.mark.parametrize("estimator", [TruncatedBPTT(), TruncatedBPTT(recompute=True), FullBPTT(), ES()], ids=str)
def test_as_many_copies_as_fit(estimator: Any) -> None:
    rule, config = build_rule(LSTMConfig()), replace(CONFIG, estimator=estimator, copies="auto")
    few, many = (copies_that_fit(rule, SMALL_MLP, config, free=free) for free in (6_000_000, 12_000_000))
    assert 2 <= few < many < MOST
    assert abs(many - 2 * few) <= 1
    with pytest.raises(MemoryError, match=r"needs \d+ MiB per copy.*shorten unroll_length"):
        copies_that_fit(rule, SMALL_MLP, config, free=100_000)


def test_keeping_only_states_fits_more_copies() -> None:
    rule = build_rule(LSTMConfig())
    plain, recomputed = (
        copies_that_fit(
            rule,
            SMALL_MLP,
            replace(CONFIG, unroll_length=20, estimator=TruncatedBPTT(recompute=again)),
            free=200_000_000,
        )
        for again in (False, True)
    )
    assert recomputed > 1.5 * plain


def test_copies_found_once_stay_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, copies="auto")
    free = 100_000
    monkeypatch.setattr("learnedopt.meta.memory.free_memory", lambda device: free)
    trainer = MetaTrainer(RULE, FAMILY, config)
    assert trainer.copies > 2
    list(trainer.run(time_limit=0.0))
    free *= 10
    again = MetaTrainer(RULE, FAMILY, config)
    assert again.copies > trainer.copies
    again.load_state_dict(trainer.state_dict())
    assert again.copies == trainer.copies
    list(again.run(time_limit=0.0))


def test_the_free_memory_of_this_machine_is_told() -> None:
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


@pytest.mark.skipif(extension.why_unavailable() is not None, reason=str(extension.why_unavailable()))
@pytest.mark.parametrize("rule", [RULE, AdamLSTMConfig(hidden_size=3)], ids=lambda rule: rule.kind)
def test_the_native_backend_trains_alike(rule: RuleConfig) -> None:
    reference, _ = finished(replace(CONFIG, updates=3), rule)
    fast, _ = finished(replace(CONFIG, updates=3, backend="native"), rule)
    chosen, _ = finished(replace(CONFIG, updates=3, backend="auto"), rule)
    assert (reference.backend, fast.backend, chosen.backend) == ("reference", "native", "native")
    assert_same(chosen.outer.weights(), fast.outer.weights())
    for name, value in reference.outer.weights().items():
        torch.testing.assert_close(fast.outer.weights()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if estimator.perturbs_weights])
def test_what_perturbs_weights_is_run_by_the_reference_only(name: str) -> None:
    config = replace(CONFIG, estimator=ESTIMATORS[name]())  # type: ignore[arg-type]
    assert MetaTrainer(RULE, FAMILY, replace(config, backend="auto")).backend == "reference"
    for backend in ("native", "compiled"):
        with pytest.raises(ValueError, match=f"the {backend} backend cannot run the estimator '{name}'"):
            replace(config, backend=backend)


class WithoutLSTM(LSTMRule):
    def __init__(self) -> None:
        super().__init__(RULE)
        del self.lstm


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (WithoutLSTM(), "it computes LSTMs, and WithoutLSTM has none"),
        (LSTMRule(RULE).to("meta"), "it runs on the CPU, and the rule is on meta"),
    ],
    ids=["no LSTM", "elsewhere"],
)
def test_what_the_kernels_cannot_compute_is_not_called_native(rule: UpdateRule, reason: str) -> None:
    assert computed(rule, replace(CONFIG, backend="auto")) == (rule, "reference")
    with pytest.raises(ValueError, match=f"the native backend was asked for and cannot be had: {reason}"):
        computed(rule, replace(CONFIG, backend="native"))


def test_without_a_compiler_the_native_backend_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_unavailable", lambda: "no C++ compiler")
    assert MetaTrainer(RULE, FAMILY, replace(CONFIG, backend="auto")).backend == "reference"
    with pytest.raises(ValueError, match=r"cannot be had: no C\+\+ compiler"):
        MetaTrainer(RULE, FAMILY, replace(CONFIG, backend="native"))


def test_episodes_have_random_numbers_of_their_own() -> None:
    trainer = MetaTrainer(RULE, FAMILY, CONFIG)
    drawn = [trainer.pool.start(serial, 0, 0).generator.initial_seed() for serial in range(100)]
    assert len(set(drawn)) == 100
    assert [trainer.pool.start(serial, 0, 0).generator.initial_seed() for serial in range(100)] == drawn
    other = MetaTrainer(RULE, FAMILY, replace(CONFIG, seed=1))
    assert not set(drawn) & {other.pool.start(serial, 0, 0).generator.initial_seed() for serial in range(100)}


@pytest.mark.skipif(extension.why_unavailable() is not None, reason=f"no compiler: {extension.why_unavailable()}")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch's compiler itself
def test_the_compiled_backend_trains_alike() -> None:
    config = replace(CONFIG, updates=2, validate_every=2)
    reference, records = finished(config)
    trainer, compiled_records = finished(replace(config, backend="compiled"))
    assert trainer.backend == "compiled"
    for ours, theirs in zip(compiled_records, records):
        assert ours["meta_loss"] == pytest.approx(theirs["meta_loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert trainer.best_score == pytest.approx(reference.best_score, rel=1e-3)


def test_a_run_stops_where_it_is_told_to() -> None:
    trainer = MetaTrainer(RULE, FAMILY, CONFIG)
    assert len(list(trainer.run(stop=lambda: trainer.update >= 3))) == 4
