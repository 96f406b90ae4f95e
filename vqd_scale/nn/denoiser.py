"""The image transformer of VQ-Diffusion: from noisy tokens, a timestep and a condition to p(x0 | x_t)."""

from collections.abc import Callable
from typing import Annotated, Literal, TypeVar, overload

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from vqd_scale.core.config import Config
from vqd_scale.nn.attention import AttentionBackend
from vqd_scale.nn.layers import (
    AdaptiveLayerNorm,
    Attention,
    FeedForwardConfig,
    FullyConnected,
    ImageEmbedding,
    TimestepEmbedding,
    build_feed_forward,
)

Output = TypeVar("Output")
Consume = Callable[[Tensor, Tensor, Tensor], Output]
"""What may take the head's place: (hidden [batch, length, width], weight [K, width], bias [K]) -> anything.

Under ZeRO-3 a weight exists only inside its own module's forward, so what fuses the head with the objective
must be handed in. What it returns must be tensors, or tuples of them, for the engine to find the gradients.
"""


class TextCondition(Config):
    """Cross-attention to a caption's features of this width."""

    kind: Literal["text"] = "text"
    width: PositiveInt = 512


class ClassCondition(Config):
    """One of so many classes, int64 labels; the number of classes itself is the label that says "none"."""

    kind: Literal["class"] = "class"
    classes: PositiveInt = 1000


class NoCondition(Config):
    """An unconditional model: self-attention and feed-forward only."""

    kind: Literal["none"] = "none"


Condition = Annotated[TextCondition | NoCondition, Field(discriminator="kind")]


class DenoiserConfig(Config):
    """Shape of the image transformer; the defaults are the published size B."""

    kind: Literal["transformer"] = "transformer"
    width: PositiveInt = 1024
    layers: PositiveInt = 19
    heads: PositiveInt = 16
    feed_forward: FeedForwardConfig = FullyConnected()
    condition: Condition = TextCondition()
    timestep: TimestepEmbedding = "learned"
    attention: AttentionBackend = "auto"
    initial_deviation: PositiveFloat = 0.02
    """Deviation of linear and embedding weights at the start; narrow models want about 1/sqrt(width)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "DenoiserConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Block(nn.Module):
    """Pre-norm block: self-attention and cross-attention under AdaLN, then feed-forward."""

    def __init__(self, config: DenoiserConfig, grid: tuple[int, int], steps: int) -> None:
        super().__init__()
        width = config.width
        self.ln1 = AdaptiveLayerNorm(width, steps, config.timestep)
        self.attn1 = Attention(width, config.heads, width, config.attention)
        self.cross = isinstance(config.condition, TextCondition)
        if isinstance(config.condition, TextCondition):
            self.ln1_1 = AdaptiveLayerNorm(width, steps, config.timestep)
            self.attn2 = Attention(width, config.heads, config.condition.width, config.attention)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = build_feed_forward(config.feed_forward, width, grid)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        t: Int[Tensor, " batch"],
        text: Float[Tensor, "batch positions text_width"] | None,
    ) -> Float[Tensor, "batch length width"]:
        """One residual block."""
        normed = self.ln1(x, t)
        x = x + self.attn1(normed, normed)
        if self.cross:
            x = x + self.attn2(self.ln1_1(x, t), text)
        return x + self.mlp(self.ln2(x))


class CodeHead(nn.Linear):
    """The linear map to K logits, which can be consumed instead of computed (see `Consume`)."""

    @overload
    def forward(self, input: Tensor) -> Tensor: ...
    @overload
    def forward(self, input: Tensor, consume: Consume[Output]) -> Output: ...
    def forward(self, input: Tensor, consume: Consume[Output] | None = None) -> Tensor | Output:
        """Logits [batch, length, K], or whatever ``consume`` makes of hidden states, weight and bias."""
        return super().forward(input) if consume is None else consume(input, self.weight, self.bias)


class Denoiser(nn.Module):
    """Noisy tokens -> logits of p(x0 | x_t, text), the network of VQ-Diffusion.

    Args:
        config: The transformer's shape.
        codes: K, the number of codes; the mask has id K and no logit.
        grid: Height and width in tokens.
        steps: T, the number of timesteps.
    """

    def __init__(self, config: DenoiserConfig, codes: int, grid: tuple[int, int], steps: int) -> None:
        super().__init__()
        self.content_emb = ImageEmbedding(codes, grid, config.width)
        self.blocks = nn.ModuleList(Block(config, grid, steps) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = CodeHead(config.width, codes)
        self._initialise(config.initial_deviation)

    def _initialise(self, deviation: float) -> None:
        """Normal weights and zero biases; convolutions keep torch's default, as in the published recipe."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def start_from_codebook(self, vectors: Float[Tensor, "codes code_width"], deviation: float) -> None:
        """Let codes that look alike start alike: embeddings and head as random rotations of the code vectors.

        Only a start, for runs too short to find out from the pictures; every weight is trained as before.

        Args:
            vectors: The tokenizer's code vectors, no wider than the network.
            deviation: Standard deviation of the weights along each rotated direction.
        """
        whitened = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0)
        for weight in (self.content_emb.emb.weight[:-1], self.head.weight):
            rotation = nn.init.orthogonal_(torch.empty(vectors.shape[1], weight.shape[1]))
            weight.copy_(whitened @ rotation * deviation)

    @overload
    def forward(
        self, tokens: Int[Tensor, "batch length"], t: Int[Tensor, " batch"], text: Tensor | None
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        text: Tensor | None,
        consume: Consume[Output],
    ) -> Output: ...
    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        t: Int[Tensor, " batch"],
        text: Float[Tensor, "batch positions text_width"] | None,
        consume: Consume[Output] | None = None,
    ) -> Tensor | Output:
        """Predict the clean tokens.

        Args:
            tokens: int64 in 0..K, K is the mask.
            t: int64 in 0..T-1, each sample's own.
            text: The condition's features; ``None`` for an unconditional model.
            consume: Takes the head's place, see `Consume`.

        Returns:
            Logits [batch, length, K], or what ``consume`` returned.
        """
        x = self.content_emb(tokens)
        for block in self.blocks:
            x = block(x, t, text)
        normed = self.norm(x)
        return self.head(normed) if consume is None else self.head(normed, consume)
