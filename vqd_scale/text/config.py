"""Configuration of the caption encoders, and the registry of their kinds; needs no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from vqd_scale.core.config import Config
from vqd_scale.core.safe_json import Count, Depth, Size

ALL_MERGES = 49152 - 256 - 2


class Tower(Config):
    """CLIP text tower trained from scratch together with the denoiser."""

    kind: Literal["tower"] = "tower"
    context_length: Size = 77
    """Length of a caption in ids, as in the token shards."""
    width: Size = 512
    """Channels of the features."""
    heads: Count = 8
    """Number of attention heads; must divide the width."""
    layers: Depth = 12
    """Number of transformer blocks."""
    bpe_merges: int = Field(default=ALL_MERGES, ge=0, le=ALL_MERGES)
    """Number of CLIP's byte-pair merges; fewer give a smaller vocabulary for a small dataset."""
    normalize: bool = True
    """Scale each feature vector to length 1, as VQ-Diffusion does."""
    null_condition: Literal["learned", "empty"] = "learned"
    """Null condition for guidance: a learned embedding, or the features of the empty caption."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Pretrained(Config):
    """Text tower of an open_clip model."""

    kind: Literal["open_clip"] = "open_clip"
    model: str = "ViT-B-32-quickgelu"
    """Model name in open_clip."""
    pretrained: str | None = "openai"
    """open_clip tag or local weight file; ``null`` for random weights, to be loaded from a bundle."""
    train: bool = False
    """Train and save the tower with the denoiser. A frozen tower is stored by name only."""
    null_condition: Literal["learned", "empty"] = "learned"
    """Null condition for guidance: a learned embedding, or the features of the empty caption."""

    @model_validator(mode="after")
    def _frozen_weights_come_from_somewhere(self) -> "Pretrained":
        if self.pretrained is None and not self.train:
            raise ValueError("a frozen tower needs weights: give pretrained, or train it")
        return self

    def without_weights(self) -> "Pretrained":
        """Return the configuration for a bundle, which itself contains the weights of a trained tower."""
        return self.model_copy(update={"pretrained": None}) if self.train else self


TextConfig = Annotated[Tower | Pretrained, Field(discriminator="kind")]
