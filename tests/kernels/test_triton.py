"""The Triton backend does what the reference does: under Triton's interpreter everywhere, and for real on a GPU.

Whether triton interprets is decided when it is imported, so the tests of the interpreter run this file as a program.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learnedopt import LearnedOptimizer
from learnedopt.kernels import Case, get_backend, state_layout
from learnedopt.kernels.core import registry, triton_backend
from learnedopt.kernels.core.state import CODES, FINE_CODES
from learnedopt.kernels.core.tables import triton_dtype
from learnedopt.rules import (
    AdamLSTMConfig,
    AdamLSTMRule,
    CoordinateLSTM,
    InEigenbases,
    InEigenbasesConfig,
    LSTMConfig,
    LSTMRule,
    MetaLSTMConfig,
    MetaLSTMRule,
    RNNpropConfig,
    RNNpropRule,
    ScheduleFreeConfig,
    ScheduleFreeRule,
    UpdateRule,
)
from tests.kernels.support import whole_codes

ROOT = Path(__file__).parents[2]
RULES: dict[str, Callable[[], UpdateRule]] = {
    "lstm": lambda: LSTMRule(),
    "lstm, identity": lambda: LSTMRule(LSTMConfig(hidden_size=3, num_layers=1, preprocessing="identity")),
    "meta-lstm": lambda: MetaLSTMRule(MetaLSTMConfig(hidden_size=6)),
    "meta-lstm, as in the code": lambda: MetaLSTMRule(
        MetaLSTMConfig(hidden_size=6, gate_feedback="preactivation", gradient_divisor=3.0)
    ),
    "adam-lstm": lambda: AdamLSTMRule(AdamLSTMConfig(hidden_size=8, eps=0.1)),
    "schedule-free": lambda: ScheduleFreeRule(ScheduleFreeConfig(CoordinateLSTM(), interpolation=0.7, eps=0.1)),
    "schedule-free, no layers": lambda: ScheduleFreeRule(ScheduleFreeConfig(interpolation=0.7, eps=0.1)),
    "rnnprop": lambda: RNNpropRule(RNNpropConfig(hidden_size=5, eps=0.1)),
    "rnnprop, one layer": lambda: RNNpropRule(RNNpropConfig(num_layers=1, momentum_decay=0.5, eps=0.1)),
}
WITH_UNITS = [name for name in RULES if name != "schedule-free, no layers"]
ALL: dict[str, Callable[[], UpdateRule]] = {
    **RULES,
    "eigenbasis": lambda: InEigenbases(
        InEigenbasesConfig(ScheduleFreeConfig(eps=0.1, square_decay=0.99), settling=2, interval=2)
    ),
}
SHAPES: tuple[tuple[int, ...], ...] = ((5, 3), (), (0, 2), (7,), (150,))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5}


def trained(rule: UpdateRule) -> UpdateRule:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return rule


def run(
    name: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    steps: int,
    lr: float | Tensor = 0.7,
    nonfinite: str = "propagate",
) -> LearnedOptimizer:
    """A short trajectory over tensors of several sizes, one of them transposed; a large gradient, and then a NaN."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]
    params.append(torch.randn(4, 6, generator=generator).to(device, dtype).t())
    optimizer = LearnedOptimizer(
        [param.requires_grad_() for param in params],
        trained(ALL[name]()),
        lr,
        0.1,
        maximize=True,
        nonfinite=nonfinite,  # type: ignore[arg-type]
        state_dtype=state_dtype,
        backend=backend,  # type: ignore[arg-type]
    )
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
        if step == 0 and dtype == torch.float32:
            params[3].grad[1] = 1e30  # type: ignore[index]
        if step == 1:
            params[0].grad[0, 0] = torch.nan  # type: ignore[index]
        optimizer.step(loss=1.0 / (step + 1))
    return optimizer


