"""A step in bases: when they follow, what is taken together, and what cannot be done in them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from learnedopt import LearnedOptimizer
from learnedopt.kernels import AGE, Tensors, bases
from learnedopt.rules import EigenbasisConfig, EigenbasisRule, LSTMRule
from tests.optim.reference import draw_grads, same_bits, snapshot, trained

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def make_rule() -> EigenbasisRule:
    return trained(EigenbasisRule(EigenbasisConfig(num_layers=0, settling=2, interval=3)), scale=0.1)


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


def test_weight_decay_reaches_rows_that_updates_do_not() -> None:
    param = torch.ones(3, 2, requires_grad=True)
    param.grad = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 0.5]])
    optimizer = LearnedOptimizer([param], make_rule(), lr=1e-2, weight_decay=1e-2)
    optimizer.step()
    assert (param[1] == 1.0 - 1e-4).all()


def test_a_first_step_that_is_skipped_on_the_device_leaves_bases_to_begin_with() -> None:
    """On the CPU the host knows and takes no step at all."""
    optimizer = run(0)
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    state = optimizer.state[param]
    for values in state.values():
        values.zero_()
    tensors = Tensors([param], [param.grad], [state], torch.float32, "float32", [30])
    bases._follow(make_rule(), param.grad, state, tensors, torch.tensor(True))
    assert not state["left_factor"].any()
    assert same_bits([state["left_basis"], state["right_basis"]], [torch.eye(6), torch.eye(5)])


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


def test_matrices_of_other_rules_are_refused() -> None:
    class Mine(LSTMRule):
        def matrices(self, shape: Sequence[int]) -> dict[str, tuple[int, int]]:
            return {"mine": (2, 2)} if len(shape) == 2 else {}

    param = torch.ones(2, 2, requires_grad=True)
    param.grad = torch.ones(2, 2)
    optimizer = LearnedOptimizer([param], Mine())
    with pytest.raises(TypeError, match="Mine has matrices of its own"):
        optimizer.step()
    assert (param == 1.0).all()
