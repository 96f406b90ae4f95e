"""Seeding and k-means: costs, counts of distances, and refused inputs."""

import statistics
from functools import partial

import pytest
import torch
from benchmarks.seeding import cost, count_distances, kmeans_plus_plus
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.codebook import seeding
from vqd_scale.tokenizers.codebook.seeding import afkmc2, kmeans


def mixture(count: int, components: int, width: int = 8, seed: int = 0) -> Tensor:
    """Return points of separated Gaussians with unequal weights."""
    generator = torch.Generator().manual_seed(seed)
    centers = 10 * torch.randn(components, width, generator=generator)
    weights = torch.rand(components, generator=generator) + 0.1
    component = torch.multinomial(weights, count, replacement=True, generator=generator)
    return centers[component] + torch.randn(count, width, generator=generator)


def by_definition(points: Tensor, seeds: int, numbers: Tensor, chain: int) -> list[int]:
    """Compute AFK-MC² by the paper's algorithm 1, one distance at a time."""

    def squared(a: int, chosen_points: list[int]) -> float:
        return min(float((points[a].double() - points[b].double()).square().sum()) for b in chosen_points)

    count = len(points)
    chosen = [int(numbers[0, 0] * count)]
    to_first = [squared(a, chosen) for a in range(count)]
    q = [0.5 * d / sum(to_first) + 0.5 / count for d in to_first]

    def propose(number: float) -> int:
        total = 0.0
        for place, chance in enumerate(q):
            total += chance
            if number * sum(q) < total:
                return place
        return count - 1

    for row in numbers[1:].tolist():
        x = propose(row[0])
        for step in range(1, chain):
            y = propose(row[step])
            if squared(y, chosen) * q[x] > row[chain + step] * squared(x, chosen) * q[y]:
                x = y
        chosen.append(x)
    return chosen


def test_afkmc2_equals_the_published_algorithm() -> None:
    from vqd_scale.core.rng import Purpose, uniforms

    points = mixture(60, 5, width=3)
    numbers = uniforms(4, Purpose.SEEDING, torch.arange(7), 2 * 9, dtype=torch.float64)
    seeds = afkmc2(points, 7, seed=4, chain=9)
    assert seeds.tolist() == by_definition(points, 7, numbers, 9)


def test_seeds_repeat_exactly_and_differ_between_seeds() -> None:
    points = mixture(500, 8)
    for sample in (afkmc2, kmeans_plus_plus):
        first, again, other_seed = (sample(points, 8, seed).tolist() for seed in (1, 1, 2))
        assert first == again
        assert first != other_seed


def test_short_chain_cost_is_near_kmeans_plus_plus() -> None:
    """A smaller case of `tools/benchmark.py seeding`, which measures n = 100,000."""
    points = mixture(20_000, 24)
    afkmc2_runs = [afkmc2(points, 24, seed) for seed in range(5)]
    kmeans_plus_plus_runs = [kmeans_plus_plus(points, 24, seed) for seed in range(5)]
    medians = [
        statistics.median(cost(points, points[seeds]) for seeds in side)
        for side in (afkmc2_runs, kmeans_plus_plus_runs)
    ]
    assert medians[0] <= 1.5 * medians[1]
    at_random = [
        cost(points, points[torch.randperm(20_000, generator=torch.Generator().manual_seed(s))[:24]])
        for s in range(5)
    ]
    assert medians[0] < 0.5 * statistics.median(at_random)


def test_distance_counts_against_kmeans_plus_plus(monkeypatch: pytest.MonkeyPatch) -> None:
    """n = 20,000, K = 1,024, chain 200: five times more distances than k-means++, as the docs say."""
    afkmc2_count, kmeans_count = count_distances(20_000, seeds=1024, chain=200)
    assert 5 < afkmc2_count / kmeans_count < 5.2
    computed: list[Tensor] = []

    def squared_distances(points: Tensor, centers: Tensor) -> Tensor:
        computed.append(torch.cdist(points.double(), centers.double()).square())
        return computed[-1]

    monkeypatch.setattr(seeding, "squared_distances", squared_distances)
    monkeypatch.setattr("benchmarks.seeding.squared_distances", squared_distances)
    counts: list[int] = []
    for sample in (partial(afkmc2, chain=10), kmeans_plus_plus):
        computed.clear()
        sample(mixture(40, 4), 20, 0)
        counts.append(sum(distances.numel() for distances in computed))
    assert tuple(counts) == count_distances(40, seeds=20, chain=10) == (40 + 10 * 20 * 19 // 2, 40 * 19)


def test_centers_are_finite_and_no_cluster_is_empty() -> None:
    points = mixture(400, 6)
    starts = points[torch.zeros(12, dtype=torch.int64)]
    clusters = kmeans(points, starts)
    assert clusters.centers.isfinite().all()
    assert int(clusters.sizes.min()) >= 1
    assert int(clusters.sizes.sum()) == 400
    seeds = points[afkmc2(points, 12, 0)]
    assert cost(points, kmeans(points, seeds).centers) < cost(points, seeds)


def test_as_many_centers_as_points_gives_zero_cost() -> None:
    points = mixture(9, 3)
    clusters = kmeans(points, points[afkmc2(points, 9, 0)])
    assert clusters.sizes.tolist() == [1] * 9
    assert cost(points, clusters.centers) == pytest.approx(0, abs=1e-6)


def test_more_codes_than_vectors_are_refused() -> None:
    points = mixture(9, 3)
    for refused in (
        lambda: afkmc2(points, 10, 0),
        lambda: kmeans(points, torch.zeros(10, 8)),
    ):
        with pytest.raises(UserError, match="10 codes cannot be placed at 9 vectors"):
            refused()


def test_repeated_and_nonfinite_vectors_are_refused() -> None:
    points = mixture(3, 1).repeat(4, 1)
    with pytest.raises(UserError, match="fewer than 5 different vectors among the 12"):
        kmeans(points, points[:5])
    points[2, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        afkmc2(points, 2, 0)
