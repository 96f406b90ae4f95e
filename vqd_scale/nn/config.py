"""Configuration of the networks, and the registry of their kinds; needs no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

from pydantic import Discriminator, Field, PositiveFloat, Tag, field_validator, model_validator
from typing_extensions import Self

from vqd_scale.core.config import Config, kind_or
from vqd_scale.core.safe_json import Count, Depth, Size
from vqd_scale.nn.sizes import SIZES, SizeName

if TYPE_CHECKING:
    from vqd_scale.nn.network import Network

AttentionBackend = Literal["auto", "xformers", "sdpa", "small_heads", "reference"]
"""Attention implementation. ``auto`` selects xformers on CUDA if its kernels load. On a CPU it selects
`vqd_scale.nn.small_heads` if faster, else the plain formula in half precision over at most 512 keys, else
sdpa."""


TimestepEmbedding = Literal["learned", "sinusoidal"]


NullClass = Literal["learned", "mean"]


class FullyConnected(Config):
    """Two linear layers with a hidden width of ``mlp_ratio`` times the width."""

    kind: Literal["fc"] = "fc"
    mlp_ratio: Count = 4
    """Hidden width, as a multiple of the width."""


class Convolutional(Config):
    """Two 3x3 convolutions over the token grid with a hidden width of ``mlp_ratio`` times the width."""

    kind: Literal["conv"] = "conv"
    mlp_ratio: Count = 2
    """Hidden width, as a multiple of the width."""


FeedForwardConfig = Annotated[FullyConnected | Convolutional, Field(discriminator="kind")]


class TextCondition(Config):
    """Text condition: cross-attention to caption features with ``width`` channels."""

    kind: Literal["text"] = "text"
    width: Size = 512
    """Channels of the caption features; equal to the width of the text tower."""


class ClassCondition(Config):
    """Class condition: int64 labels 0 to ``classes`` - 1; the label ``classes`` stands for "none"."""

    kind: Literal["class"] = "class"
    classes: Size = 1000
    """Number of classes."""
    null_condition: NullClass = "learned"
    """Null condition for guidance: a learned embedding, or the mean of all classes. ``mean`` is needed for
    models that were never trained with "none", such as Microsoft's of ImageNet."""


class NoCondition(Config):
    """Unconditional model: self-attention and feed-forward only."""

    kind: Literal["none"] = "none"


Condition = Annotated[TextCondition | ClassCondition | NoCondition, Field(discriminator="kind")]


class DenoiserConfig(Config):
    """Shape of the image transformer; the defaults are the published size B."""

    kind: Literal["transformer"] = "transformer"
    size: SizeName | None = Field(default=None, exclude=True)
    """Named shape from `vqd_scale.nn.sizes`; the other keys override it. Expanded into the other keys on
    reading."""
    width: Size = 1024
    """Channels of the tokens."""
    layers: Depth = 19
    """Number of transformer blocks."""
    heads: Count = 16
    """Number of attention heads; must divide the width."""
    feed_forward: FeedForwardConfig = FullyConnected()
    """Feed-forward network of each block. Sizes S, ImageNet and FFHQ have ``conv``."""
    condition: Condition = TextCondition()
    """Condition of the network: caption, class or none."""
    timestep_embedding: TimestepEmbedding = "learned"
    """Embedding of the timestep: a learned vector for each, or sinusoids."""
    attention: AttentionBackend = "auto"
    """Attention implementation; ``auto`` selects the fastest for device, dtype and length."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial linear and embedding weights; about 1/sqrt(width) in narrow models."""
    position_grid: tuple[Size, Size] | None = None
    """Rows and columns of the position tables, if different from the token grid. Needed for the published
    16x16 models, which place their 256 tokens row by row into a 32x32 grid."""
    qk_norm: bool = False
    """RMS-normalize each head's queries and keys. Set it if attention logits grow without bound, as in wide
    models."""
    rope_2d: bool = False
    """Rotate queries and keys of self-attention by row and column (2-D RoPE), besides position tables. Set it
    for relative positions; the published models have none."""
    adaln_zero: bool = False
    """Initialize every AdaLN as a plain LayerNorm, whatever the timestep: adaLN-Zero without the gates."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward instead of storing them: less memory, more time."""

    @model_validator(mode="before")
    @classmethod
    def _expand_size(cls, values: Any) -> Any:  # noqa: ANN401 - before validation it may be anything
        if not isinstance(values, Mapping):
            return values
        keys = dict(cast(Mapping[str, Any], values))
        # In strict validation a JSON array is a tuple, but no Python list is.
        if isinstance(grid := keys.get("position_grid"), list):
            keys["position_grid"] = tuple(cast(list[Any], grid))
        for name, size in SIZES.items():
            if keys.get("size") == name:
                return {**size.shape, **keys, "size": None}
        return keys

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "DenoiserConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.rope_2d and self.width // self.heads % 4:
            raise ValueError(
                f"rope_2d turns pairs of features by row and by column: a head's width "
                f"must be a multiple of 4, not {self.width // self.heads}"
            )
        return self

    def build(self, codes: int, grid: tuple[int, int], steps: int) -> "Network":
        """Build the network.

        Args:
            codes: K, the number of codes.
            grid: Rows and columns of tokens.
            steps: T, the number of timesteps.

        Raises:
            UserError: The grid does not fit the network.
        """
        from vqd_scale.nn.denoiser import Denoiser

        return Denoiser(self, codes, grid, steps)


UNET_GROUPS = 8


class UNetConfig(Config):
    """Shape of the U-Net; the defaults are the published size."""

    kind: Literal["unet"] = "unet"
    width: Size = 128
    """Channels of the finest level; a multiple of 8."""
    channel_multipliers: tuple[Count, ...] = Field(default=(1, 2, 4, 8), min_length=1, max_length=16)
    """Channels per level as multiples of the width; each level halves the resolution of the previous one."""
    condition: Annotated[ClassCondition | NoCondition, Field(discriminator="kind")] = NoCondition()
    """Condition of the network: class or none."""

    @field_validator("width")
    @classmethod
    def _groups_divide_width(cls, width: int) -> int:
        if width % UNET_GROUPS:
            raise ValueError(f"{width} is not a multiple of {UNET_GROUPS}, the groups of its normalization")
        return width

    def build(self, codes: int, grid: tuple[int, int], steps: int) -> "Network":
        """Build the network; arguments and errors as in `DenoiserConfig.build`."""
        from vqd_scale.nn.unet import UNet

        return UNet(self, codes, grid, steps)


class AutoregressiveConfig(Config):
    """Shape of the autoregressive transformer; the defaults are the denoiser's size B."""

    width: Size = 1024
    """Channels of the tokens."""
    layers: Depth = 19
    """Number of transformer blocks."""
    heads: Count = 16
    """Number of attention heads; must divide the width."""
    mlp_ratio: Count = 4
    """Hidden width of the feed-forward, as a multiple of the width. A convolution over the grid would leak
    the tokens to predict; a ratio of 18 has as many weights as the 3x3 convolutions of size S."""
    condition: Annotated[TextCondition | NoCondition, Field(discriminator="kind")] = TextCondition()
    """Condition of the network: caption or none."""
    attention: AttentionBackend = "auto"
    """Attention implementation; ``auto`` selects the fastest for device, dtype and length."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial linear and embedding weights; about 1/sqrt(width) in narrow models."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


NetworkConfig: TypeAlias = Annotated[
    Annotated[DenoiserConfig, Tag("transformer")] | Annotated[UNetConfig, Tag("unet")],
    Discriminator(kind_or("transformer")),
]
