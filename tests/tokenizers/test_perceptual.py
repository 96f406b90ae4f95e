from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import vgg

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.config import LPIPSConfig, PyramidConfig
from vqd_scale.tokenizers.perceptual import LPIPS, Pyramid, lpips_of

WIDTHS = (64, 128, 256, 512, 512)
ENDS = (4, 9, 16, 23, 30)
"""Where torchvision's VGG-16 ends a block, the pool not counted."""


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return random weights under the names of the two published files."""
    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"])
    classifier = {"classifier.0.weight": torch.zeros(2, 2)}
    published = {f"features.{name}": value for name, value in features.state_dict().items()} | classifier
    return published, {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1) for n, w in enumerate(WIDTHS)}


def image_pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))  # pyright: ignore


@torch.no_grad()
def by_definition(vgg_state: dict[str, Tensor], linear: dict[str, Tensor]) -> Tensor:
    """Compute LPIPS with torchvision's layers by the paper's equation 1."""
    features = vgg.make_layers(vgg.cfgs["D"])
    features.load_state_dict(
        {n.removeprefix("features."): v for n, v in vgg_state.items() if "features" in n}
    )
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    outputs: list[list[Tensor]] = []
    for images in image_pair():
        x = ((images + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        outputs.append([features[:end](x) for end in ENDS])
    total = torch.zeros(2)
    for layer, (a, b) in enumerate(zip(*outputs, strict=True)):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        weight = linear[f"lin{layer}.model.1.weight"].view(1, -1, 1, 1)
        total += (weight * (a - b) ** 2).sum(1).flatten(1).mean(1)
    return total


def test_lpips_equals_published_lpips(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> None:
    """Its shift and scale are the published ones, rounded to three digits: ImageNet's within 0.3 %."""
    expected = by_definition(*weights)
    distances = lpips_of(*weights)(*image_pair())
    torch.testing.assert_close(distances, expected, rtol=5e-3, atol=0)
    assert (lpips_of(*weights)(image_pair()[0], image_pair()[0]) == 0).all()
    assert not any(parameter.requires_grad for parameter in lpips_of(*weights).parameters())


def test_weights_load_from_files_and_mismatches_are_refused(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    vgg_state, linear = weights
    torch.save(vgg_state, tmp_path / "vgg16.pth")
    save_file(linear, tmp_path / "linear.safetensors")
    config = LPIPSConfig(vgg=tmp_path / "vgg16.pth", linear=tmp_path / "linear.safetensors")
    torch.testing.assert_close(config.build()(*image_pair()), lpips_of(vgg_state, linear)(*image_pair()))
    with pytest.raises(UserError, match=r"missing linear\.2"):
        lpips_of(vgg_state, {name: value for name, value in linear.items() if not name.startswith("lin2")})
    with pytest.raises(UserError, match="other shapes"):
        lpips_of(vgg_state | {"features.0.bias": torch.zeros(3)}, linear)
    with pytest.raises(UserError, match="no such file"):
        config.model_copy(update={"vgg": tmp_path / "absent.pth"}).build()


def test_missing_weights_and_package_raise_user_error(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights[0], tmp_path / "vgg16.pth")
    monkeypatch.setattr("importlib.util.find_spec", _find_no_package)
    with pytest.raises(UserError, match="package lpips, which brings these weights, is not installed"):
        LPIPSConfig(vgg=tmp_path / "vgg16.pth").build()


def test_weights_of_the_package_are_found(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lpips" / "weights" / "v0.1"
    folder.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").touch()
    torch.save(weights[1], folder / "vgg.pth")
    torch.save(weights[0], tmp_path / "vgg16.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(LPIPSConfig(vgg=tmp_path / "vgg16.pth").build(), LPIPS)


def test_pyramid_loss_covers_edges_at_all_scales() -> None:
    pyramid = PyramidConfig(levels=3).build()
    assert isinstance(pyramid, Pyramid)
    a, _ = image_pair()
    assert (pyramid(a, a) == 0).all()
    torch.testing.assert_close(pyramid(a, a + 0.3), torch.zeros(2), atol=1e-6, rtol=0)
    flat_image = torch.zeros(1, 3, 8, 8)
    edge_image = flat_image.clone()
    edge_image[..., 4:] = 1
    # An edge of height 1 in one column of 7, of 3 and of 1, and in no row.
    assert float(pyramid(flat_image, edge_image)) == pytest.approx((1 / 7 + 1 / 3 + 1) / 3)
    noise = torch.rand(2, 3, 8, 8, requires_grad=True)
    pyramid(noise, torch.zeros_like(noise)).sum().backward()
    assert noise.grad is not None
    assert pyramid(torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)).tolist() == [0.0]


def _find_no_package(name: str) -> None:
    """Simulate a missing package."""
    del name
