"""Fréchet distance between two sets of feature vectors, each modeled as a Gaussian.

With Inception features it is FID (Heusel et al., "GANs trained by a two time-scale update rule", 2017). The
functions here accept features of any extractor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter matrix of feature vectors; float64 on the CPU.

    Attributes:
        count: Number of vectors.
        mean: Mean vector, float64 [features].
        scatter: Sum over vectors of the outer product of their deviations from the mean, float64 [features,
            features]. Stored instead of the covariance because it is additive.
    """

    count: int
    mean: Float64[Tensor, " features"]
    scatter: Float64[Tensor, "features features"]

    @classmethod
    def empty(cls, dimension: int) -> "FeatureStatistics":
        """Return the statistics of zero vectors, as the start of a running update."""
        zeros = torch.zeros(dimension, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(dimension, dimension, dtype=torch.float64))

    @classmethod
    def of(cls, features: Float[Tensor, "count features"]) -> "FeatureStatistics":
        """Compute the statistics of at least one vector, of any float dtype and device."""
        values = features.detach().to("cpu", torch.float64)
        mean = values.mean(dim=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    @property
    def covariance(self) -> Float64[Tensor, "features features"]:
        """Unbiased covariance, float64; needs at least two vectors."""
        return self.scatter / (self.count - 1)

    def merge(self, added: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of the union of both sets, at least one of which must be nonempty.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
        """
        count = self.count + added.count
        difference = added.mean - self.mean
        mean = self.mean + difference * (added.count / count)
        between = torch.outer(difference, difference) * (self.count * added.count / count)
        return FeatureStatistics(count, mean, self.scatter + added.scatter + between)

    def over_ranks(self, world: World) -> "FeatureStatistics":
        """Return the statistics over all ranks, on every rank; collective, and a rank may have no vectors."""
        count = int(world.sum(torch.tensor(self.count, device=world.device)))
        mean = world.sum((self.mean * self.count).to(world.device)).cpu() / count
        difference = self.mean - mean
        scatter = self.scatter + self.count * torch.outer(difference, difference)
        return FeatureStatistics(count, mean, world.sum(scatter.to(world.device)).cpu())


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Compute the squared Fréchet distance |m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1^½ C2 C1^½)^½), at least 0.

    The last trace is the sum of the singular values of C1^½ C2^½, which avoids the square root of a
    nonsymmetric matrix.

    Raises:
        UserError: The sets differ in dimension, contain nonfinite values, or have no more vectors than
            dimensions (a singular covariance makes the distance meaningless).
    """
    dimension = len(first.mean)
    for statistics in (first, second):
        if len(statistics.mean) != dimension:
            raise UserError(
                f"Fréchet distance: features of {len(statistics.mean)} and of {dimension} dimensions cannot "
                "be compared; take both sets from the same extractor."
            )
        if statistics.count <= dimension:
            raise UserError(
                f"Fréchet distance: {statistics.count} samples are too few for features of {dimension} "
                f"dimensions; give at least {dimension + 1}."
            )
        if not bool(statistics.scatter.isfinite().all()):
            raise UserError(
                "Fréchet distance: the features hold values that are not finite; check the images."
            )
    overlap = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    distance = (first.mean - second.mean).square().sum() + spread
    # Rounding can make the distance of equal sets slightly negative.
    return max(distance.item(), 0.0)


def _square_root(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Return the symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
