"""What holds for every family in the registry, and what is particular to some."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad, grad_and_value, vmap

from learnedopt.data import ImageData, text_file
from learnedopt.tasks import FAMILIES
from learnedopt.tasks.autoencoder import Autoencoder
from learnedopt.tasks.base import Batch, Params, Split, Task, TaskFamily
from learnedopt.tasks.char_attention import CharAttention
from learnedopt.tasks.char_rnn import CharRNN
from learnedopt.tasks.conv import Conv
from learnedopt.tasks.conv_pool import ConvPool
from learnedopt.tasks.layers import ACTIVATIONS, NORMS, Norm
from learnedopt.tasks.logistic import Logistic
from learnedopt.tasks.matrix_factorization import MatrixFactorization
from learnedopt.tasks.random_mlp import RandomMLP
from learnedopt.tasks.regression import Regression

COPIES = 3

# Every family as it comes, and the variants whose computations differ, so that no chance draw leaves one out.
VARIANTS: dict[str, Callable[[], TaskFamily]] = {
    **FAMILIES,
    **{f"char_rnn-{cell}": partial(CharRNN, cells=(cell,)) for cell in ("tanh", "gru", "lstm")},
    **{f"conv-{norm}": partial(Conv, norms=(norm,), layers=(2, 2)) for norm in NORMS},
    **{f"conv_pool-{norm}": partial(ConvPool, norms=(norm,), batch_sizes=(16,), initial_std=None) for norm in NORMS},
    **{f"random_mlp-{name}": partial(RandomMLP, activations=(name,)) for name in ACTIVATIONS},
    **{f"autoencoder-{loss}": partial(Autoencoder, reconstructions=(loss,)) for loss in ("mse", "bce")},
    **{f"char_attention-{n}-{n}": partial(CharAttention, layers=(n, n), heads=(n, n)) for n in (1, 2)},
}

variants = pytest.mark.parametrize("name", VARIANTS)
# Three draws of a family as it comes, one of each variant.
draws = pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name in VARIANTS for seed in range(3 if name in FAMILIES else 1)]
)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def draw(name: str, seed: int) -> Task:
    return VARIANTS[name]().draw(seeded(seed), COPIES)


def in_float64(task: Task, seed: int) -> tuple[Params, Batch]:
    generator = seeded(seed)
    params = {key: value.double() for key, value in task.init(generator).items()}
    return params, tuple(x.double() if x.is_floating_point() else x for x in task.sample(generator))


def moved(params: Params, batch: Batch, where: torch.dtype | torch.device) -> tuple[Params, Batch]:
    """What a floating-point tensor becomes in another precision, and every tensor on another device."""
    device = where if isinstance(where, torch.device) else None
    items = tuple(x.to(where) if x.is_floating_point() else x.to(device) for x in batch)
    return {key: x.to(where) for key, x in params.items()}, items


def one(params: Params, batch: Batch, copy: int) -> tuple[Params, Batch]:
    return {key: value[copy] for key, value in params.items()}, tuple(x[copy] for x in batch)


@draws
def test_copies_come_first_and_the_loss_starts_finite(name: str, seed: int) -> None:
    task = draw(name, seed)
    params = task.init(seeded(seed))
    for split in get_args(Split):
        batch = task.sample(seeded(seed), split)
        assert {x.shape[0] for x in (*params.values(), *batch)} == {task.copies} == {COPIES}
        losses = vmap(task.loss)(params, batch)
        assert losses.shape == (COPIES,) and losses.isfinite().all()


@draws
def test_gradient_agrees_with_finite_differences(name: str, seed: int) -> None:
    task = draw(name, seed)
    params, batch = one(*in_float64(task, seed), copy=0)
    generator = seeded(seed + 100)
    # Off the kink that a ReLU has at exactly zero, where blank pixels and zero biases put it; and with steps so small
    # that hardly one of the many ReLUs and maxima of a convolutional net switches on the way.
    params = {key: x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=generator) for key, x in params.items()}
    gradient = grad(task.loss)(params, batch)
    assert gradient.keys() == params.keys()
    for key in params:  # one at a time, so that a wrong small gradient cannot hide behind a large one
        direction = torch.randn(params[key].shape, dtype=torch.float64, generator=generator)
        step = 1e-8 * direction
        ahead = task.loss({**params, key: params[key] + step}, batch)
        behind = task.loss({**params, key: params[key] - step}, batch)
        slope = (gradient[key] * direction).sum()
        torch.testing.assert_close((ahead - behind) / 2e-8, slope, rtol=1e-4, atol=1e-7)


@draws
def test_vectorized_over_copies_equals_one_at_a_time(name: str, seed: int) -> None:
    task = draw(name, seed)
    params, batch = in_float64(task, seed)
    gradients, losses = vmap(grad_and_value(task.loss))(params, batch)
    for copy in range(COPIES):
        gradient, loss = grad_and_value(task.loss)(*one(params, batch, copy))
        torch.testing.assert_close(losses[copy], loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            {key: value[copy] for key, value in gradients.items()}, gradient, rtol=1e-7, atol=1e-10
        )


@variants
def test_second_derivatives_are_symmetric(name: str) -> None:
    """Meta-gradients of second order pass through the gradient once more."""
    task = draw(name, 0)
    params, batch = in_float64(task, 0)
    generator = seeded(1)

    def random() -> Params:
        return {key: torch.randn(x.shape, dtype=x.dtype, generator=generator) for key, x in params.items()}

    def dot(a: Params, b: Params) -> Tensor:
        return torch.stack([(a[key] * b[key]).sum() for key in a]).sum()

    def along(point: Params, direction: Params, batch: Batch) -> Tensor:
        return dot(grad(task.loss)(point, batch), direction)

    u, v, point = (
        random(),
        random(),
        {key: x + 0.05 * noise for (key, x), noise in zip(params.items(), random().values())},
    )
    hessian_u, hessian_v = (vmap(grad(along))(point, direction, batch) for direction in (u, v))
    torch.testing.assert_close(vmap(dot)(hessian_u, v), vmap(dot)(hessian_v, u), rtol=1e-6, atol=1e-9)


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_loss_has_the_precision_of_parameters_and_batch(name: str, dtype: torch.dtype) -> None:
    task = draw(name, 0)
    params, batch = moved(task.init(seeded(0)), task.sample(seeded(0)), dtype)
    gradients, losses = vmap(grad_and_value(task.loss))(params, batch)
    assert losses.dtype == dtype and losses.isfinite().all()
    assert {gradient.dtype for gradient in gradients.values()} == {dtype}


@variants
def test_the_loss_is_where_parameters_and_batch_are(name: str) -> None:
    task = draw(name, 0)
    # Tensors of the meta device mix with no others, so that one made elsewhere would be found out.
    params, batch = moved(task.init(seeded(0)), task.sample(seeded(0)), torch.device("meta"))
    gradients, losses = vmap(grad_and_value(task.loss))(params, batch)
    assert {x.device.type for x in (losses, *gradients.values())} == {"meta"}


@draws
def test_the_same_seed_gives_the_same_task_parameters_and_batches(name: str, seed: int) -> None:
    def everything(seed: int) -> tuple[str, Params, Batch]:
        generator = seeded(seed)
        task = VARIANTS[name]().draw(generator, COPIES)
        return repr(task), task.init(generator), task.sample(generator)

    first, second = everything(seed), everything(seed)
    assert first[0] == second[0]
    torch.testing.assert_close(first[1:], second[1:], rtol=0, atol=0)
    other = everything(seed + 1000)
    tensors, others = (*first[1].values(), *first[2]), (*other[1].values(), *other[2])
    assert first[0] != other[0] or not all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@variants
def test_copies_start_from_different_parameters(name: str) -> None:
    task = draw(name, 0)
    losses = vmap(task.loss)(task.init(seeded(0)), task.sample(seeded(0)))
    assert len(set(losses.tolist())) == COPIES


@draws
def test_a_hundred_steps_of_default_adam_lower_the_loss(name: str, seed: int) -> None:
    task = draw(name, seed)
    generator = seeded(seed)
    params = {key: value.requires_grad_() for key, value in task.init(generator).items()}
    optimizer = torch.optim.Adam(params.values())
    yardstick = [task.sample(generator) for _ in range(10)]

    def mean_losses() -> Tensor:
        return torch.stack([vmap(task.loss)(params, batch).detach() for batch in yardstick]).mean(0)

    before = mean_losses()
    for _ in range(100):
        optimizer.zero_grad()
        vmap(task.loss)(params, task.sample(generator)).sum().backward()
        optimizer.step()
    lowered = before - mean_losses()
    assert (lowered > 1e-3 * before.abs()).all(), (before, lowered)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "networks"])
def test_splits_of_data_share_no_example(name: str) -> None:
    task = draw(name, 0)
    data = getattr(task, "data", None)
    if data is None:  # synthetic, or text, whose stretches are tested below
        assert name not in ("mlp", "autoencoder", "conv", "conv_pool", "random_mlp", "softmax_regression")
        return
    seen = {}
    for split in get_args(Split):
        images = task.sample(seeded(0), split)[0].flatten(0, 1).flatten(1)
        seen[split] = set(map(tuple, images.tolist()))
        assert seen[split] <= set(map(tuple, data.split(split)[0].flatten(1).tolist()))
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))


@pytest.mark.parametrize("name", ["logistic", "char_rnn", "char_attention", "conv", "conv_pool", "mlp"])
def test_accuracy_is_the_share_of_right_answers(name: str) -> None:
    task = draw(name, 0)
    params, (x, y) = task.init(seeded(0)), task.sample(seeded(0))
    accuracy = vmap(task.accuracy)(params, (x, y))
    predicted = vmap(task.logits)(params, x).argmax(-1)  # type: ignore[attr-defined]
    assert vmap(task.accuracy)(params, (x, predicted)).tolist() == [1.0] * COPIES
    torch.testing.assert_close(accuracy, (predicted == y).flatten(1).float().mean(1))


@pytest.mark.parametrize(
    "name", ["regression", "sinusoid", "autoencoder", "matrix_factorization", "style_transfer", "lasso"]
)
def test_accuracy_is_refused_where_nothing_is_classified(name: str) -> None:
    task = draw(name, 0)
    with pytest.raises(NotImplementedError, match="not a classification task"):
        task.accuracy(*one(task.init(seeded(0)), task.sample(seeded(0)), 0))


def test_every_description_tells_the_structure() -> None:
    text = repr(draw("conv-batch", 0))
    assert "channels=" in text and "norm='batch'" in text and "digits" in text
    assert "tensor" not in text


def test_regression_without_noise_is_solved_by_its_teacher() -> None:
    family = Regression(noises=(0.0,), activations=("tanh",), depths=(1, 1))
    task = family.draw(seeded(0), COPIES)
    first, second = task.teacher
    params = {
        "0.weight": first,
        "0.bias": torch.zeros(COPIES, first.shape[-1]),
        "1.weight": second,
        "1.bias": torch.zeros(COPIES, second.shape[-1]),
    }
    losses = vmap(task.loss)(params, task.sample(seeded(1)))
    torch.testing.assert_close(losses, torch.zeros(COPIES), rtol=0, atol=1e-10)


def test_logistic_features_have_the_drawn_scales() -> None:
    task = Logistic(decades=(2.0, 2.0), batch_sizes=(4000, 4000)).draw(seeded(0), COPIES)
    x, _ = task.sample(seeded(0))
    torch.testing.assert_close(x.std(1, keepdim=True), task.scales, rtol=0.1, atol=0)
    assert 1e-2 <= task.scales.min() < 0.1 and 10 < task.scales.max() <= 1e2


def test_splits_of_a_matrix_share_no_entry() -> None:
    task = MatrixFactorization(batch_sizes=(50, 50)).draw(seeded(0), COPIES)
    seen = {}
    for split in get_args(Split):
        rows, columns, _ = task.sample(seeded(0), split)
        places = rows.argmax(-1) * task.shape[1] + columns.argmax(-1)
        seen[split] = set(places.flatten().tolist())
        assert seen[split] <= set(task.entries[split].tolist())
    assert len(torch.cat(list(task.entries.values())).unique()) == task.shape[0] * task.shape[1]
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))


def test_matrix_without_noise_is_completed_by_its_factors() -> None:
    task = MatrixFactorization(noises=(0.0,), extra_ranks=(0, 0)).draw(seeded(0), COPIES)
    matrix = task.matrix.unflatten(1, task.shape).double()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:, None, : task.rank].sqrt()
    params = {"rows": u[..., : task.rank] * root, "columns": vt.mT[..., : task.rank] * root}
    batch = tuple(x.double() for x in task.sample(seeded(0), "test"))
    torch.testing.assert_close(vmap(task.loss)(params, batch), torch.zeros(COPIES).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_recurrent_cells_are_those_of_torch(cell: str) -> None:
    task = CharRNN(cells=(cell,)).draw(seeded(0), 1)  # type: ignore[arg-type]
    params, (x, _) = one(*in_float64(task, 0), copy=0)
    kind = {"tanh": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    torch_cell = kind(task.embedding, task.width, batch_first=True, dtype=torch.float64)
    order = {"tanh": [0], "gru": [0, 1, 2], "lstm": [1, 0, 3, 2]}[cell]  # torch's gates among ours

    def arranged(weights: Tensor) -> Tensor:
        blocks = weights.chunk(len(order), dim=-1)
        return (
            torch.cat([blocks[i] for i in order], dim=-1).mT
            if weights.ndim > 1
            else torch.cat([blocks[i] for i in order])
        )

    bias = torch.randn(params["bias"].shape, generator=seeded(1), dtype=torch.float64)
    torch_cell.weight_ih_l0.data = arranged(params["input"])
    torch_cell.weight_hh_l0.data = arranged(params["recurrent"])
    torch_cell.bias_ih_l0.data = arranged(bias)
    torch_cell.bias_hh_l0.data.zero_()
    hidden, _ = torch_cell(x @ params["embedding"])
    expected = hidden @ params["output"] + params["output_bias"]
    torch.testing.assert_close(task.logits({**params, "bias": bias}, x), expected, rtol=1e-9, atol=1e-12)


def test_attention_is_that_of_torch() -> None:
    task = CharAttention(heads=(2, 2)).draw(seeded(0), 1)
    qkv = torch.randn(3, task.length, 3 * task.width, generator=seeded(1), dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(task._attend(qkv), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["char_rnn-tanh", "char_rnn-gru", "char_rnn-lstm", "char_attention-2-2"])
def test_a_character_is_predicted_from_those_before_it_alone(name: str) -> None:
    task = draw(name, 0)
    params, (x, y) = one(*in_float64(task, 0), copy=0)
    changed = x.clone()
    changed[:, 3] = changed[:, 3].roll(1, dims=-1)
    difference = (task.logits(params, x) - task.logits(params, changed)).abs().amax((0, 2))  # type: ignore[attr-defined]
    assert difference[:3].eq(0).all() and difference[3:].gt(0).all()
    assert torch.equal(x[:, 1:].argmax(-1), y[:, :-1])  # the class of each place is the character of the next


def test_held_out_windows_come_from_held_out_text(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("a" * 80 + "b" * 10 + "c" * 10, encoding="utf-8")
    task = CharRNN(text=text_file(path), lengths=(5, 5)).draw(seeded(0), COPIES)
    for letter, split in enumerate(get_args(Split)):
        x, y = task.sample(seeded(0), split)
        assert x.argmax(-1).eq(letter).all() and y.eq(letter).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_pooled_net_is_computed_as_described(norm: Norm) -> None:
    """On images of CIFAR-10's size: three convolutions of 16 channels, 2 x 2 pooling, 32 hidden units."""
    images = torch.rand(12, 3, 32, 32, generator=seeded(0), dtype=torch.float64)
    pair = images, torch.arange(12) % 10
    task = ConvPool(ImageData("noise", 10, pair, pair, pair), norms=(norm,), initial_std=0.1).draw(seeded(0), 1)
    params = {key: value[0].double() for key, value in task.init(seeded(0)).items()}
    shapes = {key: tuple(value.shape) for key, value in params.items() if key.endswith("weight")}
    assert shapes == {
        "conv.0.weight": (16, 3, 5, 5),
        "conv.1.weight": (16, 16, 5, 5),
        "conv.2.weight": (16, 16, 5, 5),
        "hidden.weight": (32, 256),
        "output.weight": (10, 32),
    }
    x = images
    for name in ("conv.0", "conv.1", "conv.2", "hidden"):
        weights, bias = params[f"{name}.weight"], params[f"{name}.bias"]
        x = F.conv2d(x, weights, padding="same") if weights.ndim == 4 else F.linear(x, weights)
        dims, channels = {"none": ((), 1), "batch": ((0, 2, 3), 1), "layer": ((1, 2, 3), 1), "group": ((2, 3, 4), 2)}[
            norm
        ]
        if norm != "none":
            parts = x.unflatten(1, (channels, -1)) if norm == "group" else x
            dims = tuple(dim for dim in dims if dim < parts.ndim)
            centered = parts - parts.mean(dims, keepdim=True)
            x = (centered / (centered.square().mean(dims, keepdim=True) + 1e-5).sqrt()).view_as(x)
        x = torch.relu(x + bias.view(-1, *[1] * (x.ndim - 2)))
        x = F.max_pool2d(x, 2) if weights.ndim == 4 else x
        x = x.flatten(1) if name == "conv.2" else x
    expected = x @ params["output.weight"].mT + params["output.bias"]
    torch.testing.assert_close(task.logits(params, images), expected, rtol=1e-9, atol=1e-12)


