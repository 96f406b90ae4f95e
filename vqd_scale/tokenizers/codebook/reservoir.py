"""Uniform random sample of a stream of vectors too large for memory."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.rng import Purpose, uniforms


class Reservoir:
    """Reservoir sample of P vectors of a stream, uniform over all subsets of that size.

    Each vector has a random key derived from its slot; the P smallest keys are kept (reservoir sampling with
    random keys; Li, "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))", 1994). The sample
    depends neither on the order of the stream nor on the number of ranks.

    Args:
        size: P, the number of vectors kept.
        seed: Seed of the random keys.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.vectors = torch.zeros(0, 0)
        self.keys = torch.zeros(0, dtype=torch.float64)

    def add(self, vectors: Float[Tensor, "count width"], slots: Int[Tensor, " images"]) -> None:
        """Add the vectors of some images, in the order of ``slots`` and equally many per image.

        Args:
            vectors: Vectors of the images, image by image.
            slots: Unique index of each image.
        """
        per_image = len(vectors) // len(slots)
        keys = uniforms(self.seed, Purpose.RESERVOIR, slots, per_image, dtype=torch.float64).flatten()
        vectors = vectors.detach().float()
        if len(self.keys):
            vectors, keys = torch.cat([self.vectors, vectors]), torch.cat([self.keys, keys])
        order = keys.argsort(stable=True)[: self.size]
        self.vectors, self.keys = vectors[order], keys[order]

    def gather(self, all_gather: Callable[[Tensor], Tensor]) -> Float[Tensor, "pool width"]:
        """Return the sample over all ranks, equal on all of them; fewer than P vectors if fewer were seen.

        Args:
            all_gather: All-gather that concatenates the ranks' tensors, which have equal shapes.
        """
        missing = self.size - len(self.keys)
        padding = self.vectors.new_zeros(missing, self.vectors.shape[1])
        keys = torch.cat([self.keys, self.keys.new_full((missing,), torch.inf)])
        vectors = all_gather(torch.cat([self.vectors, padding]))
        keys = all_gather(keys)
        order = keys.argsort(stable=True)[: self.size]
        return vectors[order[keys[order].isfinite()]]
