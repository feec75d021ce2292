"""Backbones, and the batch normalization of episodes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from learnedopt.fewshot.backbones import BACKBONES, MLP, BackboneConfig, Conv4
from learnedopt.fewshot.checks import feature_size
from learnedopt.fewshot.fast.vectorized import apply
from learnedopt.fewshot.normalization import EpisodicBatchNorm, Statistics, episodic, statistics
from tests.fewshot.support import generator, images


@pytest.mark.parametrize(
    ("config", "example", "features", "parameters"),
    [
        (Conv4(64), (1, 28, 28), 64, 640 + 3 * 36928 + 4 * 128),
        (Conv4(32), (3, 84, 84), 800, 896 + 3 * 9248 + 4 * 64),
        (Conv4(64, "stride"), (1, 28, 28), 64, 640 + 3 * 36928 + 4 * 128),
        (Conv4(8, batch_norm=False), (1, 28, 28), 8, 80 + 3 * 584),
        (MLP(), (1,), 40, 80 + 1640),
        (MLP((256, 128, 64, 64), batch_norm=True), (1, 28, 28), 64, 246_272 + 2 * 512),
    ],
)
def test_sizes_are_those_of_the_literature(
    config: BackboneConfig, example: tuple[int, ...], features: int, parameters: int
) -> None:
    network = config.build(example)
    assert feature_size(network, example) == features
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert BACKBONES[config.kind].from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved four times"):
        Conv4().build((1, 14, 14))
    with pytest.raises(ValueError, match="conv4 is for images"):
        Conv4().build((10,))
    with pytest.raises(ValueError, match="downsample must be one of"):
        Conv4(downsample="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be at least 1"):
        Conv4(0)
    with pytest.raises(ValueError, match="hidden must name at least one layer"):
        MLP(())


def network(draws: torch.Generator) -> nn.Sequential:
    found = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    found.append(nn.BatchNorm1d(3, affine=False)).double()
    with torch.no_grad():
        for weight in found.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws, dtype=torch.float64))
    return found


def test_outside_episodes_nothing_is_new() -> None:
    old = network(generator())
    new = episodic(copy.deepcopy(old), track=True)
    for training in (True, False):
        torch.testing.assert_close(new.train(training)(images(5)), old.train(training)(images(5)))
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())


@pytest.mark.parametrize("rows", [None, 3, 6])
def test_statistics_of_the_first_rows(rows: int | None) -> None:
    """Against torch's own batch normalization on those rows alone; gradients by finite differences."""
    norm = EpisodicBatchNorm(2).double()
    nn.init.normal_(norm.weight, generator=generator())
    x = images(6).requires_grad_()
    used = x[: rows or 6]
    record: Statistics = {}
    with statistics(rows, record=record):
        found = norm(x)
    mean, variance = used.mean((0, 2, 3)), used.var((0, 2, 3))
    biased = used.var((0, 2, 3), correction=0)
    shape = (1, 2, 1, 1)
    scaled = (x - mean.view(shape)) / (biased.view(shape) + norm.eps).sqrt()
    torch.testing.assert_close(found, scaled * norm.weight.view(shape) + norm.bias.view(shape))
    torch.testing.assert_close(record[norm], (mean.detach(), variance.detach()))

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with statistics(rows):
            found: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))
        return found

    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_episodes_have_statistics_of_their_own(rows: int | None, running: bool, own: bool) -> None:
    module = episodic(network(generator()), track=True)
    before = copy.deepcopy(module.state_dict())
    x = torch.stack([images(5, seed) for seed in range(3)])
    name = "4.weight"
    start = dict(module.named_parameters())[name].detach()
    params = {name: torch.stack([start, 2 * start, 3 * start])} if own else {}
    seen: list[Statistics] = []
    together = apply(module, params, x, rows=rows, running=running, record=None if running else seen.append)
    alone: list[Statistics] = []
    for number in range(3):
        mine = {key: value[number : number + 1] for key, value in params.items()}
        record = None if running else alone.append
        found = apply(module, mine, x[number : number + 1], rows=rows, running=running, record=record)
        torch.testing.assert_close(together[number], found[0])
    for norm, used in seen[0].items() if seen else ():
        torch.testing.assert_close(used, tuple(torch.cat(parts) for parts in zip(*(one[norm] for one in alone))))
    assert len(seen) == (0 if running else 1)
    after = module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_averages_move_as_torch_moves_them(momentum: float | None) -> None:
    theirs = nn.BatchNorm2d(2, momentum=momentum).double()
    mine = episodic(copy.deepcopy(theirs), track=True)
    assert isinstance(mine, EpisodicBatchNorm)
    for seed in range(3):
        x = images(4, seed)
        theirs(x)
        mine.track(x.mean((0, 2, 3)), x.var((0, 2, 3)))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    without = episodic(nn.BatchNorm2d(2), track=False)
    assert isinstance(without, EpisodicBatchNorm)
    without.track(torch.ones(2), torch.ones(2))
    assert without.running_mean is None