def test_initial_scales_are_as_drawn() -> None:
    task = ConvPool(hidden=(500,), initial_std=0.01).draw(seeded(0), COPIES)
    assert all(abs(x.std() / 0.01 - 1) < 0.2 for name, x in task.init(seeded(0)).items() if x.numel() > 100)
    task = ConvPool(hidden=(500,), initial_std=None, gains=(2.0, 2.0)).draw(seeded(0), COPIES)
    params = task.init(seeded(0))
    assert all(x.eq(0).all() for name, x in params.items() if name.endswith("bias"))
    deviations = {
        name: float(x.std() * x[0, 0].numel() ** 0.5) for name, x in params.items() if name.endswith("weight")
    }
    assert deviations == pytest.approx(dict.fromkeys(deviations, 2.0), rel=0.1)


def test_random_perceptrons_take_every_shape_in_their_ranges() -> None:
    family = RandomMLP(depths=(1, 3), widths=(4, 7), batch_sizes=(2, 5))
    generator = seeded(0)
    drawn = [family.draw(generator, 1) for _ in range(200)]
    assert {len(task.hidden) for task in drawn} == {1, 2, 3}
    assert {width for task in drawn for width in task.hidden} == {4, 5, 6, 7}
    assert any(len(set(task.hidden)) > 1 for task in drawn)  # each layer has a width of its own
    assert {task.activation for task in drawn} == set(ACTIVATIONS)
    assert {task.batch_size for task in drawn} == {2, 3, 4, 5}


