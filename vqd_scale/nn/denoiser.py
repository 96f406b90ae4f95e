"""Image transformer of VQ-Diffusion: (noisy tokens, timestep, condition) -> p(x0 | x_t)."""

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, cast, overload

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqd_scale.core.config import Config
from vqd_scale.nn.attention import AttentionBackend
from vqd_scale.nn.layers import (
    AdaptiveLayerNorm,
    Attention,
    ClassEmbedding,
    FeedForwardConfig,
    FullyConnected,
    ImageEmbedding,
    KeysValues,
    Modulation,
    NullClass,
    Rotation,
    TimestepEmbedding,
    build_feed_forward,
    build_timestep_embedding,
    initialise,
    modulated,
)
from vqd_scale.nn.param_sharding import HERE, ParamSharding
from vqd_scale.nn.sizes import SIZES, SizeName

Output = TypeVar("Output")
Consume = Callable[[Tensor, Tensor, Tensor], Output]
"""Head replacement: (hidden [batch, length, width], weight [K, width], bias [K]) -> anything.

Under ZeRO-3 a weight exists only inside its own module's forward, so a function that fuses head and objective
must be passed in. The function must return tensors or tuples of tensors, for the engine to find gradients.
"""


class TextCondition(Config):
    """Text condition: cross-attention to caption features with ``width`` channels."""

    kind: Literal["text"] = "text"
    width: PositiveInt = 512


class ClassCondition(Config):
    """Class condition: int64 labels 0 to ``classes`` - 1; the label ``classes`` stands for "none"."""

    kind: Literal["class"] = "class"
    classes: PositiveInt = 1000
    null: NullClass = "learned"
    """Embedding of "none": learned, or the mean of all classes (for models never trained with "none")."""


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
    width: PositiveInt = 1024
    layers: PositiveInt = 19
    heads: PositiveInt = 16
    feed_forward: FeedForwardConfig = FullyConnected()
    condition: Condition = TextCondition()
    timestep_embedding: TimestepEmbedding = "learned"
    attention: AttentionBackend = "auto"
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial linear and embedding weights; about 1/sqrt(width) in narrow models."""
    position_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of the position tables, if different from the token grid. Only for the published 16x16
    models, which place their 256 tokens row by row into a 32x32 grid."""
    qk_norm: bool = False
    """RMS-normalize each head's queries and keys, which keeps attention stable in wide models."""
    rope_2d: bool = False
    """Rotate queries and keys of self-attention by row and column (2-D RoPE), besides position tables."""
    adaln_zero: bool = False
    """Initialize every AdaLN as a plain LayerNorm, whatever the timestep: adaLN-Zero without the gates."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in backward instead of storing them: less memory, more time."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out_the_size(cls, values: Any) -> Any:  # noqa: ANN401 - before validation it may be anything
        if not isinstance(values, Mapping):
            return values
        given = dict(cast(Mapping[str, Any], values))
        for name, size in SIZES.items():
            if given.get("size") == name:
                return {**size.shape, **given, "size": None}
        return given

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


class Conditioning(NamedTuple):
    """Inputs of a block that depend only on timestep and condition.

    Attributes:
        ln1: Timestep modulation before self-attention.
        ln1_1: Timestep modulation before cross-attention; text-conditional models only.
        ln2: Class modulation before the feed-forward; class-conditional models only.
        context: Keys and values of the text for cross-attention.
    """

    ln1: Modulation
    ln1_1: Modulation | None
    ln2: Modulation | None
    context: KeysValues | None

    def at(self, t: int) -> "Conditioning":
        """Select one timestep for the whole batch from the modulations of all timesteps."""
        ln1, ln1_1 = (norm and Modulation(norm.scale[t], norm.shift[t]) for norm in (self.ln1, self.ln1_1))
        return self._replace(ln1=ln1, ln1_1=ln1_1)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention (text only), feed-forward.

    AdaLN applies the timestep before the attentions and the class before the feed-forward.
    """

    def __init__(self, config: DenoiserConfig, grid: tuple[int, int], steps: int) -> None:
        super().__init__()
        width, condition = config.width, config.condition
        attends = functools.partial(
            Attention, width, config.heads, backend=config.attention, normalise=config.qk_norm
        )

        def timed() -> AdaptiveLayerNorm:
            return AdaptiveLayerNorm(build_timestep_embedding(config.timestep_embedding, width, steps), width)

        self.condition = condition.kind
        self.ln2: nn.LayerNorm | AdaptiveLayerNorm
        self.ln1 = timed()
        self.attn1 = attends(context_width=width)
        if isinstance(condition, TextCondition):
            self.ln1_1 = timed()
            self.attn2 = attends(context_width=condition.width)
        if isinstance(condition, ClassCondition):
            classes = ClassEmbedding(condition.classes, width, condition.null)
            self.ln2 = AdaptiveLayerNorm(classes, width)
        else:
            self.ln2 = nn.LayerNorm(width)
        self.mlp = build_feed_forward(config.feed_forward, width, grid)

    def conditioning(self, t: Int[Tensor, " times"], condition: Tensor | None) -> Conditioning:
        """Compute the inputs that depend only on timesteps and condition.

        Raises:
            ValueError: The condition is missing, or the model is unconditional.
        """
        if (condition is None) != (self.condition == "none"):
            given = "no condition" if condition is None else "a condition"
            raise ValueError(f"a denoiser with condition '{self.condition}' was given {given}")
        ln1, ln1_1, ln2, context = self.ln1.modulation(t), None, None, None
        if condition is not None and self.condition == "text":
            ln1_1, context = self.ln1_1.modulation(t), self.attn2.keys_values(condition)
        if condition is not None and isinstance(self.ln2, AdaptiveLayerNorm):
            ln2 = self.ln2.modulation(condition)
        return Conditioning(ln1, ln1_1, ln2, context)

    def updated(
        self, x: Float[Tensor, "batch length width"], told: Conditioning, rotation: Rotation | None
    ) -> Float[Tensor, "batch length width"]:
        """Apply the block with a computed conditioning."""
        normed = modulated(x, told.ln1)
        x = x + self.attn1(normed, normed, rotation)
        if told.ln1_1 is not None and told.context is not None:
            x = x + self.attn2.attend(modulated(x, told.ln1_1), told.context)
        return x + self.mlp(self.ln2(x) if told.ln2 is None else modulated(x, told.ln2))

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "batch length width"]:
        """Apply the block; see `Denoiser.forward` for timesteps and condition."""
        return self.updated(x, self.conditioning(t, condition), rotation)