def compare(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    steps: int,
    lr: float | Tensor = 0.7,
    nonfinite: str = "skip",
) -> None:
    expected, actual = (
        run(name, backend, device, dtype, state_dtype, steps, lr, nonfinite) for backend in ("reference", "triton")
    )
    assert actual.backend == "triton"
    kept = str(state_dtype).removeprefix("torch.")
    layout = state_layout(ALL[name](), torch.float32, kept)  # type: ignore[arg-type]
    pairs = zip(*(optimizer.param_groups[0]["params"] for optimizer in (actual, expected)), strict=True)
    for one, two in pairs:
        # Where what is kept is rounded the other way, later steps see it.
        tolerance = TOLERANCE[dtype] + (0.0 if state_dtype == torch.float32 else 2e-2)
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)
        for entry, spec in layout.items():
            left, right = actual.state[one][entry], expected.state[two][entry]
            assert left.dtype == right.dtype == spec.dtype
            if spec.dtype == torch.int8:
                # Of what the codes stand for: near zero a small difference is several codes.
                most = FINE_CODES if f"{entry}_low" in layout else CODES
                codes = (whole_codes(state, entry) for state in (actual.state[one], expected.state[two]))
                left, right = (values * values.abs() / most**2 for values in codes)
                torch.testing.assert_close(left, right, rtol=0.0, atol=4e-2)
            elif spec.dtype != torch.uint8:  # of which codes are a part
                slack = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[spec.dtype]
                if state_dtype != torch.float32:
                    slack = 2e-2
                torch.testing.assert_close(left, right, rtol=slack, atol=slack, equal_nan=True)


def compare_codes(name: str, device: torch.device) -> None:
    """A step from state in few bits: every code is that of the reference, or the one beside it."""
    expected = run(name, "reference", device, torch.float32, torch.int8, 3, nonfinite="skip")
    params = [param.detach().clone().requires_grad_() for param in expected.param_groups[0]["params"]]
    actual = LearnedOptimizer(params, trained(RULES[name]()), state_dtype=torch.int8, backend="triton")
    actual.load_state_dict(expected.state_dict())
    assert actual.backend == "triton"
    for optimizer in (expected, actual):
        generator = torch.Generator().manual_seed(2)
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step(loss=1.0)
    for one, two in zip(params, expected.param_groups[0]["params"]):
        for entry, most in (("h", CODES), ("c", FINE_CODES)):
            left, right = actual.state[one], expected.state[two]
            # The interpreter rounds scales down. Codes are relative to their own, and only the largest goes beyond.
            factor = (left[f"{entry}_scale"].float() / right[f"{entry}_scale"].float()).sqrt().unsqueeze(1)
            code = whole_codes(right, entry)
            limit = torch.where(code.abs() < most - 3, 1.05, 2.1)
            assert bool(((whole_codes(left, entry) * factor - code).abs() <= limit).all())


def main() -> None:
    """Everything that the interpreter can show; it is slow, and small chunks have as many edges as large ones."""
    triton_backend.CHUNK = 128
    cpu = torch.device("cpu")
    for name in ALL:
        compare(name, cpu, torch.float32, torch.float32, steps=3)
    for name, dtype, state_dtype in (
        ("lstm", torch.bfloat16, torch.bfloat16),
        ("meta-lstm", torch.float16, torch.int8),
        ("adam-lstm", torch.bfloat16, torch.int8),
        ("schedule-free", torch.float16, torch.int8),
        ("schedule-free, no layers", torch.bfloat16, torch.bfloat16),
        ("rnnprop", torch.bfloat16, torch.int8),
    ):
        compare(name, cpu, dtype, state_dtype, steps=2)
    for name in ("lstm", "lstm, identity", "adam-lstm"):
        compare_codes(name, cpu)
    compare("lstm, identity", cpu, torch.float32, torch.float32, steps=3, nonfinite="propagate")
    compare("adam-lstm", cpu, torch.float32, torch.int8, steps=3, nonfinite="propagate")
    compare("meta-lstm", cpu, torch.float32, torch.float32, steps=2, lr=0.0)


