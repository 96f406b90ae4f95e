"""Feature extractors for distance metrics, with a description of everything the features depend on."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.config import Config, kind_or
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.tensors import read_tensors
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.registry import Tokenizer

PUBLISHED_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the original FID Inception weights in PyTorch format, as in torch-fidelity and pytorch-fid."""

FEATURES = "features"
LOGITS = "logits"

Images = UInt8[Tensor, "batch 3 height width"]


class Inception(Config):
    """TensorFlow's Inception of 2015 in torch-fidelity's implementation, the network of published FIDs.

    Attributes:
        weights: Weights file.
        sha256: SHA-256 of the weights file; change it only for custom weights.
        layer: Feature layer; standard FID uses 2048.
    """

    kind: Literal["inception"] = "inception"
    weights: Path = Path("data/weights/weights-inception-2015-12-05-6726825d.pth")
    sha256: str = Field(default=PUBLISHED_INCEPTION, pattern="^[0-9a-f]{64}$")
    layer: Literal["64", "192", "768", "2048"] = "2048"


class TokenizerLatents(Config):
    """Spatial mean and standard deviation of each latent channel of the model's tokenizer, for small sets.

    The features are blind to the tokenizer's reconstruction error, so only models with the same tokenizer are
    comparable.
    """

    kind: Literal["tokenizer"] = "tokenizer"


class RandomNetwork(Config):
    """Three untrained convolutions, for testing the evaluation without downloaded weights.

    Attributes:
        features: Number of features.
        seed: Seed of the random weights.
    """

    kind: Literal["random"] = "random"
    features: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0)


ExtractorConfig = Annotated[
    Annotated[Inception, Tag("inception")]
    | Annotated[TokenizerLatents, Tag("tokenizer")]
    | Annotated[RandomNetwork, Tag("random")],
    Discriminator(kind_or("inception")),
]


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


def build_extractor(config: ExtractorConfig, tokenizer: Tokenizer, device: torch.device) -> Extractor:
    """Build the configured extractor.

    Args:
        config: Extractor configuration.
        tokenizer: Tokenizer of the model.
        device: Compute device.

    Raises:
        UserError: The weights are missing or have another digest.
    """
    if isinstance(config, Inception):
        return _inception(config, device)
    if isinstance(config, TokenizerLatents):
        return _latents(tokenizer)
    return _random(config, device)


def checked_weights(path: Path, sha256: str | None, what: str, where: str) -> str:
    """Verify the digest of a weights file and return it.

    Args:
        path: Weights file.
        sha256: Expected SHA-256; ``None`` accepts any file.
        what: Name of the network, for error messages.
        where: Instruction for obtaining the file, for error messages.

    Raises:
        UserError: The file is missing or has another digest.
    """
    if not path.is_file():
        raise UserError(f"{path}: the weights of {what} are missing; {where}")
    found = sha256_of(path)
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{path}: these are not the weights of {what} that were named: their SHA-256 is {found}, not "
            f"{sha256}; {where}"
        )
    return found


def _inception(config: Inception, device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    digest = checked_weights(
        config.weights,
        config.sha256,
        "Inception",
        f"fetch {URL_INCEPTION_V3} and give extractor.weights=FILE.",
    )
    # torch-fidelity unpickles the file, which can execute arbitrary code; pass it a safe copy in memory.
    state = io.BytesIO()
    torch.save(read_tensors(config.weights), state)
    state.seek(0)
    wanted = [config.layer, "logits_unbiased"]
    try:
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception", wanted if config.layer == "2048" else [config.layer], state
        )
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
        "resize": "to 299 x 299, bilinear as in TensorFlow 1, not anti-aliased",
    }
    return Extractor(
        int(config.layer),
        description,
        lambda images: dict(zip((FEATURES, LOGITS), network(images.to(device)), strict=False)),
    )


def _latents(tokenizer: Tokenizer) -> Extractor:
    def columns(images: Images) -> dict[str, Tensor]:
        return {FEATURES: latent_moments(tokenizer, images)}

    blank = torch.zeros(1, 3, 2 * tokenizer.factor, 2 * tokenizer.factor, dtype=torch.uint8)
    with torch.no_grad():
        dimension = columns(blank)[FEATURES].shape[1]
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    description = {"kind": "moments of the tokenizer's latents", "weights_sha256": digest.hexdigest()}
    return Extractor(dimension, description, columns)


def latent_moments(tokenizer: Tokenizer, images: Images) -> Float[Tensor, "batch features"]:
    """Compute the spatial mean and standard deviation of each channel of the tokenizer's latents."""
    parameter = next(tokenizer.parameters())
    signal = to_signal(images.to(parameter.device)).to(parameter.dtype)
    latents = tokenizer.latents(signal).float().flatten(2)
    return torch.cat([latents.mean(dim=2), latents.std(dim=2)], dim=1)


def _random(config: RandomNetwork, device: torch.device) -> Extractor:
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

    return Extractor(
        config.features,
        {"kind": "random convolutions", "features": config.features, "seed": config.seed},
        columns,
    )
