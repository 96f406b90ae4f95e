"""Configuration of model bundles and of sampling; needs no torch."""

from typing import Literal

from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.safe_json import Count, Size
from vqd_scale.diffusion.config import (
    ConstantGuidance,
    GuidanceScale,
    SamplerConfig,
    Schedule,
    Strided,
    Truncation,
)
from vqd_scale.nn.config import AutoregressiveConfig, NetworkConfig
from vqd_scale.text.config import TextConfig

_TRAINED = "Trained with vqd_scale. Its license is the trainer's choice, within that of the training data."


class BundleConfig(Config):
    """Configuration of a denoiser bundle, including the constants of the noise schedule."""

    kind: Literal["denoising"] = "denoising"
    codebook_size: Size
    """K, the number of codes."""
    grid: tuple[Count, Count]
    """Token grid (rows, columns)."""
    denoiser: NetworkConfig
    """Architecture of the network."""
    text: TextConfig | None = None
    """Caption encoder; ``None`` for a model without text conditioning."""
    diffusion: Schedule
    """Noise schedule, including its constants."""
    origin: str = _TRAINED
    """Origin of the weights and their known license, for the model card. Imported models name their source
    here."""


class AutoregressiveBundleConfig(Config):
    """Configuration of an autoregressive model's bundle; see `BundleConfig`."""

    kind: Literal["autoregression"] = "autoregression"
    codebook_size: Size
    """K, the number of codes."""
    grid: tuple[Count, Count]
    """Token grid (rows, columns)."""
    network: AutoregressiveConfig
    """Architecture of the network."""
    text: TextConfig | None = None
    """Caption encoder; ``None`` for a model without text conditioning."""
    origin: str = _TRAINED
    """Origin of the weights and their known license, for the model card."""


class SamplingConfig(Config):
    """Sampling options: everything that determines the images, besides model and prompts."""

    sampler: SamplerConfig = Strided()
    """Diffusion sampler; ignored by autoregressive models."""
    guidance: GuidanceScale = ConstantGuidance()
    """Scale of classifier-free guidance; 1 disables it."""
    truncation: Truncation | None = None
    """Truncation of the predicted code distribution; disabled if not given."""
    negative: str | None = None
    """Negative prompt, used instead of the null condition of classifier-free guidance."""
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    """Seed of the samples."""
    batch_size: Size = 32
    """Images per batch."""
