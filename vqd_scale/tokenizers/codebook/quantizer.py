"""The codebook of a VQ tokenizer, learned by moving averages of the vectors assigned to each code.

van den Oord et al., "Neural Discrete Representation Learning", appendix A.1. Buffers, not parameters: every
rank sees the sums over all ranks, so they stay equal without belonging to any optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.rng import Purpose, uniforms

Sum = Callable[[Tensor], Tensor]
"""Adds a tensor over all ranks."""

_SMOOTHING = 1e-5

_CHUNK_ELEMENTS = 1 << 24
"""How many distances exist at once: 64 MiB of them, whatever the number of codes."""


def chunks(vectors: Float[Tensor, "count width"], codes: int) -> tuple[Float[Tensor, "part width"], ...]:
    """Vectors in parts so small that a number for each vector and code fits into bounded memory."""
    return vectors.split(max(1, _CHUNK_ELEMENTS // codes))


def nearest_codes(
    vectors: Float[Tensor, "count width"], embedding: Float[Tensor, "codes width"]
) -> Int[Tensor, " count"]:
    """The id of the nearest code of each vector (squared Euclidean distance), found in float32."""
    with torch.autocast(vectors.device.type, enabled=False):
        embedding = embedding.float()
        squared = embedding.square().sum(dim=1)
        return torch.cat(
            [
                torch.addmm(squared, part.float(), embedding.T, alpha=-2).argmin(dim=1)
                for part in chunks(vectors, len(embedding))
            ]
        )


class Codebook(nn.Module):
    """K vectors and the statistics that move them.

    Args:
        codes: K.
        width: The length of a code's vector.
        decay: Share of the old averages that a step keeps.
        revival_share: A code used less than this part of its even share is replaced by a vector of a batch.
    """

    def __init__(self, codes: int, width: int, decay: float, revival_share: float) -> None:
        super().__init__()
        self.decay = decay
        self.revival_share = revival_share
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

    def nearest(self, vectors: Float[Tensor, "count width"]) -> Int[Tensor, " count"]:
        """The id of the nearest code of each vector (squared Euclidean distance)."""
        return nearest_codes(vectors, self.embedding)

    def lookup(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape width"]:
        """The vectors of codes."""
        return nn.functional.embedding(ids, self.embedding)

    @torch.no_grad()
    def initialise(self, vectors: Float[Tensor, "count width"], seed: int) -> None:
        """Place the codes at the k-means centres of encoder outputs.

        One thread, since the order in which threads add would make two equal runs differ.
        """
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        with threadpool_limits(limits=1):
            # The stub knows only n_init's other form, a string.
            means: Any = KMeans(self.codes, n_init=1, max_iter=20, random_state=seed)  # pyright: ignore
            means.fit(vectors.cpu().numpy())
        counts = torch.bincount(torch.from_numpy(means.labels_).long(), minlength=self.codes)
        self.place(torch.from_numpy(means.cluster_centers_), counts)

    @torch.no_grad()
    def place(self, centres: Float[Tensor, "codes width"], sizes: Tensor) -> None:
        """Put the codes at centres, as if so many vectors of a batch had been assigned to each."""
        self.embedding.copy_(centres)
        self.cluster_size.copy_(sizes)
        self.embedding_avg.copy_(self.embedding * self.cluster_size[:, None])

    @torch.no_grad()
    def update(
        self, vectors: Float[Tensor, "count width"], ids: Int[Tensor, " count"], add_over_ranks: Sum
    ) -> None:
        """Move the codes towards the vectors assigned to them on all ranks."""
        sums = torch.zeros_like(self.embedding_avg).index_add_(0, ids, vectors.float())
        counts = torch.bincount(ids, minlength=self.codes).to(sums.dtype)
        gathered = add_over_ranks(torch.cat([sums, counts[:, None]], dim=1))
        self.embedding_avg.lerp_(gathered[:, :-1], 1 - self.decay)
        self.cluster_size.lerp_(gathered[:, -1], 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + _SMOOTHING) / (total + self.codes * _SMOOTHING) * total
        self.embedding.copy_(self.embedding_avg / smoothed[:, None])

    @torch.no_grad()
    def revive(self, candidates: Float[Tensor, "count width"], seed: int, draw: int) -> Int[Tensor, ""]:
        """Replace codes that hardly anything is assigned to by encoder outputs.

        Args:
            candidates: Encoder outputs, the same on every rank.
            seed: The run's seed.
            draw: Which revival of the run this is.

        Returns:
            How many codes were replaced.
        """
        even_share = self.cluster_size.sum() / self.codes
        dead = self.cluster_size < self.revival_share * even_share
        places = torch.zeros(1, dtype=torch.int64, device=candidates.device)
        picked = uniforms(seed, Purpose.CODEBOOK, places, self.codes, draw=draw)[0] * len(candidates)
        replacements = candidates[picked.long()].float()
        self.embedding.copy_(torch.where(dead[:, None], replacements, self.embedding))
        self.cluster_size.copy_(torch.where(dead, even_share, self.cluster_size))
        self.embedding_avg.copy_(torch.where(dead[:, None], replacements * even_share, self.embedding_avg))
        return dead.sum()
