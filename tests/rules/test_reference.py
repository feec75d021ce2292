"""Every rule agrees with its naive reference, called whole or in blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from learnedopt.rules import RULES, Segments
from tests.rules.reference import REFERENCES
from tests.rules.support import KINDS, VARIANTS, random_rule, random_values, run

STEPS = 6
LAYOUTS = [((1,), 1), ((3, 1), 1), ((2, 4), 2), ((1, 2, 3), 3)]
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
SLACK = {"schedule_free": 3.0, "in_eigenbases": 3.0, "laws": 3.0, "chain": 3.0}
"""With weights as large as the ones drawn here, features of 30 enter an exponential that multiplies their errors."""


def reference_run(rule: Any, segments: Segments, params: Tensor, grads: Tensor, losses: Tensor) -> Tensor:
    """What :func:`run` gives, from the reference; losses ``(T, copies)``."""
    references = [REFERENCES[rule.config.kind](rule, segments.sizes) for _ in range(segments.copies)]
    deltas = []
    for param, grad, loss in zip(params, grads, losses):
        row: list[float] = []
        per_copy = (param.view(segments.copies, -1), grad.view(segments.copies, -1))
        for reference, p, g, value in zip(references, *per_copy, loss):
            tensors, slopes = ([part.tolist() for part in x.split(segments.sizes)] for x in (p, g))
            for change in reference.step(tensors, slopes, value.item()):
                row.extend(change)
        deltas.append(row)
    return torch.tensor(deltas, dtype=torch.float64)


def assert_agree(actual: Tensor, expected: Tensor, params: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    # An update is judged by the size of what it is added to or of the largest update, as its parts may cancel.
    scale = torch.maximum(expected.abs().max(), params.double().abs())
    error = (actual.double() - expected).abs()
    assert (error <= slack * TOLERANCES[dtype] * scale).all(), f"largest error {(error / scale).max():.2e} of its scale"


def test_every_registered_rule_has_a_reference() -> None:
    assert sorted(REFERENCES) == sorted(RULES)


@pytest.mark.parametrize(("sizes", "copies"), LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("config", VARIANTS)
def test_update_agrees_with_the_reference(
    config: dict[str, Any], dtype: torch.dtype, sizes: tuple[int, ...], copies: int
) -> None:
    rule, segments = random_rule(config, dtype), Segments(sizes, copies)
    params = random_values((STEPS, segments.num_coordinates), 10, dtype)
    grads = random_values((STEPS, segments.num_coordinates), 20, dtype)
    grads[2] = 0.0
    losses = random_values((STEPS, copies), 30, dtype)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads, losses)
    assert deltas.dtype == dtype
    expected = reference_run(rule, segments, params, grads, losses)
    assert_agree(deltas, expected, params, dtype, SLACK.get(config["kind"], 1.0))


def test_adam_lstm_agrees_with_the_reference_over_many_steps() -> None:
    rule, segments = random_rule({"kind": "adam_lstm", "hidden_size": 3, "max_time": 100.0}), Segments([2])
    params, grads = random_values((300, 2), 10), random_values((300, 2), 20)
    losses = torch.ones(300, 1, dtype=torch.float64)
    with torch.no_grad():
        deltas, _ = run(rule, segments, params, grads)
    assert_agree(deltas, reference_run(rule, segments, params, grads, losses), params, torch.float64)


# A chain calls forward with what its first rule has made of gradients.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chain"])
def test_forward_on_blocks_gives_what_the_whole_gives(kind: str) -> None:
    rule, segments = random_rule(kind), Segments([5, 4], copies=2)
    n, spec = segments.num_coordinates, rule.state_spec()
    params, grads = random_values((3, n), 10), random_values((3, n), 20)
    loss = torch.tensor([0.3, 4.0], dtype=torch.float64)
    # Blocks that do not respect the tensors' borders, at (K, n) statistics; and the tensors, at (K, 1).
    cuts = [slice(0, 1), slice(1, 8), slice(8, n)]
    tensors = [slice(0, 5), slice(5, 9), slice(9, 14), slice(14, 18)]
    state = rule.init_state(segments, dtype=torch.float64, param=params[0])
    with torch.no_grad():
        for param, grad in zip(params, grads):
            whole, new_state = rule.update(param, grad, state, segments, loss)
            statistics, _ = rule.statistics(param, grad, state, segments, loss)
            expanded = segments.expand(statistics)
            for blocks, seen in (
                (cuts, [expanded[:, block] for block in cuts]),
                (tensors, list(statistics.split(1, dim=1))),
            ):
                parts = []
                for block, block_statistics in zip(blocks, seen):
                    memory = {key: x[..., block] for key, x in state.items() if spec[key].scope == "coordinate"}
                    parts.append(rule(param[block], grad[block], memory, block_statistics))
                torch.testing.assert_close(torch.cat([delta for delta, _ in parts]), whole, rtol=1e-12, atol=1e-14)
                for key in parts[0][1]:
                    joined = torch.cat([memory[key] for _, memory in parts], dim=-1)
                    torch.testing.assert_close(joined, new_state[key], rtol=1e-12, atol=1e-14)
            state = new_state
