"""The tests that torch runs over its own optimizers, run over these.

The machinery (``OptimizerInfo``, ``@optims``, the inputs that must be refused) is torch's, private and in its wheel;
what torch tests with it is not in the wheel, and is written here anew under the same names. Everything in this file
is also tested without private parts elsewhere in this folder, so nothing is lost where it is skipped.
"""

# ruff: noqa: PT009 (torch's assertEqual compares tensors, and what holds tensors)

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from learnedopt import LearnedOptimizer, LSTMOptimizer, MetaLSTMOptimizer
from learnedopt.rules import MetaLSTMRule, UpdateRule
from learnedopt.rules.coordinates import AGE
from tests.optim.reference import descending_lstm

try:
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        get_error_inputs_for_all_optims,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase, set_default_dtype
except ImportError as error:
    pytest.skip(f"torch's private test machinery is not as expected: {error}", allow_module_level=True)

NOT_APPLICABLE = {
    "test_step_is_noop_for_zero_grads": "LSTMRule has a bias in its read-out and MetaLSTMRule a forget gate that "
    "decays, as published. Runs for the default rule; each rule says which in zero_gradient_is_noop.",
    "test_complex_2d": "compares a complex tensor with two real ones, its parts. Here it is one tensor of pairs, "
    "also to what asks about whole tensors: test_complex compares with that.",
    "test_load_nontensor_step": "for checkpoints of torch before 1.12, which kept the step as a number; none is older "
    "here, and a number in place of a tensor is refused with the parameter's name.",
    "test_rosenbrock_sparse": "sparse gradients are refused, as by Adam.",
    "test_foreach_*, test_peak_memory_foreach": "no flag foreach: tensors "
    "are always worked on together, and the result is compared with a plain loop (test_step.py).",
    "test_fused_*": "no flag fused: one implementation serves each device.",
    "test_capturable_*": "no flag capturable: the step is a tensor on the device of its parameter in any case.",
    "test_differentiable_*": "no flag differentiable: gradients go through the rule (UpdateRule.update), not through "
    "step.",
    "test_forloop_goes_right_direction_multigpu, test_mixed_device_dtype": "need two devices.",
}
"""Torch's tests that are not here, or not for every rule, and why."""

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    META_LSTM = MetaLSTMRule()  # fresh, it is gradient descent with a small step and little decay


def _input(options: dict[str, Any], desc: str = "") -> Any:
    return OptimizerInput(None, options, desc)  # type: ignore[arg-type]


class Info(OptimizerInfo):
    """Torch tells optimizers apart by class; here the rule is half of what is tested."""

    def __init__(self, name: str, optimizer: type[LearnedOptimizer], rule: UpdateRule | None) -> None:
        super().__init__(
            optimizer,  # type: ignore[arg-type]
            optim_inputs_func=self.inputs,
            optim_error_inputs_func=self.errors,
            supported_impls=(),
            not_og_supported_flags=("maximize", "nonfinite"),
            step_requires_closure=rule is META_LSTM,
        )
        self._name, self.optimizer = name, optimizer
        self.required: dict[str, Any] = {} if rule is None else {"rule": rule}

    @property
    def name(self) -> str:
        return self._name

    def build(self, params: Any, **options: Any) -> LearnedOptimizer:
        return self.optimizer(params, **{**self.required, **options})

    def inputs(self, device: Any = None, dtype: Any = None) -> list[Any]:
        options: list[dict[str, Any]] = [
            {},
            {"lr": 0.5},
            {"lr": torch.tensor(0.5)},
            {"weight_decay": 0.1},
            {"maximize": True},
            {"nonfinite": "skip"},
        ]
        return [_input({**self.required, **each}, ", ".join(each)) for each in options]

    def errors(self, device: Any, dtype: torch.dtype) -> list[Any]:
        refused: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
            ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
            ({"nonfinite": "hope"}, ValueError, "nonfinite must be one of"),
            ({"rule": 3}, TypeError, "rule must be a name in the zoo, a folder, or an UpdateRule object"),
            ({"foreach": True}, TypeError, "unexpected keyword argument 'foreach'"),
        ]
        return get_error_inputs_for_all_optims(device, dtype) + [
            ErrorOptimizerInput(_input(options), error_type=kind, error_regex=message)
            for options, kind, message in refused
        ]


INFOS = [
    Info("LearnedOptimizer_default", LearnedOptimizer, None),
    Info("LearnedOptimizer_lstm", LearnedOptimizer, descending_lstm()),
    Info("LSTMOptimizer", LSTMOptimizer, descending_lstm()),
    Info("MetaLSTMOptimizer", MetaLSTMOptimizer, META_LSTM),
]


