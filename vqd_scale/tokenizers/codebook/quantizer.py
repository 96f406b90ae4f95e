"""VQ codebook, updated by exponential moving averages (EMA) of the vectors assigned to each code.

van den Oord et al., "Neural Discrete Representation Learning", appendix A.1. The state is in buffers, not
parameters. Every rank updates them with the all-reduced sums, so they stay equal without an optimizer.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.rng import Purpose, uniforms

Vectors: TypeAlias = Float[Tensor, "count width"]
CodeIds: TypeAlias = Int[Tensor, " count"]

Sum = Callable[[Tensor], Tensor]
"""All-reduce (sum) of a tensor over all ranks."""

_SMOOTHING = 1e-5

_CHUNK_ELEMENTS = 1 << 24
"""Maximum number of distances in memory at once: 64 MiB in float32, for any number of codes."""


def chunks(vectors: Vectors, codes: int) -> tuple[Float[Tensor, "part width"], ...]:
    """Split vectors into parts whose [part, codes] matrices fit into bounded memory."""
    return vectors.split(max(1, _CHUNK_ELEMENTS // codes))


def nearest_codes(vectors: Vectors, embedding: Float[Tensor, "codes width"]) -> CodeIds:
    """Return the id of each vector's nearest code (squared Euclidean distance), computed in float32."""
    with torch.autocast(vectors.device.type, enabled=False):
        embedding = embedding.float()
        squared = embedding.square().sum(dim=1)
        parts = (part.float() for part in chunks(vectors, len(embedding)))
        return torch.cat([torch.addmm(squared, part, embedding.T, alpha=-2).argmin(dim=1) for part in parts])


class Codebook(nn.Module):
    """K embedding vectors and the EMA statistics that update them.

    Args:
        codes: K.
        width: Dimension of a code's vector.
        decay: EMA decay: weight of the old averages in each update.
        reset_fraction: Dead-code threshold, as a fraction of the mean cluster size. A code below it is
            replaced by an encoder output.
    """

    def __init__(self, codes: int, width: int, decay: float, reset_fraction: float) -> None:
        super().__init__()
        self.decay = decay
        self.reset_fraction = reset_fraction
        self.register_buffer("embedding", torch.zeros(codes, width))
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embedding_avg", torch.zeros(codes, width))
        self.embedding: Tensor
        self.cluster_size: Tensor
        self.embedding_avg: Tensor

    @property
    def codes(self) -> int:
        """K, the number of codes."""
        return self.embedding.shape[0]

    def nearest(self, vectors: Vectors) -> CodeIds:
        """Return the id of each vector's nearest code (squared Euclidean distance)."""
        return nearest_codes(vectors, self.embedding)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """Return the embedding vectors of code ids."""
        return nn.functional.embedding(ids, self.embedding)

    @torch.no_grad()
    def initialize(self, vectors: Vectors, seed: int) -> None:
        """Initialize the codes with the k-means centers of encoder outputs.

        k-means runs in one thread: with several, the order of summation would make two equal runs differ.
        """
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1):
            # The stub accepts only a string for n_init.
            means: Any = KMeans(self.codes, n_init=1, max_iter=20, random_state=seed)  # pyright: ignore
            means.fit(vectors.cpu().numpy())
        counts = torch.bincount(torch.from_numpy(means.labels_).long(), minlength=self.codes)
        self.set_codes(torch.from_numpy(means.cluster_centers_), counts)

    @torch.no_grad()
    def set_codes(self, centers: Float[Tensor, "codes width"], sizes: Tensor) -> None:
        """Set the codes to ``centers``, and the EMA statistics as if each had ``sizes`` vectors."""
        self.embedding.copy_(centers)
        self.cluster_size.copy_(sizes)
        self.embedding_avg.copy_(self.embedding * self.cluster_size[:, None])

    @torch.no_grad()
    def update(
        self, vectors: Vectors, ids: CodeIds, weight: Float[Tensor, " count"], add_over_ranks: Sum
    ) -> None:
        """Update the codes by EMA with the vectors assigned to them on all ranks; a weight is 0 or 1."""
        counted = torch.where(weight[:, None] > 0, vectors.float(), 0.0)
        sums = torch.zeros_like(self.embedding_avg).index_add_(0, ids, counted)
        counts = torch.zeros_like(self.cluster_size).index_add_(0, ids, weight)
        gathered = add_over_ranks(torch.cat([sums, counts[:, None]], dim=1))
        self.embedding_avg.lerp_(gathered[:, :-1], 1 - self.decay)
        self.cluster_size.lerp_(gathered[:, -1], 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + _SMOOTHING) / (total + self.codes * _SMOOTHING) * total
        self.embedding.copy_(self.embedding_avg / smoothed[:, None])

    @torch.no_grad()
    def reset_dead_codes(self, candidates: Vectors, seed: int, draw: int) -> Int[Tensor, ""]:
        """Replace dead codes by encoder outputs.

        Args:
            candidates: Encoder outputs, the same on every rank.
            seed: Seed of the run.
            draw: Index of this reset within the run.

        Returns:
            Number of replaced codes.
        """
        mean_size = self.cluster_size.sum() / self.codes
        dead = self.cluster_size < self.reset_fraction * mean_size
        slots = torch.zeros(1, dtype=torch.int64, device=candidates.device)
        positions = uniforms(seed, Purpose.CODEBOOK, slots, self.codes, draw=draw)[0] * len(candidates)
        replacements = candidates[positions.long()].float()
        self.embedding.copy_(torch.where(dead[:, None], replacements, self.embedding))
        self.cluster_size.copy_(torch.where(dead, mean_size, self.cluster_size))
        self.embedding_avg.copy_(torch.where(dead[:, None], replacements * mean_size, self.embedding_avg))
        return dead.sum()
