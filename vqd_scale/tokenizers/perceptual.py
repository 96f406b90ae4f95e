"""Perceptual losses: LPIPS, or a weight-free edge pyramid."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import check_names, read_tensors
from vqd_scale.tokenizers.base import Images
from vqd_scale.tokenizers.config import LPIPSConfig

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
"""Standard deviation of LPIPS inputs (`_SHIFT` is the mean): ImageNet's statistics for values in [-1, 1]."""
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """Channel-weighted squared differences of normalized VGG-16 features, after each of its five blocks.

    Module names follow the two published files.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for number, block in enumerate(_VGG16):
            layers += [] if number == 0 else [nn.MaxPool2d(2)]
            for out_width in block:
                layers += [nn.Conv2d(width, out_width, 3, padding=1), nn.ReLU()]
                width = out_width
        self.features = nn.Sequential(*layers)
        self.linear = nn.ParameterList(torch.zeros(block[-1]) for block in _VGG16)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, images: Images, targets: Images) -> Float[Tensor, " batch"]:
        """Compute the LPIPS distance of each image to its target, both in [-1, 1]."""
        x, y = ((batch.float() - self.shift) / self.scale for batch in (images, targets))
        total = x.new_zeros(len(x))
        layers = iter(self.features)
        for block, weight in zip(_VGG16, self.linear, strict=True):
            # Two layers per convolution; every block except the first starts with a max pool.
            for _ in range(2 * len(block) + (block is not _VGG16[0])):
                layer = next(layers)
                x, y = layer(x), layer(y)
            difference = (_normalize_channels(x) - _normalize_channels(y)).square()
            total = total + (difference * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return total


class Pyramid(nn.Module):
    """Mean absolute difference of horizontal and vertical edges at full size, half size, and so on.

    Args:
        levels: Number of scales.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, images: Images, targets: Images) -> Float[Tensor, " batch"]:
        """Compute the distance of each image to its target, both in [-1, 1]."""
        error = (images - targets).float()
        total = error.new_zeros(len(error))
        for level in range(self.levels):
            if min(error.shape[-2:]) < 2:
                break
            error = error if level == 0 else functional.avg_pool2d(error, 2)
            edges = (error.diff(dim=2), error.diff(dim=3))
            total = total + sum(edge.abs().flatten(1).mean(dim=1) for edge in edges if edge.numel())
        return total / self.levels


def load_lpips(config: LPIPSConfig) -> LPIPS:
    """Load LPIPS with frozen weights.

    Raises:
        UserError: A weights file is missing, damaged, or has other contents.
    """
    return lpips_of(read_tensors(config.vgg), read_tensors(config.linear or _packaged_weights()))


def lpips_of(vgg: Mapping[str, Tensor], linear: Mapping[str, Tensor]) -> LPIPS:
    """Build LPIPS from the two published state dictionaries.

    Args:
        vgg: ``features.N.weight`` and ``.bias``; classifier weights are ignored.
        linear: ``linN.model.1.weight`` [1, channels, 1, 1].

    Raises:
        UserError: Entries are unknown, missing or of another shape.
    """
    model = LPIPS()
    features = {name: value for name, value in vgg.items() if name.startswith("features.")}
    linear_weights = {
        f"linear.{number}": linear[name].flatten()
        for number in range(len(_VGG16))
        if (name := f"lin{number}.model.1.weight") in linear
    }
    weights = features | linear_weights
    check_names(weights, model.state_dict(), "LPIPS on VGG-16")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"LPIPS: the weights have other shapes than VGG-16's ({str(error)[:200]}).") from None
    return model.eval().requires_grad_(False)


def _packaged_weights() -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "perceptual.linear: the package lpips, which brings these weights, is not installed; install it, "
            "or name the file vgg.pth of its version 0.1."
        )
    return Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"


def _normalize_channels(features: Float[Tensor, "batch width h w"]) -> Float[Tensor, "batch width h w"]:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
