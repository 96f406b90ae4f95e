"""VQ-AR, the autoregressive counterpart of the denoiser (VQ-Diffusion, arXiv 2111.14822, section 5.3).

The blocks are those of the denoiser, without the timestep. Tokens are in raster order, each predicted from
the previous ones. The input at position i is the embedding of token i-1 plus the positional embedding of i.
The first position has the mask's row as input.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vqd_scale.nn.config import AutoregressiveConfig, TextCondition
from vqd_scale.nn.denoiser import HeadFunction, Output, TokenHead
from vqd_scale.nn.layers import (
    Attention,
    FeedForward,
    Hidden,
    ImageEmbedding,
    KeysValues,
    Tokens,
    init_weights,
)
from vqd_scale.nn.param_sharding import shard

TextFeatures: TypeAlias = Float[Tensor, "batch positions text_width"]


class KVCache(NamedTuple):
    """KV cache of a block for token-by-token sampling.

    Attributes:
        tokens: Keys and values of the tokens [batch, length, heads, dim], filled up to the current position.
        text: Keys and values of the prompt, constant; ``None`` for an unconditional model.
    """

    tokens: KeysValues
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

    def forward(self, x: Hidden, text: TextFeatures | None) -> Hidden:
        """Apply the block to all positions at once."""
        normed = self.ln1(x)
        x = x + self.attn1(normed, normed, causal=True)
        return self._after_self_attention(x, self._text_keys_values(text))

    def step(self, x: Hidden, position: int, cache: KVCache) -> Hidden:
        """Apply the block to one position, with the previous ones in the KV cache; extends the cache."""
        normed = self.ln1(x)
        for buffer, value in zip(cache.tokens, self.attn1.keys_values(normed), strict=True):
            buffer[:, position] = value[:, 0]
        context = KeysValues(*(buffer[:, : position + 1] for buffer in cache.tokens))
        return self._after_self_attention(x + self.attn1.attend(normed, context), cache.text)

    def new_cache(self, text: TextFeatures | None, like: Hidden) -> KVCache:
        """Allocate a KV cache for the samples and positions of ``like``, with the prompt's part filled."""
        buffer = like.unflatten(-1, (self.attn1.heads, -1))
        tokens = KeysValues(torch.zeros_like(buffer), torch.zeros_like(buffer))
        return KVCache(tokens, self._text_keys_values(text))

    def _text_keys_values(self, text: TextFeatures | None) -> KeysValues | None:
        return self.attn2.keys_values(text) if self.cross and text is not None else None

    def _after_self_attention(self, x: Hidden, text: KeysValues | None) -> Hidden:
        if text is not None:
            x = x + self.attn2.attend(self.ln1_1(x), text)
        return x + self.mlp(self.ln2(x))


class Autoregressive(nn.Module):
    """Network of VQ-AR: tokens -> logits of p(x_i | x_1 .. x_{i-1}, text) for every i in raster order.

    Args:
        config: Shape of the transformer.
        codes: K, the number of codes.
        grid: Height and width in tokens.
    """

    units: ClassVar[tuple[type[nn.Module], ...]] = (CausalBlock,)

    def __init__(self, config: AutoregressiveConfig, codes: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.start_token = codes
        self.content_emb = shard(ImageEmbedding(codes, grid, config.width))
        self.blocks = nn.ModuleList(shard(CausalBlock(config)) for _ in range(config.layers))
        self.norm = shard(nn.LayerNorm(config.width))
        self.head = shard(TokenHead(config.width, codes))
        init_weights(self, config.init_std)

    @property
    def code_embeddings(self) -> tuple[Tensor, Tensor]:
        """Weights of embedding and head; the first K rows belong to the codes."""
        return self.content_emb.emb.weight, self.head.weight

    def forward(
        self,
        tokens: Tokens,
        condition: TextFeatures | None,
        head_function: HeadFunction[Output] | None = None,
    ) -> Tensor | Output:
        """Predict every token from the previous ones.

        Args:
            tokens: int64, 0 to K-1, all positions or a prefix; the last token is ignored.
            condition: Caption features; ``None`` for an unconditional model.
            head_function: Replaces the head, see `vqd_scale.nn.denoiser.HeadFunction`.

        Returns:
            Logits [batch, length, K], or the result of ``head_function``.
        """
        inputs = torch.cat([torch.full_like(tokens[:, :1], self.start_token), tokens[:, :-1]], dim=1)
        x = self.content_emb.emb(inputs) + self.content_emb.positions()[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x), head_function)

    @torch.no_grad()
    def new_caches(self, condition: TextFeatures | None, batch: int) -> list[KVCache]:
        """Allocate one KV cache per block for `step`, holding only the condition."""
        positions = self.content_emb.positions()
        like = positions.expand(batch, *positions.shape)
        return [block.new_cache(condition, like) for block in _blocks(self)]

    @torch.no_grad()
    def step(self, tokens: Tokens, position: int, caches: Sequence[KVCache]) -> Float[Tensor, "batch codes"]:
        """Compute the logits of one position as in `forward`, with KV caches; positions in order, from 0.

        Args:
            tokens: int64; only the token before ``position`` is used.
            position: Position to predict.
            caches: KV caches from `new_caches`, updated in place.

        Returns:
            Logits [batch, K].
        """
        start = torch.full_like(tokens[:, :1], self.start_token)
        inputs = tokens[:, position - 1 : position] if position else start
        x = self.content_emb.emb(inputs) + self.content_emb.positions()[position]
        for block, cache in zip(_blocks(self), caches, strict=True):
            x = block.step(x, position, cache)
        return self.head(self.norm(x))[:, 0]


def _blocks(network: Autoregressive) -> list[CausalBlock]:
    return cast(list[CausalBlock], list(network.blocks))
