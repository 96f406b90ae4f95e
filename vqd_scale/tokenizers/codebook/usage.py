"""How much of a codebook is used: counts of codes, and what is said of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

OFTEN = 10
"""From how many occurrences on VQ-DDM's code calls a code used."""


@dataclass(frozen=True)
class Usage:
    """What counts of codes say.

    Attributes:
        codes: K, how many codes there are.
        tokens: How many tokens were counted.
        used: Share of the codes that occur at all.
        used_often: Share that occur ten times and more, VQ-DDM's definition.
        perplexity: exp of the entropy of the codes' frequencies: how many codes, all equally frequent, would
            be as hard to foretell; K at most.
    """

    codes: int
    tokens: int
    used: float
    used_often: float
    perplexity: float


def usage_of(counts: Int[Tensor, " codes"]) -> Usage:
    """The figures of how often each code occurs."""
    counts = counts.double()
    total = counts.sum()
    shares = counts / total.clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Usage(
        codes=len(counts),
        tokens=int(total),
        used=float((counts > 0).double().mean()),
        used_often=float((counts >= OFTEN).double().mean()),
        perplexity=float(entropy.exp()) if total > 0 else 0.0,
    )
