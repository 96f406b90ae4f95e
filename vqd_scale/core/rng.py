"""Stateless (counter-based) random numbers: a function of (seed, purpose, slot, draw, position).

There is no generator state to save or restore. A resumed run, another number of ranks and another batch
composition all use the same numbers.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One
implementation serves numpy arrays and torch tensors on any device: 64-bit integer arithmetic wraps
identically everywhere, so the results are bit-identical. `vqd_scale.diffusion.kernels.philox` computes the
same bits in one kernel launch on a GPU.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from jaxtyping import Float, Int

from vqd_scale.core.arrays import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Words = TypeVar("Words", NDArray[np.int64], "Tensor")

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """Use of a random number; purposes never share numbers. Values must not change: runs depend on them."""

    SCENE = 1
    CAPTION = 2
    SHARD_ORDER = 3
    LANE_ORDER = 4
    CROP = 5
    CAPTION_CHOICE = 6
    CAPTION_DROPOUT = 7
    TIMESTEP = 8
    CORRUPTION = 9
    SAMPLING = 10
    PRIOR = 11
    UNMASKING = 12
    INITIALIZATION = 13
    CODEBOOK = 14
    EVALUATION = 15
    GUMBEL = 16
    ENCODING = 17
    SEEDING = 18
    RESERVOIR = 19
    PHOTOGRAPH = 20
    CLASS_ORDER = 21
    CLASS_MEMBERS = 22


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[int, int]
) -> tuple[Words, Words, Words, Words]:
    """Compute Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: Four int64 arrays or tensors of the same shape with unsigned 32-bit values.
        key: Two unsigned 32-bit values.

    Returns:
        Four int64 arrays or tensors of the same shape with unsigned 32-bit values.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap into the sign bit; shift and mask recover the unsigned halves.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(
    seed: int,
    purpose: Purpose,
    slots: Int[Tensor, " batch"],
    count: int,
    *,
    draw: int = 0,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch count"]:
    """Return uniform random numbers in [0, 1), one row per slot, on the device of ``slots``.

    Args:
        seed: Seed of the run, 0 to 2**32 - 1.
        purpose: Use of the numbers.
        slots: int64, global index of each sample (not the index in the batch), >= 0.
        count: Number of random numbers per slot (positions).
        draw: Index of the draw within the purpose, such as the sampling step; 0 to 2**32 - 1.
        dtype: float32 (24 random bits, the default) or float64 (53 random bits).

    Returns:
        Tensor of ``dtype``, [batch, count].

    Raises:
        ValueError: ``dtype`` has low precision, which would distort the tail of a distribution.
    """
    import torch

    dtype = dtype or torch.float32
    each = words_of(dtype)
    blocks = torch.arange(-(-each * count // 4), device=slots.device)
    low, high, position = torch.broadcast_tensors(slots[:, None] & _MASK, slots[:, None] >> 32, blocks)
    counter = (position, torch.full_like(position, draw), low, high)
    words = torch.stack(philox4x32(counter, key_of(seed, purpose)), dim=-1).flatten(1)[:, : each * count]
    words = words.view(len(slots), count, each)
    if dtype is torch.float32:
        return (words[..., 0] >> 8).to(torch.float32) * 2.0**-24
    return ((words[..., 0] >> 5) * 2**26 + (words[..., 1] >> 6)).to(torch.float64) * 2.0**-53


def sample_codes(
    weights: Float[Tensor, "*shape states"], uniform: Float[Tensor, "*shape"]
) -> Int[Tensor, "*shape"]:
    """Sample one state per uniform number by inverse CDF in float64; ``weights`` may be unnormalized.

    NaN weights give some state as well, so that an invalid index cannot end in a device-side assertion; the
    caller checks the weights.
    """
    import torch

    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    # Rounding must not select a state past the last one of nonzero probability.
    target = torch.minimum(uniform.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)


def integers(seed: int, purpose: Purpose, slot: int, count: int, *, draw: int = 0) -> NDArray[np.int64]:
    """Return random 32-bit words for one slot, as numpy int64 in [0, 2**32), shape [count]."""
    blocks = np.arange(-(-count // 4), dtype=np.int64)
    constant = np.zeros_like(blocks)
    counter = (blocks, constant + draw, constant + (slot & _MASK), constant + (slot >> 32))
    return np.stack(philox4x32(counter, key_of(seed, purpose)), axis=-1).reshape(-1)[:count]


def permutation(seed: int, purpose: Purpose, slot: int, length: int) -> NDArray[np.int64]:
    """Return a random permutation of ``range(length)``, independent for each ``slot`` (an epoch, a lane)."""
    words = integers(seed, purpose, slot, 2 * length).reshape(length, 2)
    # Sort keys of 63 random bits; the stable sort keeps ties deterministic.
    return np.argsort((words[:, 0] >> 1 << 32) | words[:, 1], kind="stable")


def key_of(seed: int, purpose: Purpose) -> tuple[int, int]:
    """Return the Philox key of a seed and a purpose.

    Raises:
        ValueError: The seed is not an unsigned 32-bit value.
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed {seed}: a seed lies between 0 and 2**32 - 1")
    return seed, int(purpose)


def words_of(dtype: torch.dtype) -> int:
    """Return the number of 32-bit words per uniform number of ``dtype``.

    Raises:
        ValueError: ``dtype`` has low precision, which would distort the tail of a distribution.
    """
    import torch

    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform numbers are float32 or float64, not {dtype}")
    return dtype.itemsize // 4
