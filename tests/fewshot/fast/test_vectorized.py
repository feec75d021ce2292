"""A network runs on many episodes at once as it does on one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from learnedopt.fewshot.fast.vectorized import apply
from learnedopt.fewshot.network import Network, tied_names
from learnedopt.fewshot.normalization import Statistics, episodic, statistics
from tests.fewshot.support import generator, images


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


TWICE, TIED, ACTIVATION = nn.Linear(12, 12), nn.Linear(12, 12), nn.Tanh()
TIED.weight = TWICE.weight


@pytest.mark.parametrize("shared", [(), ("bias",), ("weight",)])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)],
        [nn.Linear(4, 5), nn.Sequential(nn.Softplus(), nn.Identity(), nn.Linear(5, 2)), nn.Flatten()],
        [nn.Flatten(), Doubled(12, 4)],
        [nn.Flatten(), TWICE, ACTIVATION, TWICE, ACTIVATION],
        [nn.Flatten(), TWICE, ACTIVATION, TIED, ACTIVATION, TWICE],
        [nn.Flatten(), Doubled(12, 12), TWICE, ACTIVATION, TIED, ACTIVATION, TWICE],
        [nn.Flatten(0), nn.Unflatten(0, (-1, 12)), nn.Linear(12, 4)],
        [nn.Linear(4, 2), nn.LayerNorm(2), nn.Flatten()],
    ],
)
def test_fully_connected_layers_run_on_all_episodes_at_once(layers: list[nn.Module], shared: tuple[str, ...]) -> None:
    """As one by one, whatever the way that is taken for these layers; first and second derivatives too."""
    draws = generator()
    backbone = nn.Sequential(*copy.deepcopy(layers))
    module = Network(backbone, nn.Linear(backbone(torch.zeros(2, 3, 4)).flatten(1).shape[1], 2)).double()
    x = torch.randn(4, 5, 3, 4, generator=draws, dtype=torch.float64)
    params = {
        name: torch.randn(4, *value.shape, generator=draws, dtype=torch.float64).requires_grad_()
        for name, value in module.named_parameters()
        if not name.endswith(shared)
    }

    def derivatives(outputs: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(outputs.square().sum(), list(params.values()), create_graph=True)
        penalty = torch.stack([grad.square().sum() for grad in first]).sum()
        return [outputs, *first, *torch.autograd.grad(penalty, list(params.values()))]

    state = copy.deepcopy(module.state_dict())

    def under_all_names(own: dict[str, Tensor]) -> dict[str, Tensor]:
        return own | {name: own[first] for name, first in tied_names(module).items() if first in own}

    together = apply(module, under_all_names(params), x)
    alone = []
    for number in range(4):
        own = {name: value[number] for name, value in params.items()}
        clone = copy.deepcopy(module)  # shares within itself what the module shares
        with torch.no_grad():
            for name, weight in clone.named_parameters():
                weight.copy_(own.get(name, weight))
        alone.append(torch.func.functional_call(module, under_all_names(own), (x[number],), tie_weights=False))
        torch.testing.assert_close(alone[number], clone(x[number]))
        one = {name: value[number : number + 1] for name, value in params.items()}
        found = apply(module, under_all_names(one), x[number : number + 1])
        torch.testing.assert_close(found[0], alone[number])
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(derivatives(together), derivatives(torch.stack(alone)))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("mode", ["episode", "running"])
@pytest.mark.parametrize("shared", [(), ("bias",), ("0.weight", "0.bias")])
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AdaptiveAvgPool2d(1)],
        [nn.Conv2d(2, 3, (2, 3), padding=(0, 1), bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(3)],
        [
            nn.Conv2d(2, 3, 2, dilation=(2, 1)),
            nn.Softplus(),
            nn.Conv2d(3, 2, 1, stride=(1, 2)),
            nn.BatchNorm2d(2, affine=False),
        ],
        [nn.Conv2d(2, 2, 2), nn.Flatten(), nn.BatchNorm1d(18), nn.Tanh()],
        [nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm2d(2)],
        [nn.Conv2d(2, 1, 2), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2, padding=1), nn.Conv2d(1, 2, 2), nn.ReLU()],
    ],
)
def test_convolutions_run_on_all_episodes_at_once(
    layers: list[nn.Module], shared: tuple[str, ...], mode: str, rows: int | None
) -> None:
    """As one by one, whatever the way that is taken for these layers; statistics and derivatives too."""
    draws = generator()
    module = episodic(nn.Sequential(*copy.deepcopy(layers)), track=True).double()
    x = torch.stack([images(5, seed) for seed in range(3)])
    params = {
        name: torch.randn(3, *value.shape, generator=draws, dtype=torch.float64).requires_grad_()
        for name, value in module.named_parameters()
        if not name.endswith(shared)
    }
    seen: list[Statistics] = []
    running = mode == "running"
    record = None if running else seen.append
    together = apply(module, params, x, rows=rows, running=running, record=record, twice=True)
    one_by_one = []
    for number in range(3):
        mine = {name: value[number] for name, value in params.items()}
        used: Statistics = {}
        with statistics(rows, running=running, record=used):
            one_by_one.append(torch.func.functional_call(module, mine, (x[number],)))
        seen.append(used)
        one = {name: value[None] for name, value in mine.items()}
        for twice in (True, False):
            again = apply(module, one, x[number : number + 1], rows=rows, running=running, twice=twice)
            torch.testing.assert_close(again.squeeze(0), one_by_one[-1])
    alone = torch.stack(one_by_one)
    torch.testing.assert_close(together, alone)
    for norm, found in seen[0].items() if not running else ():
        torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*(one[norm] for one in seen[1:]))))
    weights = list(params.values())
    first = [
        torch.autograd.grad(out.pow(3).sum(), weights, create_graph=True, materialize_grads=True)
        for out in (together, alone)
    ]
    torch.testing.assert_close(*first)
    penalties = [torch.stack([grad.square().sum() for grad in grads]).sum() for grads in first]
    second = [torch.autograd.grad(penalty, weights, materialize_grads=True) for penalty in penalties]
    torch.testing.assert_close(*second)


def test_a_bias_before_batch_normalization_has_no_gradient_where_it_cancels() -> None:
    """By the batch's statistics it cancels, by running ones it does not."""
    layer = nn.Conv2d(2, 3, 3)
    module = episodic(nn.Sequential(layer, nn.BatchNorm2d(3), nn.Tanh()), track=True).double()
    assert layer.bias is not None
    x, bias = images(5, 1)[None], layer.bias[None]
    moved = {"0.bias": bias + 3.0}
    for rows in (None, 2):
        torch.testing.assert_close(apply(module, moved, x, rows=rows), apply(module, {}, x, rows=rows))
    assert not torch.allclose(apply(module, moved, x, running=True), apply(module, {}, x, running=True))
    seen: list[Statistics] = []
    apply(module, moved, x, record=seen.append)
    apply(module, {}, x, record=seen.append)
    (one,), (other,) = (used.values() for used in seen)
    torch.testing.assert_close(one[0], other[0] + 3.0)
    for running, twice in ((False, False), (False, True), (True, False)):
        outputs = apply(module, {"0.bias": bias}, x, running=running, twice=twice)
        (found,) = torch.autograd.grad(outputs.pow(3).sum(), bias, materialize_grads=True)
        assert bool(found.any()) == running


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1)])
def test_layers_of_images_do_not_mix_episodes_of_something_else(layer: nn.Module) -> None:
    """Of matrices, which such a layer takes for channels of one image."""
    x = torch.randn(2, 4, 5, 5, generator=generator())
    torch.testing.assert_close(apply(nn.Sequential(layer), {}, x), layer(x.flatten(0, 1)).unflatten(0, (2, 4)))
    norm = episodic(nn.Sequential(layer, nn.Flatten(), nn.BatchNorm1d(layer(x[0]).flatten(1).shape[1])), track=False)
    torch.testing.assert_close(apply(norm, {}, x), torch.cat([apply(norm, {}, one[None]) for one in x]))


def test_convolutions_of_episodes_under_vmap() -> None:
    module = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Tanh(), nn.Conv2d(1, 2, 2)).double()
    x = torch.stack([torch.stack([images(3, seed), images(3, seed + 1)]) for seed in (0, 2)])
    params = {name: value.detach().expand(2, *value.shape) for name, value in module.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return apply(module, params, x, twice=True).pow(3).sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    alone = [torch.func.grad(loss)(params, part) for part in x]
    torch.testing.assert_close(found, {name: torch.stack([one[name] for one in alone]) for name in found})


def test_hooks_are_not_passed_over() -> None:
    layer, draws = nn.Linear(2, 3), generator()
    layer.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    x, weight = torch.randn(2, 4, 2, generator=draws), torch.randn(2, 3, 2, generator=draws)
    expected = 2 * (x @ weight.mT + layer.bias)
    torch.testing.assert_close(apply(nn.Sequential(layer), {"0.weight": weight}, x), expected)
