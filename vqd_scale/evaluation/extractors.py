"""Feature extractors for distance metrics, with a description of everything the features depend on."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import configs_digest, tensors_digest
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.tensors import read_tensors
from vqd_scale.evaluation.config import ImageExtractorConfig, Inception, RandomNetwork
from vqd_scale.tokenizers.base import ImageTokenizer, to_signal

_RESIZES = {"torch-fidelity": "TensorFlow 1", "pytorch-fid": "PyTorch"}

FEATURES = "features"
LOGITS = "logits"

Images = UInt8[Tensor, "batch 3 height width"]


@dataclass(frozen=True)
class Extractor:
    """Feature extractor.

    Attributes:
        dimension: Number of features.
        description: Everything the features depend on, as JSON values. Features with different descriptions
            are not compared.
        columns: Function from images to `FEATURES` [batch, dimension] and optionally `LOGITS` [batch,
            classes], float32.
    """

    dimension: int
    description: dict[str, Any]
    columns: Callable[[Images], dict[str, Tensor]]

    @torch.no_grad()
    def __call__(self, images: Images) -> dict[str, Tensor]:
        """Extract the features of a batch, returned on the CPU."""
        return {name: value.float().cpu() for name, value in self.columns(images).items()}


def checked_weights(path: Path, sha256: str | None, name: str, instruction: str) -> str:
    """Verify the digest of a weights file and return it.

    Args:
        path: Weights file.
        sha256: Expected SHA-256; ``None`` accepts any file.
        name: Name of the network, for error messages.
        instruction: Instruction for obtaining the file, for error messages.

    Raises:
        UserError: The file is missing or has another digest.
    """
    if not path.is_file():
        raise UserError(f"{path}: the weights of {name} are missing; {instruction}")
    digest = sha256_of(path)
    if sha256 is not None and digest != sha256:
        raise UserError(
            f"{path}: these are not the weights of {name} that were named: their SHA-256 is {digest}, not "
            f"{sha256}; {instruction}"
        )
    return digest


def images_extractor(config: ImageExtractorConfig, device: torch.device) -> Extractor:
    """Build an extractor that needs no model; errors as for `inception`."""
    if isinstance(config, RandomNetwork):
        return random_network(config, device)
    return inception(config, device)


def inception(config: Inception, device: torch.device) -> Extractor:
    """Load TensorFlow's Inception of 2015.

    Raises:
        UserError: The weights are missing or have another digest.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    instruction = f"fetch {URL_INCEPTION_V3} and give extractor.weights=FILE."
    digest = checked_weights(config.weights, config.sha256, "Inception", instruction)
    # torch-fidelity unpickles the file, which can execute arbitrary code; pass it a safe copy in memory.
    state = io.BytesIO()
    torch.save(read_tensors(config.weights), state)
    state.seek(0)
    layers = [config.layer, "logits_unbiased"] if config.layer == "2048" else [config.layer]
    try:
        network: nn.Module = FeatureExtractorInceptionV3("inception", layers, state)
    except RuntimeError as error:
        raise UserError(
            f"{config.weights}: these weights do not fit torch-fidelity's Inception "
            f"({' '.join(str(error).split())[:200]})."
        ) from None
    network = network.to(device)
    description = {
        "kind": "torch-fidelity's Inception",
        "layer": config.layer,
        "weights_sha256": digest,
        "resize": f"to 299 x 299, bilinear as in {_RESIZES[config.input]}, not anti-aliased",
    }
    originals: list[Tensor] = []
    if config.input == "pytorch-fid":
        first_layer = cast(nn.Module, network.Conv2d_1a_3x3)

        def replace(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (_pytorch_fid_input(originals[0]),)

        first_layer.register_forward_pre_hook(replace)

    def columns(images: Images) -> dict[str, Tensor]:
        originals[:] = [images.to(device)]
        return dict(zip((FEATURES, LOGITS), network(originals[0]), strict=False))

    return Extractor(int(config.layer), description, columns)


def _pytorch_fid_input(images: Images) -> Tensor:
    resized = functional.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
    return 2 * resized - 1


def tokenizer_latents(tokenizer: ImageTokenizer) -> Extractor:
    """Return the extractor of the spatial mean and deviation of each channel of the tokenizer's latents."""

    def columns(images: Images) -> dict[str, Tensor]:
        parameter = next(tokenizer.parameters())
        signal = to_signal(images.to(parameter.device)).to(parameter.dtype)
        latents = tokenizer.latents(signal).float().flatten(2)
        return {FEATURES: torch.cat([latents.mean(dim=2), latents.std(dim=2)], dim=1)}

    blank = torch.zeros(1, 3, 2 * tokenizer.factor, 2 * tokenizer.factor, dtype=torch.uint8)
    with torch.no_grad():
        dimension = columns(blank)[FEATURES].shape[1]
    description = {
        "kind": "moments of the tokenizer's latents",
        "config_sha256": configs_digest(tokenizer),
        "weights_sha256": tensors_digest(tokenizer.state_dict()),
    }
    return Extractor(dimension, description, columns)


def random_network(config: RandomNetwork, device: torch.device) -> Extractor:
    """Return the extractor of untrained convolutions."""
    widths = [3, 16, 32, config.features]
    layers = torch.arange(len(widths) - 1)
    kernels = [
        (uniforms(config.seed, Purpose.EVALUATION, layers[number : number + 1], 9 * inner * outer) - 0.5)
        .view(outer, inner, 3, 3)
        .mul(2 / inner**0.5)
        .to(device)
        for number, (inner, outer) in enumerate(pairwise(widths))
    ]

    def columns(images: Images) -> dict[str, Tensor]:
        values = to_signal(images.to(device))
        for kernel in kernels:
            values = functional.conv2d(values, kernel, stride=2, padding=1).relu()
        features = values.mean(dim=(2, 3))
        return {FEATURES: features, LOGITS: 10 * features}

    description = {"kind": "random convolutions", "features": config.features, "seed": config.seed}
    return Extractor(config.features, description, columns)
