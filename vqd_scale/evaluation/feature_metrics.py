"""How good a set of features is beside a real one, beyond the Fréchet distance."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from vqd_scale.core.errors import UserError

_SEED = 2020
"""torch-fidelity's own, so that its figures are reached."""

_CHUNK = 1024
"""Rows of distances that live at once."""


@dataclass(frozen=True)
class MeanAndDeviation:
    """A figure worked out several times: mean and standard deviation."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Neighbourhoods:
    """How far drawn and real features lie among each other.

    Attributes:
        precision: Share of drawn ones within reach of a real one.
        recall: Share of real ones within reach of a drawn one.
        density: How many real ones reach a drawn one, by the number of neighbours that define the reach.
        coverage: Share of real ones with a drawn one within their own reach.
        nearest: float32 [drawn], each drawn one's distance to the nearest real one.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    nearest: Float32[Tensor, " drawn"]


def kernel_distance(
    drawn: Float[Tensor, "drawn features"], real: Float[Tensor, "real features"], *, subsets: int, size: int
) -> MeanAndDeviation:
    """KID: the unbiased squared distance of means under a cubic kernel, over random subsets of both sets.

    Source: Bińkowski et al., "Demystifying MMD GANs", 2018; worked out by torch-fidelity.

    Raises:
        UserError: A set is smaller than a subset.
    """
    from torch_fidelity.metric_kid import (
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    least = min(len(drawn), len(real))
    if least < size:
        raise UserError(f"KID: {least} pictures are too few for subsets of {size}; set kid.size to {least}.")
    found = kid_features_to_metric(
        drawn.cpu(),
        real.cpu(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=_SEED,
        verbose=False,
    )
    return MeanAndDeviation(found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD])


def inception_score(logits: Float[Tensor, "count classes"], splits: int) -> MeanAndDeviation:
    """The exponential of E KL(p(y|x) || p(y)), over parts of the shuffled set.

    Source: Salimans et al., "Improved techniques for training GANs", 2016; worked out by torch-fidelity.

    Raises:
        UserError: There are fewer pictures than parts.
    """
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    if len(logits) < splits:
        raise UserError(
            f"Inception score: {len(logits)} pictures are too few for {splits} parts; lower inception_splits."
        )
    found = isc_features_to_metric(logits.cpu(), splits, True, _SEED)
    return MeanAndDeviation(found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD])


@torch.no_grad()
def neighbourhoods(
    drawn: Float[Tensor, "drawn features"], real: Float[Tensor, "real features"], neighbours: int
) -> Neighbourhoods:
    """Precision and recall, density and coverage; a feature reaches as far as its k-th neighbour in its set.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models", 2019;
    Naeem et al., "Reliable fidelity and diversity metrics for generative models", 2020.

    Args:
        drawn: Of drawn pictures.
        real: Of real ones.
        neighbours: k.

    Raises:
        UserError: A set has no more members than ``neighbours``.
    """
    if min(len(drawn), len(real)) <= neighbours:
        raise UserError(
            f"precision and recall: {min(len(drawn), len(real))} pictures are too few for {neighbours} "
            f"neighbours; lower neighbours or take more pictures."
        )
    drawn, real = drawn.double(), real.double()
    real_reach, drawn_reach = _reach(real, neighbours), _reach(drawn, neighbours)
    reached = torch.zeros(len(drawn), dtype=torch.int64, device=drawn.device)
    nearest = torch.full((len(drawn),), torch.inf, dtype=torch.float32, device=drawn.device)
    recalled: list[Bool[Tensor, " part"]] = []
    covered: list[Bool[Tensor, " part"]] = []
    for part, reach in zip(real.split(_CHUNK), real_reach.split(_CHUNK), strict=True):
        distances = _distances(part, drawn)
        within = distances <= reach[:, None]
        reached += within.sum(dim=0)
        covered.append(within.any(dim=1))
        recalled.append((distances <= drawn_reach).any(dim=1))
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return Neighbourhoods(
        precision=float((reached > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(reached.double().mean()) / neighbours,
        coverage=float(torch.cat(covered).double().mean()),
        nearest=nearest.cpu(),
    )


def _reach(features: Float64[Tensor, "count features"], neighbours: int) -> Float32[Tensor, " count"]:
    """The distance of each to its k-th neighbour; itself is the first of the k + 1 nearest."""
    return torch.cat(
        [_distances(part, features).kthvalue(neighbours + 1).values for part in features.split(_CHUNK)]
    )


def _distances(
    rows: Float64[Tensor, "rows features"], columns: Float64[Tensor, "columns features"]
) -> Float32[Tensor, "rows columns"]:
    # By products of matrices, which are many times faster than differences; in float64, so that the
    # distance of equal features is their rounding's and no neighbour's.
    return torch.cdist(rows, columns, compute_mode="use_mm_for_euclid_dist").float()