def test_families_do_not_draw_an_activation_added_since() -> None:
    """So that a seed keeps meaning the same tasks."""
    common = ("relu", "tanh", "gelu", "sigmoid", "elu")
    assert [family().activations for family in (Regression, Autoencoder, Conv)] == [common] * 3


def test_networks_are_of_all_architectures() -> None:
    generator = seeded(0)
    kinds = {type(FAMILIES["networks"]().draw(generator, 1)).__name__ for _ in range(60)}
    assert kinds == {"MLP", "ConvTask", "AutoencoderTask", "CharRNNTask", "CharAttentionTask", "RegressionTask"}


def test_every_family_is_in_the_document() -> None:
    document = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1] for line in document.splitlines() if line.startswith("| `")}
    assert set(FAMILIES) <= rows


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_normalized_convolutions_ignore_the_scale_of_their_weights(norm: str) -> None:
    task = Conv(norms=(norm,), layers=(1, 1)).draw(seeded(0), 1)  # type: ignore[arg-type]
    params, (x, _) = one(*in_float64(task, 0), copy=0)
    louder = {**params, "0.weight": 100 * params["0.weight"]}
    torch.testing.assert_close(task.logits(louder, x), task.logits(params, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (lambda: Regression(activations=("swish",)), "unknown activation 'swish'"),
        (lambda: CharRNN(cells=("elman",)), "unknown cell 'elman'"),  # type: ignore[arg-type]
        (lambda: Conv(norms=("instance",)), "unknown norm 'instance'"),  # type: ignore[arg-type]
        (lambda: Conv(channels=(3,)), "must be even"),
        (lambda: ConvPool(norms=("instance",)), "unknown norm 'instance'"),  # type: ignore[arg-type]
        (lambda: ConvPool(norms=("group",), hidden=(33,)), "even channels and hidden"),
        (lambda: ConvPool(kernel=4), "kernel must be odd"),
        (lambda: RandomMLP(activations=("swish",)), "unknown activation 'swish'"),
        (lambda: Autoencoder(reconstructions=("mae",)), "unknown reconstruction 'mae'"),  # type: ignore[arg-type]
        (lambda: Regression(widths=(32, 8)).draw(seeded(0), 1), "low <= high"),
        (lambda: Regression(gains=(0.0, 1.0)).draw(seeded(0), 1), "must be positive"),
    ],
)
def test_impossible_ranges_are_refused(family: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family()
