"""Rows of statistics have one set of names, and what they are called is what they are."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt.kernels import Tensors, get_backend, state_layout
from learnedopt.kernels.core import extension
from learnedopt.rules import Segments, UpdateRule, adam_lstm, build_rule, schedule_free

FOLDERS = ("adam_lstm", "meta_lstm", "rnnprop", "schedule_free")


def own_state(rule: UpdateRule, param: Tensor) -> dict[str, Tensor]:
    segments = Segments([param.numel()], shapes=[param.shape])
    return rule.init_state(segments, param=param.flatten())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_rule_has_as_many_rows_as_there_are_names(folder: str) -> None:
    row = importlib.import_module(f"learnedopt.rules.{folder}").Row
    rule, param = build_rule({"kind": folder}), torch.ones(3)
    statistics, _ = rule.statistics(param, param, own_state(rule, param), Segments([3]), torch.tensor(1.0))
    assert len(statistics) == len(row)


def test_rows_are_what_they_are_called() -> None:
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.randn(50, generator=generator) for _ in range(2))
    row: Any
    for kind, row in (("schedule_free", schedule_free.Row), ("adam_lstm", adam_lstm.Row)):
        rule = build_rule({"kind": kind})
        statistics, _ = rule.statistics(param, grad, own_state(rule, param), Segments([50]))
        log_rms = param.square().mean().log() / 6.0
        torch.testing.assert_close(statistics[row.LOG_PARAM, 0], log_rms)
        assert float(statistics[row.TIME, 0]) == 0.0
        torch.testing.assert_close(statistics[row.ALIGNMENT, 0], torch.ones(()))  # at first both are signs
        torch.testing.assert_close(statistics[row.CONSISTENCY, 0], torch.zeros(()), rtol=0.0, atol=1e-5)
    rule = build_rule({"kind": "schedule_free"})
    statistics, _ = rule.statistics(param, grad, own_state(rule, param), Segments([50]))
    assert float(statistics[schedule_free.Row.AVERAGING, 0]) == 1.0
    assert float(statistics[schedule_free.Row.BEGINNING, 0]) == 1.0
    assert float(statistics[schedule_free.Row.PER_OFFSET, 0]) == pytest.approx(1e12)
    assert float(statistics[schedule_free.Row.WAY, 0]) == 0.0


def test_cpp_has_the_names_of_python() -> None:
    source = extension._source()
    for folder in FOLDERS:
        row = importlib.import_module(f"learnedopt.rules.{folder}").Row
        part = source.split(f"namespace learnedopt::{folder} {{")[1].split("#include")[0]
        for name, value in row.__members__.items():
            assert f"{name} = {int(value)}" in part
        assert f"NUM_ROWS = {len(row)}" in part


def test_triton_has_the_names_of_python() -> None:
    pytest.importorskip("triton")
    constants = {
        "schedule_free": {"_AVERAGING": "AVERAGING", "_PER_OFFSET": "PER_OFFSET", "_FEATURES": "LOG_PARAM"},
        "adam_lstm": {"_FAST": "FAST_CORRECTION", "_SQUARE": "SQUARE_CORRECTION", "_FEATURES": "LOG_PARAM"},
    }
    for folder, names in constants.items():
        kernels = importlib.import_module(f"learnedopt.kernels.{folder}.triton")
        row = importlib.import_module(f"learnedopt.rules.{folder}").Row
        assert {name: getattr(kernels, name).value for name in names} == {
            name: int(row[of_python]) for name, of_python in names.items()
        }


# Gradients in other coordinates than the tensors' own --------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "blocked", "native"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_way_is_taken_in_the_tensors_own_coordinates(backend: str, maximize: bool, dtype: torch.dtype) -> None:
    if backend == "native" and (reason := extension.why_unavailable()):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rule = build_rule({"kind": "schedule_free"}).requires_grad_(False)
    shapes = [(20,), (3, 7), (100, 401), (5, 6)]
    params, grads, own_grads = ([draw(*shape).to(dtype) for shape in shapes] for _ in range(3))
    params[3], own_grads[1] = params[3].t().contiguous().t(), own_grads[1].t().contiguous().t()
    states, layout = [], state_layout(rule, torch.float32, "float32")
    for shape in shapes:
        state = {name: draw(*shape) if spec.scope == "coordinate" else torch.ones(()) for name, spec in layout.items()}
        states.append({**state, "square": state["square"].square()})
    counts = [math.prod(shape) for shape in shapes]
    tensors = Tensors(params, grads, states, torch.float32, "float32", counts, maximize=maximize, own_grads=own_grads)
    statistics, tensor_state = get_backend(backend).statistics(rule, tensors, None)
    sign = -1.0 if maximize else 1.0
    for index, (param, grad, own_grad, state) in enumerate(zip(params, grads, own_grads, states)):
        flat = {name: values.reshape(*layout[name].shape, -1) for name, values in state.items()}
        expected, expected_state = rule.statistics(
            param.float().flatten(),
            sign * grad.float().flatten(),
            flat,
            tensors.select([index]).segments,
            None,
            sign * own_grad.float().flatten(),
        )
        torch.testing.assert_close(statistics[:, index], expected[:, 0], rtol=1e-5, atol=1e-5)
        slope = 0.9995 + 0.0005 * (sign * own_grad.float() * (state["origin"] - param.float())).mean()
        torch.testing.assert_close(tensor_state["slope"][index], slope)
        for name, values in expected_state.items():
            torch.testing.assert_close(tensor_state[name][index], values[0])
