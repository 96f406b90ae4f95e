"""VQ-AR, the autoregressive counterpart of the denoiser (VQ-Diffusion, arXiv 2111.14822, section 5.3).

The blocks are those of the denoiser, without the timestep. Tokens are in raster order, each predicted from
the previous ones. The input at position i is the embedding of token i-1 plus the positional embedding of i.
The first position has the mask's row as input.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, NamedTuple, cast, overload

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from vqd_scale.core.config import Config
from vqd_scale.nn.attention import AttentionBackend
from vqd_scale.nn.denoiser import Consume, NoCondition, Output, TextCondition, TokenHead
from vqd_scale.nn.layers import Attention, FeedForward, ImageEmbedding, KeysValues, initialise
from vqd_scale.nn.param_sharding import HERE, ParamSharding


class AutoregressiveConfig(Config):
    """Shape of the autoregressive transformer; the defaults are the denoiser's size B."""

    width: PositiveInt = 1024
    layers: PositiveInt = 19
    heads: PositiveInt = 16
    mlp_ratio: PositiveInt = 4
    """Hidden width of the feed-forward, as a multiple of the width. A convolution over the grid would leak
    the tokens to predict; a ratio of 18 has as many weights as the 3x3 convolutions of size S."""
    condition: Annotated[TextCondition | NoCondition, Field(discriminator="kind")] = TextCondition()
    attention: AttentionBackend = "auto"
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial linear and embedding weights; about 1/sqrt(width) in narrow models."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class KVCache(NamedTuple):
    """KV cache of a block for token-by-token sampling.

    Attributes:
        seen: Keys and values of the tokens [batch, length, heads, dim], filled up to the current position.
        text: Keys and values of the prompt, constant; ``None`` for an unconditional model.
    """

    seen: KeysValues
    text: KeysValues | None


class CausalBlock(nn.Module):
    """Pre-norm transformer block: causal self-attention, cross-attention, feed-forward."""

    def __init__(self, config: AutoregressiveConfig) -> None:
        super().__init__()
        width = config.width
        self.ln1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, config.heads, width, config.attention)
        self.cross = isinstance(config.condition, TextCondition)
        if isinstance(config.condition, TextCondition):
            self.ln1_1 = nn.LayerNorm(width)
            self.attn2 = Attention(width, config.heads, config.condition.width, config.attention)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, config.mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "batch length width"],
        text: Float[Tensor, "batch positions text_width"] | None,
    ) -> Float[Tensor, "batch length width"]:
        """Apply the block to all positions at once."""
        normed = self.ln1(x)
        x = x + self.attn1(normed, normed, causal=True)
        return self._informed(x, self._read(text))

    def step(
        self, x: Float[Tensor, "batch 1 width"], place: int, memory: KVCache
    ) -> Float[Tensor, "batch 1 width"]:
        """Apply the block to one position, with the previous ones in the KV cache; extends the cache."""
        normed = self.ln1(x)
        for room, value in zip(memory.seen, self.attn1.keys_values(normed), strict=True):
            room[:, place] = value[:, 0]
        upto = KeysValues(*(room[:, : place + 1] for room in memory.seen))
        return self._informed(x + self.attn1.attend(normed, upto), memory.text)

    def memory(
        self,
        text: Float[Tensor, "batch positions text_width"] | None,
        like: Float[Tensor, "batch length width"],
    ) -> KVCache:
        """Allocate a KV cache for the samples and positions of ``like``, with the prompt's part filled."""
        room = like.unflatten(-1, (self.attn1.heads, -1))
        return KVCache(KeysValues(torch.zeros_like(room), torch.zeros_like(room)), self._read(text))

    def _read(self, text: Float[Tensor, "batch positions text_width"] | None) -> KeysValues | None:
        return self.attn2.keys_values(text) if self.cross and text is not None else None

    def _informed(
        self, x: Float[Tensor, "batch length width"], text: KeysValues | None
    ) -> Float[Tensor, "batch length width"]:
        if text is not None:
            x = x + self.attn2.attend(self.ln1_1(x), text)
        return x + self.mlp(self.ln2(x))


class Autoregressive(nn.Module):
    """Network of VQ-AR: tokens -> logits of p(x_i | x_1 .. x_{i-1}, text) for every i in raster order.

    Args:
        config: Shape of the transformer.
        codes: K, the number of codes.
        grid: Height and width in tokens.
        placement: Sharding of the weights during construction.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = (CausalBlock,)

    def __init__(
        self, config: AutoregressiveConfig, codes: int, grid: tuple[int, int], placement: ParamSharding = HERE
    ) -> None:
        super().__init__()
        self.start = codes
        placed = placement.placed
        self.content_emb = placed(ImageEmbedding(codes, grid, config.width))
        self.blocks = nn.ModuleList(placed(CausalBlock(config)) for _ in range(config.layers))
        self.norm = placed(nn.LayerNorm(config.width))
        self.head = placed(TokenHead(config.width, codes))
        initialise(self, config.init_std, placement)

    @property
    def code_tables(self) -> tuple[Tensor, Tensor]:
        """Weights of embedding and head; the first K rows belong to the codes."""
        return self.content_emb.emb.weight, self.head.weight

    @overload
    def forward(self, tokens: Int[Tensor, "batch length"], condition: Tensor | None) -> Tensor: ...
    @overload
    def forward(
        self, tokens: Int[Tensor, "batch length"], condition: Tensor | None, consume: Consume[Output]
    ) -> Output: ...
    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        condition: Float[Tensor, "batch positions text_width"] | None,
        consume: Consume[Output] | None = None,
    ) -> Tensor | Output:
        """Predict every token from the previous ones.

        Args:
            tokens: int64, 0 to K-1, all positions or a prefix; the last token is ignored.
            condition: Caption features; ``None`` for an unconditional model.
            consume: Replaces the head, see `vqd_scale.nn.denoiser.Consume`.

        Returns:
            Logits [batch, length, K], or the result of ``consume``.
        """
        before = torch.cat([torch.full_like(tokens[:, :1], self.start), tokens[:, :-1]], dim=1)
        x = self.content_emb.emb(before) + self.content_emb.positions()[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, condition)
        normed = self.norm(x)
        return self.head(normed) if consume is None else self.head(normed, consume)

    @torch.no_grad()
    def memories(
        self, condition: Float[Tensor, "batch positions text_width"] | None, batch: int
    ) -> list[KVCache]:
        """Allocate one KV cache per block for `step`, holding only the condition."""
        positions = self.content_emb.positions()
        like = positions.expand(batch, *positions.shape)
        return [block.memory(condition, like) for block in _blocks(self)]

    @torch.no_grad()
    def step(
        self, tokens: Int[Tensor, "batch length"], place: int, memories: Sequence[KVCache]
    ) -> Float[Tensor, "batch codes"]:
        """Compute the logits of one position as in `forward`, with KV caches; positions in order, from 0.

        Args:
            tokens: int64; only the token before ``place`` is used.
            place: Position to predict.
            memories: KV caches from `memories`, updated in place.

        Returns:
            Logits [batch, K].
        """
        before = tokens[:, place - 1 : place] if place else torch.full_like(tokens[:, :1], self.start)
        x = self.content_emb.emb(before) + self.content_emb.positions()[place]
        for block, memory in zip(_blocks(self), memories, strict=True):
            x = block.step(x, place, memory)
        return self.head(self.norm(x))[:, 0]


def _blocks(network: Autoregressive) -> list[CausalBlock]:
    return cast(list[CausalBlock], list(network.blocks))
