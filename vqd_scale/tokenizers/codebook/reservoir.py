"""A fair sample of a stream of vectors that nobody can hold whole."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqd_scale.core.rng import Purpose, uniforms


class Reservoir:
    """So many vectors of a stream, each set of so many equally likely.

    Every vector has a random number by its name, and those with the smallest stay (reservoir sampling with
    random keys; Li, "Reservoir-sampling algorithms of time complexity O(n(1 + log(N/n)))", 1994). So what
    stays depends neither on the order of the stream nor on how many ranks read it.

    Args:
        size: P, how many stay.
        seed: Of the random numbers.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.vectors = torch.zeros(0, 0)
        self.keys = torch.zeros(0, dtype=torch.float64)
        self.seen = 0

    def add(self, vectors: Float[Tensor, "count width"], slots: Int[Tensor, " images"]) -> None:
        """See all vectors of some images, as many of each and in the order of ``slots``.

        Args:
            vectors: The images' vectors, one image after the other.
            slots: The images' own numbers.
        """
        each = len(vectors) // len(slots)
        keys = uniforms(self.seed, Purpose.RESERVOIR, slots, each, dtype=torch.float64).flatten()
        self.seen += len(vectors)
        self._keep(vectors.detach().float(), keys)

    def pooled(self, concatenated: Callable[[Tensor], Tensor]) -> Float[Tensor, "pool width"]:
        """What stays of what all ranks saw, the same on all of them; as many as were seen, if fewer than P.

        Args:
            concatenated: Joins the tensors of all ranks, which have one shape.
        """
        lacking = self.size - len(self.keys)
        filling = self.vectors.new_zeros(lacking, self.vectors.shape[1])
        keys = torch.cat([self.keys, self.keys.new_full((lacking,), torch.inf)])
        vectors = concatenated(torch.cat([self.vectors, filling]))
        keys = concatenated(keys)
        order = keys.argsort(stable=True)[: self.size]
        return vectors[order[keys[order].isfinite()]]

    def _keep(self, vectors: Tensor, keys: Tensor) -> None:
        if len(self.keys):
            vectors, keys = torch.cat([self.vectors, vectors]), torch.cat([self.keys, keys])
        order = keys.argsort(stable=True)[: self.size]
        self.vectors, self.keys = vectors[order], keys[order]
