"""Feature metrics: KID, Inception score, precision and recall, density and coverage."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress

_SEED = 2020
"""torch-fidelity's default seed, so results are identical to torch-fidelity's."""

_CHUNK = 1024
"""Rows of the distance matrix in memory at once."""


@dataclass(frozen=True)
class NeighborMetrics:
    """Nearest-neighbor metrics of generated and real features.

    The k-NN ball of a feature is centered at it, with the distance to its k-th neighbor in its own set as the
    radius.

    Attributes:
        precision: Fraction of generated features inside the k-NN ball of a real feature.
        recall: Fraction of real features inside the k-NN ball of a generated feature.
        density: Mean number of real k-NN balls that contain a generated feature, divided by k.
        coverage: Fraction of real features with a generated feature inside their k-NN ball.
        nearest: Distance of each generated feature to the nearest real feature, float32 [samples].
    """

    precision: float
    recall: float
    density: float
    coverage: float
    nearest: Float32[Tensor, " samples"]


def check_subsets(count: int, size: int) -> None:
    """Raise a `UserError` if the smaller set has too few images for subsets of KID."""
    if count < size:
        raise UserError(f"KID: {count} images are too few for subsets of {size}; set kid.size to {count}.")


def check_splits(count: int, splits: int) -> None:
    """Raise a `UserError` if there are fewer images than splits of the Inception score."""
    if count < splits:
        raise UserError(
            f"Inception score: {count} images are too few for {splits} parts; lower inception_splits."
        )


def check_neighbors(count: int, neighbors: int) -> None:
    """Raise a `UserError` if the smaller set has no more images than neighbors."""
    if count <= neighbors:
        raise UserError(
            f"precision and recall: {count} images are too few for {neighbors} neighbors; lower neighbors or "
            f"take more images."
        )


def kernel_distance(
    samples: Float[Tensor, "samples features"],
    real: Float[Tensor, "real features"],
    *,
    subsets: int,
    size: int,
) -> dict[str, float]:
    """Compute ``mean`` and ``deviation`` over random subsets of KID, the unbiased MMD² under a cubic kernel.

    Source: Bińkowski et al., "Demystifying MMD GANs", 2018; computed by torch-fidelity.

    Raises:
        UserError: A set is smaller than ``size``.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    check_subsets(min(len(samples), len(real)), size)
    metrics = kid_features_to_metric(
        samples.cpu(), real.cpu(), kid_subsets=subsets, kid_subset_size=size, rng_seed=_SEED, verbose=False
    )
    return {"mean": metrics[KEY_METRIC_KID_MEAN], "deviation": metrics[KEY_METRIC_KID_STD]}


def inception_score(logits: Float[Tensor, "count classes"], splits: int) -> dict[str, float]:
    """Compute ``mean`` and ``deviation`` of exp(E KL(p(y|x) || p(y))) over splits of the shuffled set.

    Source: Salimans et al., "Improved techniques for training GANs", 2016; computed by torch-fidelity.

    Raises:
        UserError: There are fewer images than splits.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    check_splits(len(logits), splits)
    metrics = isc_features_to_metric(logits.cpu(), splits, True, _SEED)
    return {"mean": metrics[KEY_METRIC_ISC_MEAN], "deviation": metrics[KEY_METRIC_ISC_STD]}


@torch.no_grad()
def neighbor_metrics(
    samples: Float[Tensor, "samples features"], real: Float[Tensor, "real features"], neighbors: int
) -> NeighborMetrics:
    """Compute precision and recall, density and coverage, and nearest-neighbor distances.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019;
    Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Args:
        samples: Features of generated images.
        real: Features of real images.
        neighbors: Number of neighbors k.

    Raises:
        UserError: A set has no more than ``neighbors`` members.
    """
    check_neighbors(min(len(samples), len(real)), neighbors)
    samples, real = samples.double(), real.double()
    real_radii, sample_radii = _radii(real, neighbors), _radii(samples, neighbors)
    ball_counts = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    nearest = torch.full((len(samples),), torch.inf, dtype=torch.float32, device=samples.device)
    is_recalled: list[Bool[Tensor, " part"]] = []
    is_covered: list[Bool[Tensor, " part"]] = []
    chunks = list(zip(real.split(_CHUNK), real_radii.split(_CHUNK), strict=True))
    for part, radii in progress(chunks, "precision and recall", len(chunks)):
        distances = _distances(part, samples)
        is_inside = distances <= radii[:, None]
        ball_counts += is_inside.sum(dim=0)
        is_covered.append(is_inside.any(dim=1))
        is_recalled.append((distances <= sample_radii).any(dim=1))
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return NeighborMetrics(
        precision=float((ball_counts > 0).double().mean()),
        recall=float(torch.cat(is_recalled).double().mean()),
        density=float(ball_counts.double().mean()) / neighbors,
        coverage=float(torch.cat(is_covered).double().mean()),
        nearest=nearest.cpu(),
    )


def _radii(features: Float64[Tensor, "count features"], neighbors: int) -> Float32[Tensor, " count"]:
    """Return each feature's distance to its k-th neighbor; the feature itself is the nearest of k + 1."""
    chunks = features.split(_CHUNK)
    return torch.cat(
        [
            _distances(chunk, features).kthvalue(neighbors + 1).values
            for chunk in progress(chunks, "nearest neighbors", len(chunks))
        ]
    )


def _distances(
    rows: Float64[Tensor, "rows features"], columns: Float64[Tensor, "columns features"]
) -> Float32[Tensor, "rows columns"]:
    # Matrix products are many times faster than differences. float64 keeps the rounding error of equal
    # features' distance far below the distance to a neighbor.
    return torch.cdist(rows, columns, compute_mode="use_mm_for_euclid_dist").float()