class Problem:
    """Least squares with a matrix and a vector, and an optimizer for it."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype).to(device)

        self.weight = Parameter(draw(10, 5) if contiguous else draw(10, 5, 2)[..., 0])
        self.bias = Parameter(draw(10) if contiguous else draw(10, 2)[..., 0])
        self.input = draw(5)
        assert self.weight.is_contiguous() == contiguous

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    @property
    def named(self) -> list[tuple[str, Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        return (self.weight.mv(self.input) + self.bias).abs().square().sum()

    def value(self) -> float:
        return float(self.loss().detach())

    def step(self, optimizer: LearnedOptimizer) -> float:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return float(optimizer.step(closure).detach())

    def steps(self, optimizer: LearnedOptimizer, count: int) -> list[Tensor]:
        for _ in range(count):
            self.step(optimizer)
        return [param.detach().clone() for param in self.params]


def fill_grads(params: list[Parameter], value: float) -> None:
    for param in params:
        param.grad = torch.full_like(param, value)


class TestTorchSuite(TestCase):
    @optims(INFOS)
    def test_errors(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_error_inputs_func(device, dtype):
            tested = case.optimizer_error_input
            self.assertIs(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            params = Problem(device).params if tested.params is None else tested.params
            # Not unittest's assertWarns: it looks through all modules, and torch's compiler, once loaded, has one that
            # warns when it is looked at.
            refuses = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
            with refuses(case.error_type, match=case.error_regex):
                optim_info.build(params, **tested.kwargs)

    @optims(INFOS)
    def test_forloop_goes_right_direction(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            for contiguous in (True, False):
                problem = Problem(device, dtype, contiguous)
                optimizer = optim_info.build(problem.params, **case.kwargs)
                before = problem.value()
                problem.steps(optimizer, 10)
                better = self.assertGreater if case.kwargs.get("maximize") else self.assertLess
                better(problem.value(), before, case.desc)

    @optims(INFOS)
    def test_forloop_goes_right_direction_with_lrsched(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for schedule in optim_info.scheduler_inputs[0]:
            problem = Problem(device, dtype)
            self.descend(problem, optim_info.build(problem.params), schedule)

    @optims(INFOS)
    def test_param_group_with_lrscheduler_goes_right_direction(
        self, device: str, dtype: torch.dtype, optim_info: Info
    ) -> None:
        for schedule in optim_info.scheduler_inputs[0]:
            problem = Problem(device, dtype)
            groups = [{"params": problem.weight}, {"params": problem.bias, "lr": 0.5}]
            self.descend(problem, optim_info.build(groups), schedule)

    def descend(self, problem: Problem, optimizer: LearnedOptimizer, schedule: Callable[..., Any]) -> None:
        scheduler = schedule(optimizer)
        before = problem.value()
        for _ in range(10):
            loss = problem.step(optimizer)
            scheduler.step(*[loss] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
        self.assertLess(problem.value(), before)

    @optims(INFOS)
    def test_tensor_lr(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        results = []
        for lr in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, device=device)):
            problem = Problem(device, dtype)
            optimizer = optim_info.build(problem.params, lr=lr)
            results.append(problem.steps(optimizer, 3))
            self.assertEqual(optimizer.param_groups[0]["lr"], lr)
        for result in results[1:]:
            self.assertEqual(result, results[0], rtol=0, atol=0)

    @optims(INFOS, dtypes=[torch.complex64])
    def test_complex(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            pairs = [Parameter(torch.view_as_real(param.detach()).clone()) for param in problem.params]
            optimizer, real = (optim_info.build(params, **case.kwargs) for params in (problem.params, pairs))
            for _ in range(3):
                loss = problem.step(optimizer)
                for pair, param in zip(pairs, problem.params):
                    assert param.grad is not None
                    pair.grad = torch.view_as_real(param.grad)
                real.step(loss=loss)
            for pair, param in zip(pairs, problem.params):
                self.assertEqual(torch.view_as_real(param.detach()), pair.detach())
                for name, entry in optimizer.state[param].items():
                    self.assertEqual(entry, real.state[pair][name])

    @optims(INFOS)
    def test_param_groups_lr(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for lr in (0.0, 1e-28):
            problem = Problem(device, dtype)
            before = problem.bias.detach().clone()
            optimizer = optim_info.build([{"params": problem.weight}, {"params": problem.bias, "lr": lr}])
            loss = problem.value()
            problem.steps(optimizer, 5)
            self.assertLess(problem.value(), loss)
            self.assertEqual(problem.bias.detach(), before, rtol=0, atol=0)

    @optims(INFOS)
    def test_param_groups_weight_decay(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        decaying, plain = Problem(device, dtype), Problem(device, dtype)
        before = decaying.weight.detach().clone()
        optimizers = [
            optim_info.build([{"params": each.weight, "weight_decay": decay}, {"params": each.bias}], lr=0.5)
            for each, decay in ((decaying, 0.1), (plain, 0.0))
        ]
        for problem, optimizer in zip((decaying, plain), optimizers):
            fill_grads(problem.params, 0.0)
            optimizer.step(loss=1.0)
        self.assertEqual(decaying.weight.detach(), plain.weight.detach() - 0.05 * before)
        self.assertEqual(decaying.bias, plain.bias, rtol=0, atol=0)

    @optims(INFOS)
    def test_step_is_noop_when_params_have_no_grad(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            before = [param.detach().clone() for param in problem.params]
            optimizer = optim_info.build(problem.params, **case.kwargs)
            optimizer.step(lambda: torch.ones(1))
            self.assertEqual([param.detach() for param in problem.params], before, rtol=0, atol=0)
            self.assertEqual(len(optimizer.state), 0)

    @optims(INFOS)
    def test_step_is_noop_for_zero_grads(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        before = [param.detach().clone() for param in problem.params]
        optimizer = optim_info.build(problem.params)
        if optim_info.required and not optim_info.required["rule"].zero_gradient_is_noop:
            self.skipTest(NOT_APPLICABLE["test_step_is_noop_for_zero_grads"])
        for _ in range(5):
            fill_grads(problem.params, 0.0)
            optimizer.step()
        self.assertEqual([param.detach() for param in problem.params], before, rtol=0, atol=0)

    @optims(INFOS)
    def test_grads_are_never_inplaced_into(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            optimizer = optim_info.build(problem.params, **case.kwargs)
            for _ in range(2):
                fill_grads(problem.params, 0.5)
                versions = [param.grad._version for param in problem.params if param.grad is not None]
                optimizer.step(loss=1.0)
                after = [param.grad._version for param in problem.params if param.grad is not None]
                self.assertEqual(after, versions)

    @optims(INFOS)
    def test_optimizer_can_be_printed(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            optimizer = optim_info.build(problem.named, **case.kwargs)
            before = repr(optimizer)
            problem.step(optimizer)
            self.assertEqual(repr(optimizer), before)
            self.assertIn(f"rule: {optimizer.param_groups[0]['rule']}", before)

    @optims(INFOS)
    def test_state_dict_deterministic(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem, twin = Problem(device, dtype), Problem(device, dtype)
            optimizer = optim_info.build(problem.params, **case.kwargs)
            problem.steps(optimizer, 2)
            with torch.no_grad():
                for param, other in zip(problem.params, twin.params):
                    other.copy_(param)
            resumed = optim_info.build(twin.params, **case.kwargs)
            resumed.load_state_dict(optimizer.state_dict())
            self.assertEqual(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            self.assertEqual(twin.steps(resumed, 3), problem.steps(optimizer, 3), rtol=0, atol=0)
            self.assertEqual(resumed.state_dict(), optimizer.state_dict(), rtol=0, atol=0)

    @optims(INFOS)
    def test_can_load_older_state_dict(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer = optim_info.build(problem.params)
        problem.steps(optimizer, 2)
        older = copy.deepcopy(optimizer.state_dict())
        for flag in optim_info.not_og_supported_flags:
            del older["param_groups"][0][flag]
        optimizer.load_state_dict(older)
        problem.step(optimizer)

    @optims(INFOS)
    def test_can_load_from_to_named_state_dict(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for saved_named in (False, True):
            for loaded_named in (False, True):
                problem, twin = Problem(device, dtype), Problem(device, dtype)
                optimizer = optim_info.build(problem.named if saved_named else problem.params)
                problem.steps(optimizer, 2)
                loaded = optim_info.build(twin.named if loaded_named else twin.params)
                loaded.load_state_dict(optimizer.state_dict())
                names = ["weight", "bias"] if saved_named or loaded_named else None
                self.assertEqual(loaded.param_groups[0].get("param_names"), names)
                self.assertEqual(loaded.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)

    @optims(INFOS)
    def test_save_load_equality_with_weights_only(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            optimizer = optim_info.build(problem.named, **case.kwargs)
            problem.steps(optimizer, 2)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            self.assertEqual(torch.load(file, weights_only=True), optimizer.state_dict(), rtol=0, atol=0)

    @optims(INFOS)
    def test_state_dict_with_cuda_params(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        if torch.device(device).type == "cpu":
            self.skipTest("needs a second device beside the CPU")
        host, problem = Problem("cpu", dtype), Problem(device, dtype)
        optimizer = optim_info.build(host.params)
        host.steps(optimizer, 2)
        moved = optim_info.build(problem.params)
        moved.load_state_dict(optimizer.state_dict())
        for param in problem.params:
            self.assertEqual({entry.device for entry in moved.state[param].values()}, {param.device})
        with torch.no_grad():
            for param, other in zip(problem.params, host.params):
                param.copy_(other)
        self.assertEqual(problem.steps(moved, 2), host.steps(optimizer, 2), exact_device=False, rtol=1e-4, atol=1e-5)

    @optims(INFOS)
    def test_step_pre_hook(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer, frozen = optim_info.build(problem.params), problem.bias.detach().clone()

        def drop_bias(optimizer: Any, args: Any, kwargs: Any) -> None:
            problem.bias.grad = None

        handle = optimizer.register_step_pre_hook(drop_bias)
        fill_grads(problem.params, 1.0)
        optimizer.step(loss=1.0)
        self.assertEqual(problem.bias.detach(), frozen, rtol=0, atol=0)
        handle.remove()
        fill_grads(problem.params, 1.0)
        optimizer.step(loss=1.0)
        self.assertNotEqual(problem.bias.detach(), frozen)

    @optims(INFOS)
    def test_step_post_hook(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer = optim_info.build(problem.params)
        seen: list[float] = []
        handle = optimizer.register_step_post_hook(lambda *_: seen.append(problem.value()))
        problem.step(optimizer)
        self.assertEqual(seen, [problem.value()])
        handle.remove()
        problem.step(optimizer)
        self.assertEqual(len(seen), 1)

    @optims(INFOS)
    def test_step_all_hooks(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer = optim_info.build(problem.params)
        order: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: order.append("all before")),
            register_optimizer_step_post_hook(lambda *_: order.append("all after")),
            optimizer.register_step_pre_hook(lambda *_: order.append("before")),
            optimizer.register_step_post_hook(lambda *_: order.append("after")),
        ]
        try:
            problem.step(optimizer)
        finally:
            for handle in handles:
                handle.remove()
        self.assertEqual(order, ["all before", "before", "after", "all after"])

    @optims(INFOS)
    def test_state_dict_pre_post_hook(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        optimizer = optim_info.build(Problem(device, dtype).params)

        def tag(optimizer: Any) -> None:
            optimizer.param_groups[0]["tag"] = 1

        def untag(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {**state_dict, "tagged": state_dict["param_groups"][0].pop("tag")}

        optimizer.register_state_dict_pre_hook(tag)
        optimizer.register_state_dict_post_hook(untag)
        self.assertEqual(optimizer.state_dict()["tagged"], 1)

    @optims(INFOS)
    def test_load_state_dict_pre_post_hook(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer = optim_info.build(problem.params)
        problem.step(optimizer)
        order: list[str] = []

        def halve(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            order.append("halve")
            groups = [{**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        def look(optimizer: Any) -> None:
            order.append(f"{optimizer.param_groups[0]['lr']}, state of {len(optimizer.state)}")

        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.register_load_state_dict_pre_hook(lambda *_: order.append("first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(look)
        optimizer.register_load_state_dict_post_hook(lambda _: order.append("before looking"), prepend=True)
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(order, ["first", "halve", "before looking", "0.5, state of 2"])

    @optims(INFOS)
    def test_deepcopy_copies_all_public_attrs(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        for case in optim_info.optim_inputs_func(device, dtype):
            problem = Problem(device, dtype)
            optimizer = optim_info.build(problem.params, **case.kwargs)
            problem.step(optimizer)
            twin = copy.deepcopy(optimizer)

            def public(of: LearnedOptimizer) -> set[str]:
                return {name for name in of.__dict__ if not name.startswith("_")}

            self.assertEqual(public(twin), public(optimizer))
            self.assertEqual(twin.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
            self.assertEqual({key: twin.defaults[key] for key in optimizer.defaults}, optimizer.defaults)
            fill_grads(twin.param_groups[0]["params"], 1.0)
            twin.step(loss=1.0)

    @optims(INFOS)
    def test_non_empty_state(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        problem = Problem(device, dtype)
        optimizer = optim_info.build(problem.params)
        problem.step(optimizer)
        self.assertEqual(list(optimizer.state), problem.params)
        for entries in optimizer.state.values():
            self.assertTrue(any(bool(entry.any()) for entry in entries.values()))

    @optims(INFOS)
    def test_set_default_dtype_works(self, device: str, dtype: torch.dtype, optim_info: Info) -> None:
        results = []
        for default in (torch.float32, torch.float64):
            problem = Problem(device, dtype)
            with set_default_dtype(default):
                optimizer = optim_info.build(problem.params)
                results.append(problem.steps(optimizer, 2))
            kept = [entry.dtype for name, entry in optimizer.state[problem.weight].items() if name != AGE]
            self.assertEqual(set(kept), {torch.float32})
        self.assertEqual(results[0], results[1], rtol=0, atol=0)


instantiate_device_type_tests(TestTorchSuite, globals(), only_for=("cpu", "cuda"))