def test_under_the_interpreter_it_is_the_reference() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", RULES)
def test_it_compiles_for_a_gpu_that_is_not_there(name: str) -> None:
    """The interpreter takes much that the compiler does not."""
    triton = pytest.importorskip("triton")
    compiler, backends = map(importlib.import_module, ("triton.compiler", "triton.backends.compiler"))
    program: triton_backend.Program = registry.program("triton", RULES[name]())
    kernel, float32 = program.step_kernel, triton_dtype(torch.float32)
    constants = {
        **{key: value for key, value in program.arguments.items() if key.isupper()},
        **dict.fromkeys(("MAXIMIZE", "LR_IN_MEMORY", "SKIP"), True),
        **dict.fromkeys(("PARAM", "GRAD"), float32),
        "STATE": triton_dtype(torch.int8),
        "CHUNK": triton_backend.CHUNK,
        "BLOCK": program.block,
    }
    of_tensors = {key: value.dtype for key, value in program.arguments.items() if isinstance(value, Tensor)}
    types = {
        **dict.fromkeys(kernel.arg_names, "fp32"),
        **{key: "*fp16" if dtype == torch.float16 else "*fp32" for key, dtype in of_tensors.items()},
        **dict.fromkeys(("statistics", "lr_at"), "*fp32"),
        **{"tensors": "*i64", "chunks": "*i64", "skip_at": "*u8", "num_tensors": "i32"},
        **dict.fromkeys(constants, "constexpr"),
    }
    source = compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    options = {"num_warps": program.warps, "num_stages": 1, "enable_fp_fusion": True}
    assert "ptx" in triton.compile(source, target=backends.GPUTarget("cuda", 90, 32), options=options).asm


def test_it_says_what_it_cannot_serve() -> None:
    backend, cuda = get_backend("triton"), torch.device("cuda")
    pytest.importorskip("triton")
    assert backend.refusal(Case(LSTMRule(), cuda, torch.float32, "int8")) is None
    assert "cpu" in str(backend.refusal(Case(LSTMRule(), torch.device("cpu"), torch.float32, "int8")))
    assert "float64" in str(backend.refusal(Case(LSTMRule(), cuda, torch.float64, "float32")))
    large = LSTMRule(LSTMConfig(hidden_size=65))
    assert "65" in str(backend.refusal(Case(large, cuda, torch.float32, "float32")))
    bare = ScheduleFreeRule()
    assert backend.refusal(Case(bare, cuda, torch.float32, "float32")) is None


# On a GPU ----------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@on_a_gpu
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_on_cuda_it_is_the_reference(name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    cuda = torch.device("cuda")
    compare(name, cuda, dtype, state_dtype, 50 if state_dtype == torch.float32 else 3, torch.tensor(0.7, device=cuda))


@on_a_gpu
@pytest.mark.parametrize("name", WITH_UNITS)
def test_on_cuda_every_bit_of_the_state_is_the_references(name: str) -> None:
    compare_codes(name, torch.device("cuda"))


@on_a_gpu
@pytest.mark.parametrize("name", ["lstm", "adam-lstm", "schedule-free", "schedule-free, no layers", "rnnprop"])
def test_a_step_is_one_launch_and_waits_for_nothing(name: str) -> None:
    cuda = torch.device("cuda")
    optimizer = run(name, "triton", cuda, torch.float32, torch.float32, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step(loss=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("step_kernel" in event.name for event in profile.events()) == 1


@on_a_gpu
@pytest.mark.parametrize("name", ["lstm", "adam-lstm", "schedule-free", "schedule-free, no layers", "rnnprop"])
def test_a_captured_step_replays(name: str) -> None:
    cuda = torch.device("cuda")
    expected, captured = (
        run(name, "triton", cuda, torch.float32, torch.float32, 3, torch.tensor(0.7, device=cuda)) for _ in range(2)
    )
    graph = torch.cuda.CUDAGraph()
    before = [param.detach().clone() for param in captured.param_groups[0]["params"]]
    with torch.cuda.graph(graph):
        captured.step()
    for param, value in zip(captured.param_groups[0]["params"], before):
        torch.testing.assert_close(param, value, equal_nan=True)  # captured, not run
    for _ in range(3):
        graph.replay()
        expected.step()
    for one, two in zip(*(optimizer.param_groups[0]["params"] for optimizer in (captured, expected)), strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)


@on_a_gpu
def test_it_runs_on_the_stream_that_is_current() -> None:
    cuda = torch.device("cuda")
    param = torch.zeros(100_000, device=cuda, requires_grad=True)
    param.grad = torch.zeros_like(param)
    optimizer = LearnedOptimizer([param], trained(LSTMRule()), backend="triton")
    optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        param.grad.fill_(1.0)
        optimizer.step()
        after = param.detach().clone()
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(param, after)


if __name__ == "__main__":
    main()
