# pyright: basic, reportArgumentType=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false
# Kernel parameters are Triton tensors inside and PyTorch tensors outside: no annotation fits both.
"""Triton kernel that computes `vqd_scale.core.rng.uniforms`, bit-identical.

PyTorch operations launch about a hundred kernels for the same numbers.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.rng import Purpose, key_of, words_of

_BLOCKS = 128
_WORD = tl.constexpr(0xFFFFFFFF)


def uniforms(
    seed: int,
    purpose: Purpose,
    slots: Int[Tensor, " batch"],
    count: int,
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch count"]:
    """Return uniform numbers in [0, 1), a row per slot; arguments and errors as in `vqd_scale.core.rng`."""
    low, high = key_of(seed, purpose)
    return _generate(slots.contiguous(), high << 32 | low, draw, count, words_of(dtype))


@torch.library.custom_op("vqd_scale::uniforms", mutates_args=())
def _generate(slots: Tensor, key: int, draw: int, count: int, words_per_number: int) -> Tensor:
    out = _empty(slots, key, draw, count, words_per_number)
    blocks = triton.cdiv(words_per_number * count, 4)
    if out.numel():
        with torch.cuda.device_of(slots):
            _uniforms[(len(slots), triton.cdiv(blocks, _BLOCKS))](
                out, slots, count, key, draw, words_per_number=words_per_number, blocks=_BLOCKS
            )
    return out


@_generate.register_fake
def _empty(slots: Tensor, key: int, draw: int, count: int, words_per_number: int) -> Tensor:
    del key, draw
    dtype = torch.float32 if words_per_number == 1 else torch.float64
    return torch.empty(len(slots), count, dtype=dtype, device=slots.device)


@triton.jit
def _uniforms(
    out: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    key: tl.int64,
    draw: tl.int64,
    words_per_number: tl.constexpr,
    blocks: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    block = tl.program_id(1) * blocks + tl.arange(0, blocks)
    zeros = block * 0
    words = tl.philox(
        key,
        block.to(tl.uint32),
        (zeros + draw).to(tl.uint32),
        (zeros + (slot & _WORD)).to(tl.uint32),
        (zeros + (slot >> 32)).to(tl.uint32),
    )
    first = out + row * count
    if words_per_number == 1:
        for number in tl.static_range(4):
            index = 4 * block + number
            tl.store(first + index, (words[number] >> 8).to(tl.float32) * 2.0**-24, mask=index < count)
    else:
        for number in tl.static_range(2):
            index = 2 * block + number
            high, low = words[2 * number] >> 5, words[2 * number + 1] >> 6
            value = (high.to(tl.float64) * 67108864.0 + low.to(tl.float64)) * 2.0**-53
            tl.store(first + index, value, mask=index < count)
