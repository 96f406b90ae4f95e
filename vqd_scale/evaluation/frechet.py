"""The Fréchet distance between two sets of feature vectors, each taken for a Gaussian.

On Inception features it is called FID (Heusel et al., "GANs trained by a two time-scale update rule", 2017);
here the features are anybody's, and the distance is called by its own name.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World


@dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter of feature vectors; float64 on the CPU.

    Attributes:
        count: How many vectors.
        mean: float64 [features].
        scatter: float64 [features, features], the sum over vectors of the outer product of their deviations
            from the mean. Kept instead of the covariance because it is what adds up.
    """

    count: int
    mean: Float64[Tensor, " features"]
    scatter: Float64[Tensor, "features features"]

    @classmethod
    def empty(cls, dimension: int) -> "FeatureStatistics":
        """The statistics of no vectors at all, to start a stream with."""
        zeros = torch.zeros(dimension, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(dimension, dimension, dtype=torch.float64))

    @classmethod
    def of(cls, features: Float[Tensor, "count features"]) -> "FeatureStatistics":
        """The statistics of at least one vector, of any floating type and device."""
        values = features.detach().to("cpu", torch.float64)
        mean = values.mean(dim=0)
        deviations = values - mean
        return cls(len(values), mean, deviations.T @ deviations)

    @property
    def covariance(self) -> Float64[Tensor, "features features"]:
        """The unbiased covariance, float64; needs two vectors or more."""
        return self.scatter / (self.count - 1)

    def update(self, features: Float[Tensor, "count features"]) -> "FeatureStatistics":
        """The statistics after these vectors as well; at least one."""
        return self.merge(FeatureStatistics.of(features))

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979. At least one of the two sets must hold a vector.
        """
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    def over_ranks(self, world: World) -> "FeatureStatistics":
        """The statistics of what all ranks hold together, on every rank; a rank may hold nothing."""
        count = int(world.sum(torch.tensor(self.count, device=world.device)))
        mean = world.sum((self.mean * self.count).to(world.device)).cpu() / count
        difference = self.mean - mean
        scatter = self.scatter + self.count * torch.outer(difference, difference)
        return FeatureStatistics(count, mean, world.sum(scatter.to(world.device)).cpu())


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Fréchet distance |m1 - m2|² + tr(C1) + tr(C2) - 2 tr((C1^½ C2 C1^½)^½), at least 0.

    The last trace is the sum of the singular values of C1^½ C2^½, which needs no square root of a matrix that
    is not symmetric.

    Raises:
        UserError: The sets differ in dimension, hold no more vectors than dimensions (their covariance would
            be singular and the distance meaningless), or hold values that are not finite.
    """
    for statistics in (first, second):
        _check(statistics, dimension=len(first.mean))
    overlap = torch.linalg.svdvals(_square_root(first.covariance) @ _square_root(second.covariance)).sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    distance = (first.mean - second.mean).square().sum() + spread
    # Rounding can leave equal sets a hair below zero.
    return max(distance.item(), 0.0)


def _check(statistics: FeatureStatistics, dimension: int) -> None:
    if len(statistics.mean) != dimension:
        raise UserError(
            f"Fréchet distance: features of {len(statistics.mean)} and of {dimension} dimensions cannot be "
            "compared; take both sets from the same extractor."
        )
    if statistics.count <= dimension:
        raise UserError(
            f"Fréchet distance: {statistics.count} samples are too few for features of {dimension} "
            f"dimensions; give at least {dimension + 1}."
        )
    if not bool(statistics.scatter.isfinite().all()):
        raise UserError("Fréchet distance: the features hold values that are not finite; check the images.")


def _square_root(matrix: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
