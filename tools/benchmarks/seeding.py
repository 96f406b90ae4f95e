"""AFK-MC² against k-means++: the cost of their seeds, and their numbers of distances."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.tokenizers.codebook.seeding import Centers, Points, afkmc2, squared_distances
from vqd_scale.tokenizers.config import CHAIN

_POINTS, _SEEDS, _WIDTH = 100_000, 64, 16
_RUNS = 10
_CHUNK = 1 << 22
_SPREAD = 4.0
"""Standard deviation of the mixture's centers, relative to that of a component."""


def benchmark_seeding(rounds: int) -> dict[str, Any]:
    """Measure 64 seeds of 100,000 points from 64 Gaussians, chains of 200: medians of ten runs or more."""
    runs = max(rounds, _RUNS)
    points = _mixture()
    afkmc2_rows, kmeans_plus_plus_rows = [], []
    for seed in range(runs):
        for seeding, rows in ((afkmc2, afkmc2_rows), (kmeans_plus_plus, kmeans_plus_plus_rows)):
            rows.append(_measured(seeding, points, seed))
    medians = [
        {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for rows in (afkmc2_rows, kmeans_plus_plus_rows)
    ]
    distances = count_distances(_POINTS, _SEEDS, CHAIN)
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
        "distances_ours": distances[0],
        "distances_alternative": distances[1],
        "distances_share": distances[0] / distances[1],
        "costs_ours": [row["cost"] for row in afkmc2_rows],
        "costs_alternative": [row["cost"] for row in kmeans_plus_plus_rows],
    }


def kmeans_plus_plus(points: Points, seeds: int, seed: int) -> Tensor:
    """Sample seeds by k-means++ (Arthur and Vassilvitskii, 2007, section 2.2); `afkmc2` approximates it.

    Returns:
        Indices of the seeds among the points, int64.
    """
    rows = torch.arange(seeds, device=points.device)
    uniform_numbers = uniforms(seed, Purpose.SEEDING, rows, 1, dtype=torch.float64)[:, 0]
    indices = [int(uniform_numbers[0] * len(points))]
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64, device=points.device)
    for number in range(1, seeds):
        nearest = torch.minimum(nearest, squared_distances(points, points[indices[-1:]])[:, 0])
        cumulative = nearest.cumsum(0)
        index = torch.searchsorted(cumulative, uniform_numbers[number] * cumulative[-1], right=True)
        indices.append(int(index.clamp(max=len(points) - 1)))
    return torch.tensor(indices, device=points.device)


def cost(points: Points, centers: Centers) -> float:
    """Compute the k-means objective: the sum of squared distances of points to their nearest centers."""
    parts = points.split(max(1, _CHUNK // len(centers)))
    return sum(float(squared_distances(part, centers).amin(dim=1).sum()) for part in parts)


def count_distances(points: int, seeds: int, chain: int) -> tuple[int, int]:
    """Return the numbers of distances computed by AFK-MC² and by k-means++."""
    return points + chain * seeds * (seeds - 1) // 2, points * (seeds - 1)


def _measured(seeding: Callable[[Tensor, int, int], Tensor], points: Tensor, seed: int) -> dict[str, float]:
    began = time.perf_counter()
    seeds = seeding(points, _SEEDS, seed)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cost": cost(points, points[seeds])}


def _mixture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = _SPREAD * torch.randn(_SEEDS, _WIDTH, generator=generator)
    weights = torch.rand(_SEEDS, generator=generator) + 0.1
    components = torch.multinomial(weights, _POINTS, replacement=True, generator=generator)
    return centers[components] + torch.randn(_POINTS, _WIDTH, generator=generator)
