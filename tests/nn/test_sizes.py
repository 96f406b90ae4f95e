from pathlib import Path

import pytest
import torch

from vqd_scale.core.config import Config, load_config, to_yaml, validated
from vqd_scale.core.errors import UserError
from vqd_scale.nn.config import Convolutional, DenoiserConfig
from vqd_scale.nn.denoiser import Denoiser
from vqd_scale.nn.sizes import SIZES, SizeName


class Run(Config):
    denoiser: DenoiserConfig = DenoiserConfig()


def parameters_of(name: SizeName) -> int:
    size = SIZES[name]
    with torch.device("meta"):
        denoiser = Denoiser(DenoiserConfig(size=name), size.codes, size.grid, steps=100)
    return sum(parameter.numel() for parameter in denoiser.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("S", 35_936_647),
        ("B", 388_780_871),
        ("F", 388_780_871),
        ("L", 1_359_274_624),
        ("ImageNet", 518_025_678),
        ("FFHQ", 411_185_664),
    ],
)
def test_parameter_counts_of_published_sizes(name: SizeName, parameters: int) -> None:
    assert parameters_of(name) == parameters


@pytest.mark.parametrize(("name", "billions"), [("3B", 3), ("7B", 7)])
def test_parameter_counts_of_larger_sizes(name: SizeName, billions: int) -> None:
    assert parameters_of(name) / 1e9 == pytest.approx(billions, rel=0.02)


def test_size_is_resolved_to_its_shape_and_written_to_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("denoiser:\n  size: S\n  layers: 4\n")
    config = load_config(Run, path, ["denoiser.heads=8"])
    expected = DenoiserConfig(width=192, layers=4, heads=8, feed_forward=Convolutional(mlp_ratio=2))
    assert config.denoiser == expected
    assert "size" not in to_yaml(config)
    path.write_text(to_yaml(config))
    assert load_config(Run, path) == config


def test_unknown_size_names_known_sizes() -> None:
    with pytest.raises(UserError, match=r"denoiser.size: given 'XL', allowed: 'S', 'B', .*'7B'"):
        validated(Run, {"denoiser": {"size": "XL"}}, "a test")
