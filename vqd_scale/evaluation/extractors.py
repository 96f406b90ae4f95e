"""What turns pictures into the features that distances are taken of, and says what these depend on."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.tensors import read_tensors
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.registry import Tokenizer

PUBLISHED_INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the Inception of the first FIDs in PyTorch's format; torch-fidelity and pytorch-fid share it."""

FEATURES = "features"
LOGITS = "logits"

Images = UInt8[Tensor, "batch 3 height width"]


class Inception(Config):
    """TensorFlow's Inception of 2015 as torch-fidelity has it, which published FIDs are taken with.

    Attributes:
        weights: The file.
        sha256: Its digest; another one is for a network of one's own.
        layer: Of which the features are taken; FID means 2048.
    """

    kind: Literal["inception"] = "inception"
    weights: Path = Path("data/weights/weights-inception-2015-12-05-6726825d.pth")
    sha256: str = Field(default=PUBLISHED_INCEPTION, pattern="^[0-9a-f]{64}$")
    layer: Literal["64", "192", "768", "2048"] = "2048"


class TokenizerLatents(Config):
    """Mean and deviation over positions of every channel of the model's own tokenizer: for small sets.

    What the tokenizer loses is invisible to it, so that it compares models of one tokenizer only.
    """

    kind: Literal["tokenizer"] = "tokenizer"


class RandomNetwork(Config):
    """Three convolutions that nobody trained, for trials of the road without any weights.

    Attributes:
        features: How many.
        seed: Which weights.
    """

    kind: Literal["random"] = "random"
    features: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0)


ExtractorConfig = Annotated[Inception | TokenizerLatents | RandomNetwork, Field(discriminator="kind")]


@dataclass(frozen=True)
class Extractor:
    """A network that gives features.

    Attributes:
        dimension: Of the features.
        description: All that they depend on, as JSON holds it; what was extracted otherwise is not compared.
        columns: From pictures to float32 `FEATURES` [batch, dimension] and perhaps `LOGITS` [batch, classes].
    """

    dimension: int
    description: dict[str, Any]
    columns: Callable[[Images], dict[str, Tensor]]

    @torch.no_grad()
    def __call__(self, images: Images) -> dict[str, Tensor]:
        """The features of a batch, on the CPU."""
        return {name: value.float().cpu() for name, value in self.columns(images).items()}


def build_extractor(config: ExtractorConfig, tokenizer: Tokenizer, device: torch.device) -> Extractor:
    """The extractor that a configuration names.

    Args:
        config: Which one.
        tokenizer: The model's.
        device: Where it computes.

    Raises:
        UserError: The weights are missing or others than named.
    """
    if isinstance(config, Inception):
        return _inception(config, device)
    if isinstance(config, TokenizerLatents):
        return _latents(tokenizer)
    return _random(config, device)


def checked_weights(path: Path, sha256: str | None, what: str, where: str) -> str:
    """The digest of a file of weights.

    Args:
        path: The file.
        sha256: What it must be; None takes any.
        what: Whose weights they are.
        where: What to do where the file is missing.

    Raises:
        UserError: It is missing, or another one.
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
    # It would open the file as a pickle that may run anything; what it gets is one of our own making.
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
    """Mean and deviation over positions of every channel of the tokenizer's latents."""
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
