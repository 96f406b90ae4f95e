"""Attention over narrow heads on a CPU, by matrix products that are wide where a head is not.

A head of a dozen features gives matrices with a dozen columns, which do not fill a processor's vectors. Here
each tensor lies as [features, positions], so that every product has as many columns as there are positions.
Exponentials are powers of two, which PyTorch computes in a third of the time of `exp`, and what must be
subtracted before one (the logarithm of a row's sum) or after a product enters as one more feature of the
product. Some heads at a time, so that their weights stay in the caches; backward computes the weights again.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TILE = 1 << 18
"""Attention weights that are computed at a time, if a thread's one head has not more: 1 MB in float32."""


def narrow_attention(
    query: Float[Tensor, "batch queries heads dim"],
    key: Float[Tensor, "batch keys heads dim"],
    value: Float[Tensor, "batch keys heads dim"],
) -> Float[Tensor, "batch queries heads dim"]:
    """softmax(q k^T / sqrt(dim)) v; see `vqd_scale.nn.attention.attention`.

    Scores, exponentials and their sums are float32. In a narrower dtype the weights are rounded to it for the
    products that follow, as `torch.nn.functional.scaled_dot_product_attention` does.
    """
    return _Narrow.apply(query, key, value)


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        heads, length, keys = query.shape[2], query.shape[1], key.shape[1]
        query, key, value = (_by_head(tensor) for tensor in (query, key, value))
        scaled, wide_key = _in_powers_of_two(query), key.float()
        out, log_sum = torch.empty_like(query), scaled.new_empty(len(query), 1, length)
        tiles = _Tiles(len(query), length, keys, value)
        for tile in tiles:
            scores = torch.bmm(scaled[tile].transpose(1, 2), wide_key[tile], out=tiles.wide(tile))
            highest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            product = torch.bmm(value[tile], tiles.rounded(tile).transpose(1, 2))
            torch.div(product, total.transpose(1, 2), out=out[tile])
            log_sum[tile] = total.log2_().add_(highest).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, log_sum)
        ctx.heads = heads
        return _by_position(out, heads)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch's context
        *gradients: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, out, log_sum = ctx.saved_tensors
        gradient = _by_head(gradients[0])
        ones = torch.ones_like(key[:, :1])
        scores_left = torch.cat([_in_powers_of_two(query), -log_sum], 1)
        scores_right = torch.cat([key, ones], 1).float()
        # What softmax's backward subtracts from a whole row, in two parts: the second is what the first
        # loses by rounding.
        shift = -(gradient.float() * out).sum(1, keepdim=True)
        rounded = shift.to(gradient.dtype)
        slopes_left = torch.cat([gradient, rounded, (shift - rounded).to(gradient.dtype)], 1)
        slopes_right = torch.cat([value, ones, ones], 1)
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        tiles = _Tiles(len(query), query.shape[-1], key.shape[-1], value)
        for tile in tiles:
            torch.bmm(scores_left[tile].transpose(1, 2), scores_right[tile], out=tiles.wide(tile)).exp2_()
            weights = tiles.rounded(tile)
            torch.bmm(gradient[tile], weights, out=of_value[tile])
            slopes = torch.bmm(slopes_left[tile].transpose(1, 2), slopes_right[tile], out=tiles.more(tile))
            slopes.mul_(weights)
            torch.bmm(key[tile], slopes.transpose(1, 2), out=of_query[tile])
            torch.bmm(query[tile], slopes, out=of_key[tile])
        scale = query.shape[1] ** -0.5
        of_query, of_key = of_query.mul_(scale), of_key.mul_(scale)
        return tuple(_by_position(part, ctx.heads) for part in (of_query, of_key, of_value))  # pyright: ignore[reportReturnType]


def _by_head(tensor: Float[Tensor, "batch positions heads dim"]) -> Float[Tensor, "rows dim positions"]:
    return tensor.permute(0, 2, 3, 1).flatten(0, 1).contiguous()


def _by_position(
    tensor: Float[Tensor, "rows dim positions"], heads: int
) -> Float[Tensor, "batch positions heads dim"]:
    images = tensor.unflatten(0, (-1, heads)).flatten(1, 2)
    turned = torch.empty_like(images.transpose(1, 2), memory_format=torch.contiguous_format)
    # One by one, since PyTorch turns a matrix five times as fast as it turns many.
    for image, into in zip(images, turned, strict=True):
        into.copy_(image.t())
    return turned.unflatten(-1, (heads, -1))


def _in_powers_of_two(query: Float[Tensor, "rows dim positions"]) -> Float[Tensor, "rows dim positions"]:
    """Queries whose products with keys are softmax's exponents to the base 2, in float32."""
    return query.float() * (query.shape[1] ** -0.5 * math.log2(math.e))


class _Tiles:
    """Parts of all images' heads, and room for the weights of one part, which is made once.

    Args:
        rows: Images times heads.
        queries: Positions of a head's queries.
        keys: Positions of its keys.
        like: Of the inputs' dtype and device.
    """

    def __init__(self, rows: int, queries: int, keys: int, like: Tensor) -> None:
        self._rows = rows
        self._size = min(rows, max(torch.get_num_threads(), _TILE // (queries * keys)))
        self._wide = torch.empty(self._size, queries, keys, device=like.device)
        is_wide = like.dtype is torch.float32
        self._rounded = self._wide if is_wide else torch.empty_like(self._wide, dtype=like.dtype)
        self._more = torch.empty_like(self._rounded)

    def __iter__(self) -> Iterator[slice]:
        return (
            slice(start, min(start + self._size, self._rows)) for start in range(0, self._rows, self._size)
        )

    def wide(self, tile: slice) -> Tensor:
        """Room in float32."""
        return self._wide[: tile.stop - tile.start]

    def rounded(self, tile: slice) -> Tensor:
        """What is in that room now, in the inputs' dtype."""
        rounded, wide = self._rounded[: tile.stop - tile.start], self.wide(tile)
        return wide if rounded.dtype is wide.dtype else rounded.copy_(wide)

    def more(self, tile: slice) -> Tensor:
        """Room of the inputs' dtype beside."""
        return self._more[: tile.stop - tile.start]
