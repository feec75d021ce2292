"""Backbones that users bring: parts that run again for gradients, attention, and entries of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learnedopt.fewshot import (
    BACKBONES,
    MLP,
    BackboneConfig,
    Conv4,
    Learner,
    LearnerShape,
    learner_info,
    load_learner,
    save_learner,
)
from learnedopt.fewshot.learners import LEARNERS, MAMLConfig, ProtoNetConfig
from learnedopt.zoo import ZooError
from tests.fewshot.support import CLASSES, EXAMPLE, SHORT, WAYS, episodes, generator, make, meta_gradient
from tests.fewshot.test_learners import KINDS, PRETRAINED

REFUSED = "runs a part of itself later than it is called, to compute gradients, as activation checkpointing does"


class Checkpointed(nn.Module):
    """A part of it is computed again for the gradient; with ``reentrant=None`` nothing is."""

    def __init__(self, reentrant: bool | None, batch_norm: bool = False) -> None:
        super().__init__()
        draws = generator(5)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.first, self.body = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), norm, nn.Tanh(), nn.Linear(8, 6))
        self.reentrant = reentrant
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(0.5 * torch.randn(weight.shape, generator=draws))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        found: Tensor = (
            self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)
        )
        return found


def built(kind: str, module: nn.Module, **settings: Any) -> Learner:
    config = LEARNERS[kind](**{**SHORT.get(kind, {}), **settings})
    return config.build(module.double(), LearnerShape(EXAMPLE, WAYS, CLASSES), generator()).double()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_activation_checkpoints_are_refused_or_right(kind: str, reentrant: bool, batch_norm: bool) -> None:
    if kind not in ("anil", "matching", "nearest_neighbour", "protonet") or reentrant or batch_norm:
        with pytest.raises(ValueError, match=REFUSED):
            built(kind, Checkpointed(reentrant, batch_norm))
        return
    # Here the weights are not an episode's own.
    learner, plain = built(kind, Checkpointed(reentrant)), built(kind, Checkpointed(None))
    some = episodes()
    found, expected = (one.fit(some.support_x, some.support_y).predict(some.query_x) for one in (learner, plain))
    torch.testing.assert_close(found, expected)
    if kind not in PRETRAINED:
        torch.testing.assert_close(meta_gradient(learner, some), meta_gradient(plain, some))


class _Later(torch.autograd.Function):
    """Has the module look up its weight when the gradient is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] @ ctx.layer.weight, grads[0].mT @ x, None


class Late(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Later.apply(x, self.weight, self)
        return found


def _louder(layer: nn.Module, inputs: Any, outputs: Any) -> Any:
    return (inputs[0] * layer.get_parameter("weight").norm(),)


def hooked() -> nn.Module:
    layer = nn.Linear(4, 6)
    layer.register_full_backward_hook(_louder)
    return nn.Sequential(nn.Linear(4, 4), layer)


@pytest.mark.parametrize("make_one", [lambda: nn.Sequential(nn.Linear(4, 4), Late(4, 6, bias=False)), hooked])
def test_whatever_looks_at_weights_later_is_refused(make_one: Any) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        built("maml", make_one())
    built("protonet", make_one())


def test_hooks_on_gradients_are_called() -> None:
    """Also in a plain sequence of layers, whose modules are not called otherwise."""
    layer, seen = nn.Linear(4, 4), []
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh())
    layer.register_full_backward_hook(lambda layer, inputs, outputs: seen.append(layer))
    learner = built("maml", module)
    seen.clear()
    meta_gradient(learner, episodes())
    assert seen


def test_checkpoints_inside_torchvision_are_refused() -> None:
    models = pytest.importorskip("torchvision.models")
    sizes = {"growth_rate": 4, "block_config": (1, 1), "num_init_features": 4, "num_classes": 3}
    shape = LearnerShape((3, 32, 32), 2)
    with pytest.raises(ValueError, match=REFUSED):
        MAMLConfig().build(models.DenseNet(memory_efficient=True, **sizes), shape)
    assert isinstance(MAMLConfig().build(models.DenseNet(**sizes), shape), Learner)


