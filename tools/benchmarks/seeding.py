"""AFK-MC² beside k-means++: the cost of their seeds, and the distances that they measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqd_scale.tokenizers.codebook.seeding import CHAIN, Seeding, afkmc2, cost, kmeans_plus_plus

_POINTS, _SEEDS, _WIDTH = 100_000, 64, 16
_RUNS = 10
_SPREAD = 4.0
"""Standard deviation of the mixture's centres, in units of its parts'."""


def benchmark_seeding(rounds: int) -> dict[str, Any]:
    """100,000 points of a mixture of 64 Gaussians, 64 seeds, chains of 200: medians of ten runs or more."""
    runs = max(rounds, _RUNS)
    points = _mixture()
    ours, alternative = [], []
    for seed in range(runs):
        for seeding, rows in ((afkmc2, ours), (kmeans_plus_plus, alternative)):
            rows.append(_measured(seeding, points, seed))
    medians = [
        {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for rows in (ours, alternative)
    ]
    return {
        "ours": medians[0]["seconds"],
        "alternative": medians[1]["seconds"],
        "ratio": medians[1]["seconds"] / medians[0]["seconds"],
        "memory_ratio": None,
        "points": _POINTS,
        "seeds": _SEEDS,
        "chain": CHAIN,
        "runs": runs,
        "cost_ratio": medians[0]["cost"] / medians[1]["cost"],
        "distances_ours": medians[0]["distances"],
        "distances_alternative": medians[1]["distances"],
        "distances_share": medians[0]["distances"] / medians[1]["distances"],
        "costs_ours": [row["cost"] for row in ours],
        "costs_alternative": [row["cost"] for row in alternative],
    }


def _measured(seeding: Callable[[Tensor, int, int], Seeding], points: Tensor, seed: int) -> dict[str, float]:
    began = time.perf_counter()
    found = seeding(points, _SEEDS, seed)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "distances": found.distances, "cost": cost(points, points[found.chosen])}


def _mixture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = _SPREAD * torch.randn(_SEEDS, _WIDTH, generator=generator)
    weights = torch.rand(_SEEDS, generator=generator) + 0.1
    which = torch.multinomial(weights, _POINTS, replacement=True, generator=generator)
    return centres[which] + torch.randn(_POINTS, _WIDTH, generator=generator)
