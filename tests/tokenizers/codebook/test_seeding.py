"""Trap 40 of the reference: seeding and k-means, their costs, and what is refused."""

import statistics

import pytest
import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.codebook.seeding import afkmc2, cost, kmeans, kmeans_plus_plus


def mixture(count: int, components: int, width: int = 8, seed: int = 0) -> Tensor:
    """Gaussians of unequal weight, well apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(components, width, generator=generator)
    weights = torch.rand(components, generator=generator) + 0.1
    which = torch.multinomial(weights, count, replacement=True, generator=generator)
    return centres[which] + torch.randn(count, width, generator=generator)


def by_the_book(points: Tensor, seeds: int, numbers: Tensor, chain: int) -> list[int]:
    """AFK-MC² as the paper's algorithm 1 writes it, one distance at a time."""

    def squared(a: int, others: list[int]) -> float:
        return min(float((points[a].double() - points[b].double()).square().sum()) for b in others)

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


def test_afkmc2_is_the_papers_algorithm() -> None:
    from vqd_scale.core.rng import Purpose, uniforms

    points = mixture(60, 5, width=3)
    numbers = uniforms(4, Purpose.SEEDING, torch.arange(7), 2 * 9, dtype=torch.float64)
    found = afkmc2(points, 7, seed=4, chain=9)
    assert found.chosen.tolist() == by_the_book(points, 7, numbers, 9)
    assert found.distances == 60 + 9 * (1 + 2 + 3 + 4 + 5 + 6)


def test_seeds_repeat_exactly_and_differ_between_seeds() -> None:
    points = mixture(500, 8)
    for seeding in (afkmc2, kmeans_plus_plus):
        first, again, other = (seeding(points, 8, seed).chosen.tolist() for seed in (1, 1, 2))
        assert first == again
        assert first != other


def test_trap_40_a_short_chain_costs_little_more_than_kmeans_plus_plus() -> None:
    """The figure of n = 100,000 is `tools/benchmark.py seeding`'s; here one that a test can afford."""
    points = mixture(20_000, 24)
    ours = [afkmc2(points, 24, seed) for seed in range(5)]
    theirs = [kmeans_plus_plus(points, 24, seed) for seed in range(5)]
    medians = [
        statistics.median(cost(points, points[found.chosen]) for found in side) for side in (ours, theirs)
    ]
    assert medians[0] <= 1.5 * medians[1]
    at_random = [
        cost(points, points[torch.randperm(20_000, generator=torch.Generator().manual_seed(s))[:24]])
        for s in range(5)
    ]
    assert medians[0] < 0.5 * statistics.median(at_random)
    assert ours[0].distances < theirs[0].distances / 4


def test_where_it_loses_is_known_from_the_counts() -> None:
    """n = 20,000, K = 1,024, chain 200: five times more distances than k-means++, as the docs say."""
    n, k, m = 20_000, 1024, 200
    ratio = (n + m * k * (k - 1) // 2) / (n * (k - 1))
    assert 5 < ratio < 5.2
    points = mixture(40, 4)
    assert afkmc2(points, 20, 0, chain=10).distances == 40 + 10 * 20 * 19 // 2
    assert kmeans_plus_plus(points, 20, 0).distances == 40 * 19


def test_trap_40_centres_are_finite_and_no_cluster_is_empty() -> None:
    points = mixture(400, 6)
    starts = points[torch.zeros(12, dtype=torch.int64)]
    found = kmeans(points, starts)
    assert found.centres.isfinite().all()
    assert int(found.sizes.min()) >= 1
    assert int(found.sizes.sum()) == 400
    seeds = points[afkmc2(points, 12, 0).chosen]
    assert cost(points, kmeans(points, seeds).centres) < cost(points, seeds)


def test_trap_40_as_many_centres_as_points_is_each_point_its_own() -> None:
    points = mixture(9, 3)
    found = kmeans(points, points[afkmc2(points, 9, 0).chosen])
    assert found.sizes.tolist() == [1] * 9
    assert cost(points, found.centres) == pytest.approx(0, abs=1e-6)


def test_trap_40_more_codes_than_vectors_are_refused() -> None:
    points = mixture(9, 3)
    for refused in (
        lambda: afkmc2(points, 10, 0),
        lambda: kmeans_plus_plus(points, 10, 0),
        lambda: kmeans(points, torch.zeros(10, 8)),
    ):
        with pytest.raises(UserError, match="10 codes cannot be placed at 9 vectors"):
            refused()


def test_vectors_that_repeat_or_are_not_finite_are_refused() -> None:
    points = mixture(3, 1).repeat(4, 1)
    with pytest.raises(UserError, match="fewer than 5 different vectors among the 12"):
        kmeans(points, points[:5])
    points[2, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        afkmc2(points, 2, 0)
