"""Random numbers generated on the device that uses them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core import rng
from vqd_scale.core.rng import Purpose
from vqd_scale.diffusion.kernels.dispatch import has_kernels


def uniforms(
    seed: int,
    purpose: Purpose,
    slots: Int[Tensor, " batch"],
    count: int,
    *,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch count"]:
    """Return `vqd_scale.core.rng.uniforms`, by a bit-identical Triton kernel where available."""
    if not has_kernels(slots.device):
        return rng.uniforms(seed, purpose, slots, count, draw=draw, dtype=dtype)
    from vqd_scale.diffusion.kernels import philox

    return philox.uniforms(seed, purpose, slots, count, draw=draw, dtype=dtype)
