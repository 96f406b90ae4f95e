"""Image transformer of VQ-Diffusion: (noisy tokens, timestep, condition) -> p(x0 | x_t)."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqd_scale.nn.config import ClassCondition, DenoiserConfig, TextCondition
from vqd_scale.nn.layers import (
    AdaptiveLayerNorm,
    Attention,
    ClassEmbedding,
    Hidden,
    ImageEmbedding,
    KeysValues,
    Modulation,
    Rotation,
    Tokens,
    build_feed_forward,
    build_timestep_embedding,
    init_weights,
    modulate,
)
from vqd_scale.nn.param_sharding import gather, shard

Output = TypeVar("Output")
HeadFunction = Callable[[Tensor, Tensor, Tensor], Output]
"""Head replacement: (hidden [batch, length, width], weight [K, width], bias [K]) -> anything.

Under ZeRO-3 a weight exists only inside its own module's forward, so a function that fuses head and objective
must be passed in. The function must return tensors or tuples of tensors, for the engine to find gradients.
"""


PreparedNetwork: TypeAlias = Callable[[Tokens, int], Float[Tensor, "batch length codes"]]
"""Function (tokens, timestep of the whole batch) -> logits under one condition."""


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
        build_attention = functools.partial(
            Attention, width, config.heads, backend=config.attention, qk_norm=config.qk_norm
        )

        def build_timestep_norm() -> AdaptiveLayerNorm:
            return AdaptiveLayerNorm(build_timestep_embedding(config.timestep_embedding, width, steps), width)

        self.condition = condition.kind
        self.ln2: nn.LayerNorm | AdaptiveLayerNorm
        self.ln1 = build_timestep_norm()
        self.attn1 = build_attention(context_width=width)
        if isinstance(condition, TextCondition):
            self.ln1_1 = build_timestep_norm()
            self.attn2 = build_attention(context_width=condition.width)
        if isinstance(condition, ClassCondition):
            classes = ClassEmbedding(condition.classes, width, condition.null_condition)
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
            received = "no condition" if condition is None else "a condition"
            raise ValueError(f"a denoiser with condition '{self.condition}' was given {received}")
        ln1, ln1_1, ln2, context = self.ln1.modulation(t), None, None, None
        if condition is not None and self.condition == "text":
            ln1_1, context = self.ln1_1.modulation(t), self.attn2.keys_values(condition)
        if condition is not None and isinstance(self.ln2, AdaptiveLayerNorm):
            ln2 = self.ln2.modulation(condition)
        return Conditioning(ln1, ln1_1, ln2, context)

    def forward_conditioned(self, x: Hidden, conditioning: Conditioning, rotation: Rotation | None) -> Hidden:
        """Apply the block with a computed conditioning."""
        normed = modulate(x, conditioning.ln1)
        x = x + self.attn1(normed, normed, rotation)
        if conditioning.ln1_1 is not None and conditioning.context is not None:
            x = x + self.attn2.attend(modulate(x, conditioning.ln1_1), conditioning.context)
        return x + self.mlp(self.ln2(x) if conditioning.ln2 is None else modulate(x, conditioning.ln2))

    def forward(
        self, x: Hidden, t: Int[Tensor, " batch"], condition: Tensor | None, rotation: Rotation | None = None
    ) -> Hidden:
        """Apply the block; see `Denoiser.forward` for timesteps and condition."""
        return self.forward_conditioned(x, self.conditioning(t, condition), rotation)


class TokenHead(nn.Linear):
    """Linear map to K logits, replaceable by a `HeadFunction`."""

    def forward(self, input: Hidden, head_function: HeadFunction[Any] | None = None) -> Any:  # noqa: ANN401
        """Return logits [batch, length, K], or ``head_function(hidden, weight, bias)``."""
        if head_function is None:
            return super().forward(input)
        return head_function(input, self.weight, self.bias)


class Denoiser(nn.Module):
    """Network of VQ-Diffusion: noisy tokens -> logits of p(x0 | x_t, condition).

    >>> import torch
    >>> from vqd_scale import Denoiser
    >>> from vqd_scale.nn.config import DenoiserConfig, NoCondition
    >>> config = DenoiserConfig(width=32, layers=2, heads=2, condition=NoCondition())
    >>> denoiser = Denoiser(config, codes=10, grid=(4, 4), steps=100)
    >>> masks = torch.full((1, 16), 10)
    >>> denoiser(masks, torch.tensor([99]), None).shape
    torch.Size([1, 16, 10])

    Args:
        config: Shape of the transformer.
        codes: K, the number of codes; the mask has id K and no logit.
        grid: Height and width in tokens.
        steps: T, the number of timesteps.

    Raises:
        UserError: The configured position tables are too small for the grid.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = (Block,)

    def __init__(self, config: DenoiserConfig, codes: int, grid: tuple[int, int], steps: int) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.steps = steps
        self.content_emb = shard(ImageEmbedding(codes, grid, config.width, config.position_grid))
        self.blocks = nn.ModuleList(shard(Block(config, grid, steps)) for _ in range(config.layers))
        self.norm = shard(nn.LayerNorm(config.width))
        self.head = shard(TokenHead(config.width, codes))
        init_weights(self, config.init_std)
        if config.adaln_zero:
            for module in self.modules():
                if isinstance(module, AdaptiveLayerNorm):
                    with gather(module.linear.parameters()):
                        nn.init.zeros_(module.linear.weight)

    @property
    def code_embeddings(self) -> tuple[Tensor, Tensor]:
        """Weights of embedding and head; the first K rows belong to the codes."""
        return self.content_emb.emb.weight, self.head.weight

    @torch.no_grad()
    def prepare(self, condition: Tensor | None) -> PreparedNetwork:
        """Return a function (tokens, timestep of the whole batch) -> logits under one condition.

        Caches the modulations of all T timesteps, and the keys and values of the text. Not differentiable.
        Later changes of the weights make the cache stale. Logits equal those of `forward` up to rounding.

        Args:
            condition: See `forward`; all weights must be on this device.
        """
        positions = self.content_emb.positions()
        rotation = self.rotation(positions)
        times = torch.arange(self.steps, device=positions.device)
        modules = cast(list[Block], list(self.blocks))
        blocks = [(block, block.conditioning(times, condition)) for block in modules]

        @torch.no_grad()
        def evaluate(tokens: Tokens, t: int) -> Float[Tensor, "batch length codes"]:
            x = self.content_emb.emb(tokens) + positions
            for block, conditioning in blocks:
                x = block.forward_conditioned(x, conditioning.at(t), rotation)
            return self.head(self.norm(x))

        return evaluate

    def rotation(self, like: Tensor) -> Rotation | None:
        """Return the RoPE rotation in the device and dtype of ``like``; ``None`` without ``rope_2d``."""
        if not self.config.rope_2d:
            return None
        return Rotation.of(self.grid, self.config.width // self.config.heads, like)

    def forward(
        self,
        tokens: Tokens,
        t: Int[Tensor, " batch"],
        condition: Tensor | None,
        head_function: HeadFunction[Output] | None = None,
    ) -> Tensor | Output:
        """Predict the clean tokens.

        Args:
            tokens: int64 in 0..K; K is the mask.
            t: int64 in 0..T-1, one per sample.
            condition: Text features [batch, positions, text width]; int64 classes [batch], where the number
                of classes stands for "none"; ``None`` for an unconditional model.
            head_function: Replaces the head, see `HeadFunction`.

        Returns:
            Logits [batch, length, K], or the result of ``head_function``.
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
        return self.head(self.norm(x), head_function)
