"""k-means and its seeding, used to rebuild a codebook from a pool of encoder outputs.

k-means++ (Arthur and Vassilvitskii, 2007) samples each seed with a probability proportional to its squared
distance to the previous seeds, and visits all points for each seed. AFK-MC² (Bachem et al., "Fast and
provably good seedings for k-means", 2016) approximates that distribution by a Markov chain of fixed length
and visits all points once.

For n points, K seeds and chains of length m, AFK-MC² computes n + m K (K - 1) / 2 distances and k-means++
n (K - 1). AFK-MC² is cheaper where n is much larger than m K / 2. At n = 20,000, K = 1,024, m = 200 it is
five times as expensive.
"""

import warnings
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.tokenizers.config import CHAIN

Points: TypeAlias = Float[Tensor, "count width"]
Centers: TypeAlias = Float[Tensor, "clusters width"]

_CHUNK = 1 << 22
"""Maximum number of distances in memory at once."""


class Clusters(NamedTuple):
    """Result of k-means.

    Attributes:
        centers: Cluster centers [clusters, width], float32.
        sizes: Number of points assigned to each center; at least 1.
    """

    centers: Centers
    sizes: Int[Tensor, " clusters"]


def afkmc2(points: Points, seeds: int, seed: int, chain: int = CHAIN) -> Int[Tensor, " seeds"]:
    """Sample seeds by AFK-MC² (Bachem et al., 2016, algorithm 1), reproducibly on any device.

    Args:
        points: Points to cluster.
        seeds: K, the number of seeds.
        seed: Seed of the random numbers.
        chain: m, the length of each Markov chain.

    Returns:
        Indices of the seeds among the points, int64.

    Raises:
        UserError: There are fewer points than seeds, or a point is not finite.
    """
    _check(points, seeds)
    count = len(points)
    rows = torch.arange(seeds, device=points.device)
    # One row per seed: a proposal and an acceptance number for every state of its chain.
    uniform_numbers = uniforms(seed, Purpose.SEEDING, rows, 2 * chain, dtype=torch.float64)
    indices = [int(uniform_numbers[0, 0] * count)]
    squared = squared_distances(points, points[indices])[:, 0]
    proposal = squared / squared.sum().clamp(min=torch.finfo(squared.dtype).tiny) / 2 + 0.5 / count
    cumulative = proposal.cumsum(0)
    for number in range(1, seeds):
        thresholds = uniform_numbers[number, :chain] * cumulative[-1]
        candidates = torch.searchsorted(cumulative, thresholds, right=True).clamp(max=count - 1)
        nearest = squared_distances(points[candidates], points[indices]).amin(dim=1)
        # Weight of a state: squared distance / proposal probability.
        weights = (nearest / proposal[candidates]).tolist()
        state = 0
        for step, accepted in enumerate(uniform_numbers[number, chain + 1 :].tolist(), start=1):
            if weights[step] > accepted * weights[state]:
                state = step
        indices.append(int(candidates[state]))
    return torch.tensor(indices, device=points.device)


def kmeans(points: Points, initial_centers: Centers) -> Clusters:
    """Run Lloyd's iterations from given centers; every resulting center has at least one point.

    One thread: with several, the order of summation would make two equal runs differ.

    Args:
        points: Points to cluster.
        initial_centers: Initial centers.

    Raises:
        UserError: There are more centers than distinct points, or a point is not finite.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    _check(points, len(initial_centers))
    points = points.detach().float().cpu()
    with threadpool_limits(limits=1), warnings.catch_warnings():
        # scikit-learn warns about duplicate points; `_without_empty` handles them.
        warnings.simplefilter("ignore")
        initial = initial_centers.detach().float().cpu().numpy()
        # The stub omits array and number arguments.
        clustering = cast(Any, KMeans)(len(initial), init=initial, n_init=1)
        clustering.fit(points.numpy())
    centers = torch.from_numpy(clustering.cluster_centers_).float()
    return _without_empty(points, centers)


def _without_empty(points: Points, centers: Centers) -> Clusters:
    """Move each center without points to the point farthest from its nearest center."""
    for _ in range(len(centers)):
        nearest, labels = _nearest(points, centers)
        sizes = torch.bincount(labels, minlength=len(centers))
        empty = (sizes == 0).nonzero()[:, 0]
        if not len(empty):
            return Clusters(centers, sizes)
        if not nearest.any():
            break
        centers[empty[0]] = points[nearest.argmax()]
    raise UserError(
        f"codes: there are fewer than {len(centers)} different vectors among the {len(points)} of the pool; "
        f"ask for fewer codes, or take a larger pool."
    )


def _nearest(points: Points, centers: Centers) -> tuple[Float[Tensor, " count"], Int[Tensor, " count"]]:
    parts = points.split(_CHUNK // len(centers) or 1)
    minima = [squared_distances(part, centers).min(dim=1) for part in parts]
    return torch.cat([part.values for part in minima]), torch.cat([part.indices for part in minima])


def squared_distances(points: Points, centers: Centers) -> Float[Tensor, "count clusters"]:
    """Compute squared distances from differences in float64.

    The distance of a point to itself is exactly 0, so no point is sampled twice.
    """
    exact = torch.cdist(points.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return exact.square()


def _check(points: Points, seeds: int) -> None:
    if seeds > len(points):
        raise UserError(
            f"codes: {seeds} codes cannot be placed at {len(points)} vectors; take a larger pool, or ask "
            f"for fewer codes."
        )
    if not bool(points.isfinite().all()):
        raise UserError("pool: a vector of the pool is not finite; check the tokenizer and its images.")
