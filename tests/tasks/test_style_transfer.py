"""Style transfer: its three terms, its images, its features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.func import vmap

from learnedopt.data import ImageData, digits, photographs, textures
from learnedopt.tasks import StyleTransfer, random_features, vgg16_features
from learnedopt.tasks.style_transfer import gram, total_variation


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def only(images: torch.Tensor) -> ImageData:
    """Data whose every split is these images."""
    pair = images, torch.zeros(len(images), dtype=torch.int64)
    return ImageData("given", 1, pair, pair, pair)


def test_gram_matrices_are_mean_products_of_channels() -> None:
    x = torch.randn(2, 3, 4, 5, generator=seeded())
    expected = torch.einsum("nchw,ndhw->ncd", x, x) / 20
    torch.testing.assert_close(gram(x), expected)
    torch.testing.assert_close(gram(x.roll((1, 2), (2, 3))), gram(x))  # where something is does not matter


def test_total_variation_is_the_mean_square_of_differences() -> None:
    assert total_variation(torch.full((3, 4, 4), 0.7)) == 0
    ramp = torch.arange(5.0).expand(3, 4, 5)
    assert total_variation(ramp) == 1 and total_variation(3 * ramp.mT) == 9


def test_an_image_is_its_own_content_and_style() -> None:
    images = photographs().train[0][:1]
    task = StyleTransfer(only(images), only(images), variation_weight=0.0).draw(seeded(), copies=2)
    losses = vmap(task.loss)({"image": images.expand(2, -1, -1, -1)}, task.sample(seeded()))
    torch.testing.assert_close(losses, torch.zeros(2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("term", ["content", "style", "variation"])
def test_every_term_is_weighted(term: str) -> None:
    weights = {"content_weight": 0.0, "style_weight": 0.0, "variation_weight": 0.0}
    losses = []
    for weight in (0.0, 1.0, 2.0):
        task = StyleTransfer(**{**weights, f"{term}_weight": weight}).draw(seeded(), copies=2)  # type: ignore[arg-type]
        losses.append(vmap(task.loss)(task.init(seeded(1)), task.sample(seeded())))
    assert losses[0].eq(0).all() and losses[1].gt(0).all()
    torch.testing.assert_close(losses[2], 2 * losses[1])


def test_the_loss_does_not_depend_on_the_scale_of_the_features() -> None:
    plain = random_features()
    ((weights, biases),), *rest = plain.blocks
    louder = type(plain)("louder", (((10 * weights, biases),), *rest), plain.mean, plain.std)
    losses = []
    for features in (plain, louder):
        task = StyleTransfer(features=features).draw(seeded(), copies=2)
        losses.append(vmap(task.loss)(task.init(seeded(1)), task.sample(seeded())))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_held_out_images_are_drawn_from_their_split() -> None:
    white, black = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    label = torch.zeros(1, dtype=torch.int64)
    data = ImageData("two", 1, (white, label), (white, label), (black, label))
    features = random_features((4, 4, 4))
    for split, image in (("train", white), ("test", black)):
        task = StyleTransfer(data, data, features, split=split).draw(seeded(), copies=1)  # type: ignore[arg-type]
        torch.testing.assert_close(task.targets[0], features(image)[2])


def test_styles_may_have_another_size_than_contents() -> None:
    task = StyleTransfer(photographs(16), textures(32)).draw(seeded(), copies=2)
    params = task.init(seeded())
    assert params["image"].shape == (2, 3, 16, 16)
    assert vmap(task.loss)(params, task.sample(seeded())).isfinite().all()


def test_features_halve_the_image_from_block_to_block_and_do_not_see_their_neighbors() -> None:
    features = random_features((4, 6))
    images = torch.rand(3, 3, 8, 8, generator=seeded())
    first, second = features(images)
    assert first.shape == (3, 4, 8, 8) and second.shape == (3, 6, 4, 4)
    torch.testing.assert_close(features(images[1:2])[1], second[1:2])
    assert {tensor.device.type for block in features.to("meta").blocks for layer in block for tensor in layer} == {
        "meta"
    }


def test_random_features_are_the_same_every_time_and_keep_their_size() -> None:
    images = torch.rand(1, 3, 64, 64, generator=seeded())
    first, second = random_features()(images), random_features()(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(random_features(seed=1)(images)[0], first[0])
    sizes = [float(x.square().mean()) for x in random_features((64, 64, 64, 64))(images)]
    assert max(sizes) < 10 * min(sizes)


def test_vgg16_is_that_of_torchvision(tmp_path: Path) -> None:
    vgg = pytest.importorskip("torchvision.models.vgg")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = vgg.make_layers(vgg.cfgs["D"])
    path = tmp_path / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in net.state_dict().items()}, path)
    features = vgg16_features(path)
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    x = (images - torch.tensor(features.mean)[:, None, None]) / torch.tensor(features.std)[:, None, None]
    ends = iter(features(images))
    for i, layer in enumerate(net[:23]):
        if isinstance(layer, torch.nn.MaxPool2d):
            layer = torch.nn.AvgPool2d(2)
        x = layer(x)
        if i in (3, 8, 15, 22):
            torch.testing.assert_close(next(ends), x)
    assert next(ends, None) is None


def test_missing_or_foreign_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"download=True.*vgg16-397923af\.pth"):
        vgg16_features(tmp_path / "vgg16.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"features\.0\.bias"):
        vgg16_features(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contents": digits()}, "three colors"),
        ({"styles": textures(2)}, "at least 4 pixels"),
        ({"content_block": 3}, "from 0 to 2, got 3"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StyleTransfer(**arguments)  # type: ignore[arg-type]
