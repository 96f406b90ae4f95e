"""Reduction of a tokenizer to the codes that a dataset uses.

A large codebook has many codes that no image of a dataset uses; a denoiser would learn them for nothing. The
published VQ-Diffusion models of COCO, CUB-200 and CC keep 2,886 of 8,192 codes, the ImageNet model 973 of
16,384. A *map* is an int64 vector with the reduced id of every full code. It has one of two forms:

    full code         0  1  2  3  4
    count             0  7  0  2  0
    map, "bucket"     0  1  0  2  0    id 0: all unused codes; 1, 2, ...: the used codes in their order
    map, "nearest"    0  0  1  1  1    0, 1, ...: the used codes; unused: the nearest one's id

With "nearest", the tokens of the counted dataset decode as before, and a new image loses little.
"""

from pathlib import Path
from typing import TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import read_tensors
from vqd_scale.tokenizers.base import Images, ImageTokenizer, Latents, SamplingKey, TokenGrid, check_tokens
from vqd_scale.tokenizers.codebook.quantizer import nearest_codes
from vqd_scale.tokenizers.config import Unused

FullCodes: TypeAlias = Int[Tensor, " full"]


class Reduced(ImageTokenizer):
    """Tokenizer with a reduced codebook; the map is part of its state.

    The unused bucket, id 0, decodes as the first code in it, as in the published models. The initial map,
    before weights are loaded, keeps the last codes.

    Args:
        full: Tokenizer with all codes.
        codes: K, the number of reduced ids, including the unused bucket.
        unused: Treatment of unused codes.

    Raises:
        UserError: ``codes`` is not between 1 and the number of full codes.
    """

    def __init__(self, full: ImageTokenizer, codes: int, unused: Unused = "bucket") -> None:
        super().__init__()
        if not 0 < codes <= full.codes:
            raise UserError(f"codes: give 1 to {full.codes}, the codes of the tokenizer, not {codes}.")
        self.codes = codes
        self.factor = full.factor
        self.full = full
        last = torch.arange(full.codes) - (full.codes - codes)
        self.register_buffer("map", last.clamp(min=0))
        self.map: Tensor
        if unused == "nearest":
            # With "nearest" an unused code can precede the used code of the same id, so `inverse` fails.
            self.register_buffer("kept", torch.arange(full.codes - codes, full.codes))
        self.register_load_state_dict_post_hook(_check_loaded)

    def encode(self, images: Images, sampling_key: SamplingKey | None = None) -> TokenGrid:
        """Encode images in [-1, 1] to reduced codes; see `ImageTokenizer`."""
        return self.map[self.full.encode(images, sampling_key)]

    def decode(self, tokens: TokenGrid) -> Images:
        """Decode reduced codes to float32 images in about [-1, 1]."""
        check_tokens(tokens, self.codes)
        return self.full.decode(self.full_codes[tokens])

    @property
    def full_codes(self) -> Int[Tensor, " codes"]:
        """Full code that each reduced code decodes as."""
        return cast(Tensor, self.kept) if hasattr(self, "kept") else inverse(self.map)

    def code_vectors(self) -> Float[Tensor, "codes width"]:
        """Return the vector that each reduced code decodes as."""
        return self.full.code_vectors()[self.full_codes]

    def latents(self, images: Images) -> Latents:
        """Return the vectors that the full tokenizer quantizes."""
        return self.full.latents(images)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Set the compute dtype; see `Autoencoder.compute_in`."""
        self.full.compute_in(dtype)


def _check_loaded(module: nn.Module, _: object) -> None:
    if isinstance(module, Reduced):
        check_map(module.map, module.full.codes, module.codes, "map")
        ids = torch.arange(module.codes, device=module.map.device)
        if not torch.equal(module.map[module.full_codes.clamp(0, len(module.map) - 1)], ids):
            raise UserError("kept: is no inverse of the map; the tokenizer's bundle is damaged.")


def map_from_counts(counts: FullCodes, min_count: int = 1) -> FullCodes:
    """Compute the map with an unused bucket.

    Args:
        counts: Number of occurrences of each code of the full codebook.
        min_count: Minimum number of occurrences of a used code.

    Raises:
        UserError: No code is used, or all are.
    """
    used = counts >= min_count
    if not used.any() or used.all():
        raise UserError(
            f"codes: {int(used.sum())} of {len(used)} codes occur at least {min_count} times: nothing to "
            f"reduce; count on more data or choose another threshold."
        )
    return torch.where(used, used.long().cumsum(0), 0)


def map_to_nearest(counts: FullCodes, vectors: Float[Tensor, "full width"], min_count: int = 1) -> FullCodes:
    """Compute the map without a bucket: an unused code gets the id of the nearest used code.

    Args:
        counts: Number of occurrences of each code of the full codebook.
        vectors: Vector that each code decodes as.
        min_count: Minimum number of occurrences of a used code.

    Raises:
        UserError: No code is used, or all are.
    """
    is_used = map_from_counts(counts, min_count) > 0
    return nearest_codes(vectors, vectors[is_used]).where(~is_used, is_used.long().cumsum(0) - 1)


def used_codes(counts: FullCodes, min_count: int = 1) -> Int[Tensor, " codes"]:
    """Return the full codes that are used, in their order."""
    return (counts >= min_count).nonzero()[:, 0]


def inverse(map: FullCodes) -> Int[Tensor, " codes"]:
    """Return the full code of every reduced id: the first one where several share an id."""
    full = torch.arange(len(map), device=map.device)
    first = full.new_full((int(map.max()) + 1,), len(map))
    return first.scatter_reduce(0, map, full, "amin")


def check_map(map: FullCodes, full: int, codes: int, source: str) -> None:
    """Check that a map assigns ``full`` codes to all of the ids 0..codes - 1.

    Raises:
        UserError: The map has another dtype, shape, length or range, or an id without a code.
    """
    if map.dtype != torch.int64 or map.ndim != 1:
        raise UserError(f"{source}: expected one row of int64, found {map.dtype} {list(map.shape)}.")
    if len(map) != full:
        raise UserError(
            f"{source}: maps {len(map)} codes, but the tokenizer has {full}; take the map of this tokenizer."
        )
    if int(map.min()) != 0 or int(map.max()) + 1 != codes:
        raise UserError(
            f"{source}: leads to the ids {int(map.min())}..{int(map.max())}, but the model has {codes} "
            f"codes, 0..{codes - 1}; take the map that the model was trained with."
        )
    unassigned = codes - len(map.unique())
    if unassigned:
        raise UserError(
            f"{source}: no code leads to {unassigned} of the ids 0..{codes - 1}; the map is damaged."
        )


def read_map(path: Path) -> FullCodes:
    """Read a map: a safetensors or ``.pt`` file (as published) with a single tensor.

    Raises:
        UserError: The file is missing or damaged, or its content is not a map.
    """
    tensors = list(read_tensors(path).values())
    if len(tensors) != 1:
        raise UserError(f"{path}: expected a file of one tensor, a map of codes, found {len(tensors)}.")
    map = tensors[0].long() if not tensors[0].is_floating_point() else tensors[0]
    check_map(map, map.numel(), int(map.max()) + 1 if map.numel() else 0, str(path))
    return map