class Called(nn.Module):
    """Runs a part by ``functional_call``, with weights that it has looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Checkpointed(None)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(self.body, dict(self.body.named_parameters()), (x,))
        return found


class Scaled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.mul_(1.0))
        return found


def test_functional_calls_inside_are_right() -> None:
    some = episodes()
    found, expected = (meta_gradient(built("maml", module), some) for module in (Called(), Checkpointed(None)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "layers",
    [[nn.Dropout(0.5), nn.Linear(4, 5)], [nn.ReLU(inplace=True)], [nn.Linear(4, 5).requires_grad_(False), nn.Tanh()]],
)
def test_usual_backbones_are_not_refused(layers: list[nn.Module]) -> None:
    """Chance, writing in place, and what does not learn are no reason."""
    state = torch.get_rng_state()
    for kind in KINDS:
        built(kind, Scaled(*layers, nn.Identity()))
    assert torch.equal(torch.get_rng_state(), state)


def attention() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), layer, nn.Flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 3])
def test_second_derivatives_through_attention(dtype: torch.dtype, at_once: int) -> None:
    """Beside a loop with the same formula written out in place of attention's fused forms."""
    config = MAMLConfig(adapted="all", steps=2, learning_rate=0.3, inner_loss="mean", episodes_at_once=at_once)
    learner = config.build(attention(), LearnerShape(EXAMPLE, WAYS), generator()).to(dtype)
    some = episodes().to("cpu", dtype)
    found = meta_gradient(learner, some)
    network = learner.model
    assert isinstance(network, nn.Module)
    losses = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for x, y, query_x, query_y in zip(some.support_x, some.support_y, some.query_x, some.query_y):
            params: dict[str, Tensor] = dict(network.named_parameters())
            for _ in range(2):
                loss = F.cross_entropy(torch.func.functional_call(network, params, (x,)), y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
                params = {name: value - 0.3 * grad for (name, value), grad in zip(params.items(), grads)}
            losses.append(F.cross_entropy(torch.func.functional_call(network, params, (query_x,)), query_y))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(network.parameters()))
    torch.testing.assert_close(found, torch.cat([gradient.flatten() for gradient in expected]))


@pytest.mark.parametrize("kind", ["anil", "maml_pp", "meta_sgd"])
def test_every_method_of_second_order_goes_through_attention(kind: str) -> None:
    assert meta_gradient(built(kind, attention()), episodes()).isfinite().all()


def test_a_learner_is_saved_by_a_name_alone(tmp_path: Path) -> None:
    for kind in KINDS:
        learner = LEARNERS[kind]().build(MLP((5,), batch_norm=True), LearnerShape((4,), WAYS, CLASSES), generator())
        entry = save_learner(learner.with_config(), tmp_path / kind)
        assert (entry.name, entry.backbone, entry.training) == (kind, MLP((5,), batch_norm=True), {})
        assert entry.description == f"{kind}, 3-way, of examples (4,)" and entry.card.startswith(f"# {kind}\n\n{kind},")
        loaded = load_learner(entry.path)
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in learner.state_dict().items())
        assert save_learner(loaded, tmp_path / "again").sha256
    sine = MAMLConfig().build(MLP(), LearnerShape((1,), None))
    assert save_learner(sine, tmp_path / "sine").description == "maml, regression, of examples (1,)"


@dataclass(frozen=True)
class Own(BackboneConfig):
    kind: ClassVar[str] = "own"
    width: int = 5

    def build(self, example_shape: tuple[int, ...]) -> nn.Module:
        return nn.Sequential(nn.Linear(example_shape[0], self.width), nn.Tanh())


def test_own_backbones_are_saved_where_they_can_be_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = LearnerShape((4,), WAYS)
    module = ProtoNetConfig().build(Own().build((4,)), shape)
    with pytest.raises(ZooError, match=r"built around a module, .* how to build it again: give backbone="):
        save_learner(module, tmp_path / "mine")
    learner = ProtoNetConfig().build(Own(), shape)
    with pytest.raises(ZooError, match=r"Own is not in learnedopt.fewshot.BACKBONES. Put it there where it is defined"):
        save_learner(learner, tmp_path / "mine")
    with monkeypatch.context() as here:
        here.setitem(BACKBONES, "own", Own)
        for one in (learner, module):
            entry = save_learner(one, tmp_path / "mine", backbone=Own())
            assert load_learner(entry.path).backbone == learner_info(entry.path).backbone == Own()
    with pytest.raises(ZooError, match=r"'own' is not in .*BACKBONES, which has conv4, mlp: import the module"):
        load_learner(tmp_path / "mine")
    with pytest.raises(ZooError):
        save_learner(module, tmp_path / "wrong", backbone=MLP((6,)))
    assert not (tmp_path / "wrong").exists()


def test_a_learner_remembers_what_its_backbone_was_built_from() -> None:
    learner = MAMLConfig().build(Conv4(2), LearnerShape((1, 16, 16), 2))
    assert learner.backbone == learner.with_config(steps=2).backbone == Conv4(2)
    assert make("maml").backbone is None


def test_shapes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """Three terabytes of it here."""
    learner = ProtoNetConfig().build(MLP((4,)), LearnerShape((3,), ways=2))
    entry = save_learner(learner, tmp_path / "mine")
    config = json.loads((entry.path / "config.json").read_text())
    config["backbone"]["hidden"] = [4, 900_000, 900_000]
    described = {key: config[key] for key in ("learner", "backbone", "shape")}
    tensors = safetensors.torch.load((entry.path / "weights.safetensors").read_bytes())
    data = safetensors.torch.save(tensors, {"learner": json.dumps(described)})
    (entry.path / "weights.safetensors").write_bytes(data)
    config["sha256"] = hashlib.sha256(data).hexdigest()
    (entry.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="does not match its configuration: missing tensors"):
        load_learner(entry.path)
