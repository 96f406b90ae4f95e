"""VQ-AR, the autoregressive peer of the denoiser (VQ-Diffusion, arXiv 2111.14822, section 5.3).

The same block, but for the timestep: tokens in raster order, each predicted from those before it. What the
network reads at a place is the token before it, under the position of the place that it is to predict; at the
first place it reads the mask's row, since nothing is known yet.
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
    """Shape of the autoregressive transformer; the defaults are those of the denoiser's size B."""

    width: PositiveInt = 1024
    layers: PositiveInt = 19
    heads: PositiveInt = 16
    mlp_ratio: PositiveInt = 4
    """Of the width, inside the feed-forward part. A convolution over the grid would see what is to be
    predicted; 18 has as many weights as the 3x3 convolutions of size S."""
    condition: Annotated[TextCondition | NoCondition, Field(discriminator="kind")] = TextCondition()
    attention: AttentionBackend = "auto"
    init_std: PositiveFloat = 0.02
    """Deviation of linear and embedding weights at the start; narrow models want about 1/sqrt(width)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class KVCache(NamedTuple):
    """What a block keeps while tokens come one by one.

    Attributes:
        seen: Of the tokens, room for all places [batch, length, heads, dim], filled up to the present one.
        text: Of the prompt, which stays as it is; ``None`` for an unconditional model.
    """

    seen: KeysValues
    text: KeysValues | None


class CausalBlock(nn.Module):
    """Pre-norm block: causal self-attention, cross-attention, feed-forward."""

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
        """All places at once."""
        normed = self.ln1(x)
        x = x + self.attn1(normed, normed, causal=True)
        return self._informed(x, self._read(text))

    def step(
        self, x: Float[Tensor, "batch 1 width"], place: int, memory: KVCache
    ) -> Float[Tensor, "batch 1 width"]:
        """One place, after those before it; writes into the memory."""
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
        """Room for as many samples and places as ``like`` has, and the prompt's keys and values."""
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
    """Tokens -> logits of p(x_i | x_1 .. x_{i-1}, text) for every place i in raster order.

    Args:
        config: The transformer's shape.
        codes: K, the number of codes.
        grid: Height and width in tokens.
        placement: Where its weights are while it is built.
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
        """What begins with a row for each code: the weights of embedding and head."""
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
        """Predict every token from those before it.

        Args:
            tokens: int64, 0 to K-1, of all places or of the first ones; the last of them is not looked at.
            condition: A caption's features; ``None`` for an unconditional model.
            consume: Takes the head's place, see `vqd_scale.nn.denoiser.Consume`.

        Returns:
            Logits [batch, length, K], or what ``consume`` returned.
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
        """Memories of nothing but the condition, one for each block, to be handed to `step`."""
        positions = self.content_emb.positions()
        like = positions.expand(batch, *positions.shape)
        return [block.memory(condition, like) for block in _blocks(self)]

    @torch.no_grad()
    def step(
        self, tokens: Int[Tensor, "batch length"], place: int, memories: Sequence[KVCache]
    ) -> Float[Tensor, "batch codes"]:
        """What `forward` says of one place, at the cost of one place; places come in order, from 0.

        Args:
            tokens: int64; only the one before the place is looked at.
            place: The place to predict.
            memories: From `memories`; what is read is written into them.

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
