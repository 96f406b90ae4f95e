"""Codebook usage: statistics of code counts."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

OFTEN = 10
"""Minimum number of occurrences of a used code in VQ-DDM's code."""


@dataclass(frozen=True)
class Usage:
    """Codebook usage statistics.

    Attributes:
        codes: K, the number of codes.
        tokens: Number of tokens counted.
        used: Fraction of codes that occur at least once.
        used_often: Fraction of codes that occur at least ten times (VQ-DDM's definition).
        perplexity: exp of the entropy of the code frequencies (in nats); at most K, reached when all codes
            are equally frequent.
    """

    codes: int
    tokens: int
    used: float
    used_often: float
    perplexity: float


def usage_of(counts: Int[Tensor, " codes"]) -> Usage:
    """Compute usage statistics from code counts."""
    counts = counts.double()
    total = counts.sum()
    frequencies = counts / total.clamp(min=1)
    entropy = -torch.special.xlogy(frequencies, frequencies).sum()
    return Usage(
        codes=len(counts),
        tokens=int(total),
        used=float((counts > 0).double().mean()),
        used_often=float((counts >= OFTEN).double().mean()),
        perplexity=float(entropy.exp()) if total > 0 else 0.0,
    )
