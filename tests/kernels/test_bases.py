"""A step in bases: when they follow, what is taken together, and what cannot be done in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.step_cost import extra_memory
from learnedopt import LearnedOptimizer
from learnedopt.kernels import StepOptions, Tensors, get_backend, step
from learnedopt.kernels.bases import step as bases
from learnedopt.rules import InEigenbases, ScheduleFreeConfig, ScheduleFreeRule, Segments, State
from learnedopt.rules.coordinates import AGE, GradientSize
from learnedopt.rules.eigenbasis import Eigenbases
from tests.optim.reference import draw_grads, in_bases, same_bits, snapshot, trained

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def make_rule() -> InEigenbases:
    return trained(in_bases(settling=2, interval=3), scale=0.1)


def run(steps: int, device: str = "cpu") -> LearnedOptimizer:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (4,), (3, 2, 2), (7, 7)]
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    optimizer = LearnedOptimizer(params, make_rule(), backend="reference")
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return optimizer


def test_bases_follow_in_the_first_steps_and_now_and_then_later() -> None:
    optimizer = run(1)
    params = optimizer.param_groups[0]["params"]
    generator, changed = torch.Generator().manual_seed(1), []
    for _ in range(8):
        before: list[Tensor] = [optimizer.state[params[0]][f"{side}_basis"].clone() for side in ("left", "right")]
        draw_grads(generator, params)
        optimizer.step()
        after: list[Tensor] = [optimizer.state[params[0]][f"{side}_basis"] for side in ("left", "right")]
        changed.append(not same_bits(before, after))
        for basis in after:
            torch.testing.assert_close(basis.mT @ basis, torch.eye(len(basis)), rtol=1e-5, atol=1e-5)
    assert changed == [step <= 2 or step % 3 == 0 for step in range(2, 10)]
    assert int(optimizer.state[params[0]][AGE]) == 9
    assert AGE not in optimizer.state[params[1]]


def test_how_many_tensors_are_taken_together_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = snapshot(run(5))
    monkeypatch.setattr(bases, "AT_ONCE", 1)
    for one, other in zip(snapshot(run(5)), together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8])
def test_a_tensor_in_strips_moves_as_it_does_whole(
    backend: Any, layers: int, state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and columns too long for a basis, matrices in other orders in memory, a gradient that is too large."""
    rule = trained(in_bases(layers, settling=2, interval=2, max_side=6), scale=0.1)

    def run() -> tuple[LearnedOptimizer, int]:
        generator, taken = torch.Generator().manual_seed(0), 0

        def counted(*args: Any) -> None:
            nonlocal taken
            taken += 1
            in_strips(*args)

        in_strips = bases._step_in_strips
        params = [torch.randn(shape, generator=generator) for shape in ((20, 5), (6, 30), (4, 2, 3, 2), (5, 4))]
        params.append(torch.randn(3, 14, generator=generator).t())
        params.append(torch.randn(4, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last))
        optimizer = LearnedOptimizer(
            [param.requires_grad_() for param in params],
            rule,
            weight_decay=0.1,
            maximize=True,
            backend=backend,
            state_dtype=state_dtype,
        )
        with monkeypatch.context() as patch:
            patch.setattr(bases, "_step_in_strips", counted)
            for _ in range(5):
                draw_grads(generator, params)
                params[0].grad[3] = 0.0  # type: ignore[index]
                params[1].grad[2, 7] = 1e30  # type: ignore[index]
                optimizer.step()
        return optimizer, taken

    whole, none = run()
    monkeypatch.setattr(bases, "AT_ONCE", 25)
    monkeypatch.setattr(bases, "STRIP", 17)
    cut, some = run()
    assert (none, some) == (0, 5 * 5)
    # Codes of eight bits may be rounded the other way.
    tolerance = 1e-5 if state_dtype == torch.float32 or not layers else 1e-2
    for one, other in zip(cut.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        for name, values in whole.state[other].items():
            if values.is_floating_point():
                torch.testing.assert_close(cut.state[one][name], values, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "count"), [((20000, 16), 1), ((16, 20000), 1), ((170, 72), 1), ((14, 14), 200), ((4, 14), 500)]
)
def test_what_a_step_needs_does_not_grow_with_the_model(
    shape: tuple[int, int], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than 64 MiB with the settings as they are, and so a 256th of that with a 256th of them."""
    for name in ("AT_ONCE", "STRIP", "STACKED"):
        monkeypatch.setattr(bases, name, getattr(bases, name) // 256)
    rule = trained(in_bases(max_side=80), scale=0.1)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(count)]
    draw_grads(generator, params)
    optimizer = LearnedOptimizer(params, rule, backend="blocked")
    optimizer.step()
    draw_grads(generator, params)
    assert extra_memory(optimizer.step, torch.device("cpu")) < 64 * 2**20 // 256


def test_a_tensor_in_strips_refuses_statistics_that_add_up_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(ScheduleFreeRule):
        def statistics(
            self,
            param: Tensor,
            grad: Tensor,
            state: State,
            segments: Segments,
            loss: Tensor | None = None,
            own_grad: Tensor | None = None,
        ) -> tuple[Tensor, State]:
            segments.mean(param)
            return super().statistics(param, grad, state, segments, loss, own_grad)

    monkeypatch.setattr(bases, "AT_ONCE", 25)
    rule = in_bases(max_side=6)
    rule.inner = Twice(cast(ScheduleFreeConfig, rule.inner.config))
    param = torch.ones(20, 5, requires_grad=True)
    param.grad = torch.ones(20, 5)
    with pytest.raises(NotImplementedError, match="Twice add up twice"):
        LearnedOptimizer([param], rule).step()
    assert (param == 1.0).all()


def test_weight_decay_reaches_rows_that_updates_do_not() -> None:
    param = torch.ones(3, 2, requires_grad=True)
    param.grad = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 0.5]])
    optimizer = LearnedOptimizer([param], make_rule(), lr=1e-2, weight_decay=1e-2)
    optimizer.step()
    assert (param[1] == 1.0 - 1e-4).all()


@pytest.mark.parametrize("age", [0, 4])
def test_a_step_that_is_skipped_on_the_device_changes_nothing_but_the_age(age: int) -> None:
    """On the CPU the host knows and takes no step at all."""
    optimizer = run(age)
    param = optimizer.param_groups[0]["params"][0]
    if age == 0:
        param.grad = torch.zeros(6, 5)
        optimizer.step()
    state = optimizer.state[param]
    states = [state, {name: values.clone() for name, values in state.items()}] if age else [state]
    before = {name: values.clone() for name, values in state.items()}
    grads = [torch.ones(6, 5)] * len(states)
    tensors = Tensors([param] * len(states), grads, states, torch.float32, "float32", [30] * len(states))
    stack = torch.stack(grads) if age else grads[0]
    size = GradientSize.of([stack])
    bases._follow(make_rule(), [stack], size, tensors, torch.tensor(True))
    for name in state:
        for found in states:
            assert same_bits([found[name]], [before[name] + (name == AGE and age > 0)]), name
    assert same_bits([state["left_basis"]], [torch.eye(6)]) == (age == 0)


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize(("layers", "state_dtype"), [(0, torch.float32), (1, torch.float32), (1, torch.int8)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_stack_moves_as_its_tensors_do_alone(
    backend: Any, layers: int, state_dtype: torch.dtype, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of one shape as matrices, one of which begins later; with a basis for one side; others beside them."""
    rule = trained(in_bases(layers, settling=2, interval=2, max_side=8), scale=0.1)
    shapes = [(6, 4), (5,), (6, 2, 2), (6, 4), (4, 9), (3, 3), (6, 4), (4, 9), ()]

    def run() -> tuple[LearnedOptimizer, list[int]]:
        generator, taken = torch.Generator().manual_seed(0), []

        def counted(*args: Any) -> State:
            taken.append(len(args[3].states))
            return follow(*args)

        follow = bases._follow
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        params[3] = params[3].t().contiguous().t()
        params[6] = params[6].bfloat16()
        optimizer = LearnedOptimizer(
            [param.requires_grad_() for param in params],
            rule,
            lr=0.1,
            weight_decay=weight_decay,
            backend=backend,
            state_dtype=state_dtype,
        )
        with monkeypatch.context() as patch:
            patch.setattr(bases, "_follow", counted)
            for step in range(5):
                draw_grads(generator, params)
                params[0].grad = cast(Tensor, params[0].grad) * (step > 1)
                optimizer.step()
        return optimizer, taken

    stacked, taken = run()
    # Each alone in its first step; then (6, 4) two together, the late one and that of another dtype alone, and (4, 9)
    # two together.
    assert taken[:7] == [1] * 7
    assert sorted(taken[7:12]) == [1, 1, 1, 2, 2]
    monkeypatch.setattr(bases, "STACKED", 0)
    alone, taken = run()
    assert taken == [1] * 7 * 5
    for one, other in zip(stacked.param_groups[0]["params"], alone.param_groups[0]["params"], strict=True):
        # What has eight bits may be rounded the other way, and an LSTM makes more of what is.
        tolerance = 1e-2 if state_dtype == torch.int8 or other.dtype == torch.bfloat16 else 1e-4 if layers else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
        for name, values in alone.state[other].items():
            if values.is_floating_point():
                torch.testing.assert_close(stacked.state[one][name], values, rtol=tolerance, atol=tolerance)


def test_the_rate_and_what_is_skipped_may_be_on_the_device() -> None:
    """Nothing of this is asked on the host; on the CPU the host would know."""
    for lr, skip, moved in ((1.0, False, True), (1.0, True, False), (0.0, False, False)):
        params = [torch.ones(2, 3), torch.ones(2, 3)]
        inside = bases._Inside({}, params, torch.ones(2, 2, 3), None, torch.full((2, 2, 3), 2.0))
        inside.leave(make_rule(), StepOptions(lr=torch.tensor(lr), skip=torch.tensor(skip)))
        assert all((param == (3.0 if moved else 1.0)).all() for param in params)


def test_weight_decay_where_nothing_has_bases() -> None:
    rule = make_rule()
    state = {name: torch.zeros(3 if spec.scope == "coordinate" else ()) for name, spec in rule.state_spec().items()}
    tensors = Tensors([torch.ones(3)], [torch.zeros(3)], [state], torch.float32, "float32", [3])
    step(get_backend("reference"), rule, tensors, StepOptions(lr=0.5, weight_decay=0.5))
    assert (tensors.params[0] == 0.75).all()


def test_copies_of_matrices_count_as_what_is_taken_together() -> None:
    """A stack holds them too; of a thin matrix they are far larger than it, and so it is not stacked."""
    rule = in_bases()
    copied = {(8, 8): 4 * 64, (8, 600): 2 * 64, (256, 256): 4 * 65536, (300, 2): 0, (300, 300): 0}
    state = {AGE: torch.ones(())}
    assert {shape: bases._copied(rule, torch.empty(shape), state) for shape in copied} == copied
    assert bases._copied(rule, torch.empty(7), {}) == 0


@pytest.mark.parametrize("zeros", [1, 5])
def test_bases_wait_for_a_first_gradient(zeros: int) -> None:
    """Some layers have none at first: a factor beside one of zeros, an expert that is switched on later."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(6, 5, generator=generator)
    gradients = [torch.outer(torch.ones(6), torch.arange(5.0)) + 0.1 * i * torch.eye(6, 5) for i in range(4)]
    found = []
    for waiting in (0, zeros):
        param = start.clone().requires_grad_()
        optimizer = LearnedOptimizer([param], make_rule())
        for gradient in [torch.zeros(6, 5)] * waiting + gradients:
            param.grad = gradient
            optimizer.step()
            if not gradient.any():
                assert torch.equal(param, start)
        found.append([optimizer.state[param][name] for name in ("left_basis", "right_basis", "left_factor", AGE)])
    assert same_bits(*found)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_large_gradients_are_gradients_and_infinite_ones_leave_the_state_finite(backend: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    gradients = [torch.rand(40, 40, generator=generator) - 0.5 for _ in range(6)]
    moved = []
    for scale in (1.0, 2e18, math.inf):  # the square of the second norm is out of range
        param = torch.ones(40, 40, requires_grad=True)
        optimizer = LearnedOptimizer([param], make_rule(), backend=backend)
        for gradient in gradients:
            param.grad = gradient.sign() * torch.inf if scale == math.inf else gradient * scale
            optimizer.step()
        moved.append(param.detach())
        assert all(values.isfinite().all() for values in [param, *optimizer.state[param].values()])
    # Not the same: of such gradients the way is taken as if they were smaller.
    assert (moved[1] - moved[0]).norm() < 0.2 * (moved[0] - 1.0).norm()
    assert not torch.equal(moved[2], torch.ones(40, 40))


def test_products_are_precise_whatever_the_user_has_chosen_for_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, backends = [], cast(Any, torch.backends)

    def enter(self: Eigenbases, x: Tensor, own: State) -> Tensor:
        seen.append(backends.mkldnn.matmul.fp32_precision)
        return original(self, x, own)

    original = Eigenbases.enter
    monkeypatch.setattr(Eigenbases, "enter", enter)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        run(2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"ieee"}


@needs_cuda
def test_on_a_gpu_it_does_what_it_does_on_the_cpu() -> None:
    for one, other in zip(snapshot(run(8, "cuda")), snapshot(run(8)), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@needs_cuda
def test_it_cannot_be_captured_and_says_so() -> None:
    optimizer = run(3, "cuda")
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="cannot be part of a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert same_bits(snapshot(optimizer), before)


def test_coordinates_of_ones_own_are_followed_by_the_same_steps() -> None:
    """Whatever serves as coordinates: here the rows of a matrix in reverse, which change nothing."""

    class Reversed(Eigenbases):
        def serve(self, shape: Sequence[int]) -> bool:
            return len(shape) == 2

        def initial(self, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | None) -> State:
            return {AGE: torch.zeros((), dtype=torch.int64)} if self.serve(shape) else {}

        def cut(self, shape: Sequence[int]) -> int | None:
            return -1

        def enter(self, x: Tensor, own: State) -> Tensor:
            return x.flip(-2)

        def leave(self, x: Tensor, own: State) -> Tensor:
            return x.flip(-2)

    class Mine(InEigenbases):
        def __init__(self) -> None:
            super().__init__()
            self.coordinates = Reversed(self.config, self.inner.state_spec())

    moved, rule = [], trained(Mine(), scale=0.1)
    for its in (rule, rule.inner):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(4, 3, generator=generator).requires_grad_(), torch.ones(3, requires_grad=True)]
        optimizer = LearnedOptimizer(params, its, backend="reference")
        for _ in range(5):
            draw_grads(generator, params)
            optimizer.step()
        moved.append(params)
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