class TokenHead(nn.Linear):
    """Linear map to K logits, replaceable by a `Consume` function."""

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, consume: Consume[Output]) -> Output: ...
    def forward(self, input: Tensor, consume: Consume[Output] | None = None) -> Tensor | Output:
        """Return logits [batch, length, K], or ``consume(hidden, weight, bias)``."""
        return super().forward(input) if consume is None else consume(input, self.weight, self.bias)


class Denoiser(nn.Module):
    """Network of VQ-Diffusion: noisy tokens -> logits of p(x0 | x_t, condition).

    Args:
        config: Shape of the transformer.
        codes: K, the number of codes; the mask has id K and no logit.
        grid: Height and width in tokens.
        steps: T, the number of timesteps.
        placement: Sharding of the weights during construction.

    Raises:
        UserError: The configured position tables are too small for the grid.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = (Block,)

    def __init__(
        self,
        config: DenoiserConfig,
        codes: int,
        grid: tuple[int, int],
        steps: int,
        placement: ParamSharding = HERE,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.steps = steps
        placed = placement.placed
        self.content_emb = placed(ImageEmbedding(codes, grid, config.width, config.position_grid))
        self.blocks = nn.ModuleList(placed(Block(config, grid, steps)) for _ in range(config.layers))
        self.norm = placed(nn.LayerNorm(config.width))
        self.head = placed(TokenHead(config.width, codes))
        initialise(self, config.init_std, placement)
        if config.adaln_zero:
            for module in self.modules():
                if isinstance(module, AdaptiveLayerNorm):
                    with placement.whole(module.linear.parameters()):
                        nn.init.zeros_(module.linear.weight)

    @property
    def code_tables(self) -> tuple[Tensor, Tensor]:
        """Weights of embedding and head; the first K rows belong to the codes."""
        return self.content_emb.emb.weight, self.head.weight

    @torch.no_grad()
    def prepared(self, condition: Tensor | None) -> "PreparedDenoiser":
        """Precompute everything that the steps of sampling under one condition share.

        Args:
            condition: See `forward`.
        """
        return PreparedDenoiser(self, condition)

    def rotation(self, like: Tensor) -> Rotation | None:
        """Return the RoPE rotation in the device and dtype of ``like``; ``None`` without ``rope_2d``."""
        if not self.config.rope_2d:
            return None
        return Rotation.of(self.grid, self.config.width // self.config.heads, like)

    @overload
    def forward(
        self, tokens: Int[Tensor, "batch length"], t: Int[Tensor, " batch"], condition: Tensor | None
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        consume: Consume[Output],
    ) -> Output: ...
    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        consume: Consume[Output] | None = None,
    ) -> Tensor | Output:
        """Predict the clean tokens.

        Args:
            tokens: int64 in 0..K; K is the mask.
            t: int64 in 0..T-1, one per sample.
            condition: Text features [batch, positions, text width]; int64 classes [batch], where the number
                of classes stands for "none"; ``None`` for an unconditional model.
            consume: Replaces the head, see `Consume`.

        Returns:
            Logits [batch, length, K], or the result of ``consume``.
        """
        x = self.content_emb(tokens)
        rotation = self.rotation(x)
        for block in self.blocks:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, t, condition, rotation, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x = block(x, t, condition, rotation)
        normed = self.norm(x)
        return self.head(normed) if consume is None else self.head(normed, consume)


class PreparedDenoiser:
    """Denoiser under one condition, for many steps with one timestep each.

    Caches the modulations of all T timesteps, and the keys and values of the text. Not differentiable. Weight
    changes after construction make the cache stale.

    Args:
        denoiser: Network with all weights on this device.
        condition: See `Denoiser.forward`.
    """

    def __init__(self, denoiser: Denoiser, condition: Tensor | None) -> None:
        self._denoiser = denoiser
        self._positions = denoiser.content_emb.positions()
        self._rotation = denoiser.rotation(self._positions)
        times = torch.arange(denoiser.steps, device=self._positions.device)
        self._blocks = [(block, block.conditioning(times, condition)) for block in _blocks(denoiser)]

    @torch.no_grad()
    def __call__(self, tokens: Int[Tensor, "batch length"], t: int) -> Float[Tensor, "batch length codes"]:
        """Compute logits, equal to those of `Denoiser.forward` up to rounding.

        Args:
            tokens: int64 in 0..K, one row per row of the condition.
            t: Timestep of the whole batch, 0 to T-1.
        """
        x = self._denoiser.content_emb.emb(tokens) + self._positions
        for block, conditioning in self._blocks:
            x = block.updated(x, conditioning.at(t), self._rotation)
        return self._denoiser.head(self._denoiser.norm(x))


def _blocks(denoiser: Denoiser) -> list[Block]:
    return cast(list[Block], list(denoiser.blocks))
