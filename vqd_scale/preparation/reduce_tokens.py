"""Codebook reduction of a tokenizer, and remapping of token shards without encoding images again.

Codes are counted over token shards, the tokenizer is reduced to the codes that occur
(`vqd_scale.tokenizers.codebook.reduction`), and the shards are mapped to the reduced codes. Fingerprints of
both bundles tie a map to its tokenizer; the map of another tokenizer is rejected.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field, TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress_bar
from vqd_scale.data.shards.decode import BadSample, decode_array
from vqd_scale.data.shards.shard_index import Shard, ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, write_shard_set
from vqd_scale.models.bundle import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from vqd_scale.preparation.tokenize_shards import TokenSetMeta, code_counts, tokenizer_config_digest
from vqd_scale.tokenizers.autoencoder import Autoencoder
from vqd_scale.tokenizers.codebook.reduction import (
    Reduced,
    check_map,
    map_from_counts,
    map_to_nearest,
    used_codes,
)
from vqd_scale.tokenizers.config import FullTokenizerConfig, ReducedConfig, Unused

_TOKENS = "tokens.npy"
_CPU = torch.device("cpu")


def count_codes(tokens: Location) -> Int[Tensor, " codes"]:
    """Count the occurrences of each code in a token dataset.

    Raises:
        UserError: The dataset does not exist, has no tokens, or has a token that is not a code of its
            tokenizer.
    """
    shards = ShardSet.open(tokens)
    codes = TokenSetMeta.of(shards).codes
    counts = np.zeros(codes, np.int64)
    with progress_bar("count codes", shards.count, unit="sample") as bar:
        for shard in shards.shards:
            counts += code_counts(shard, codes)
            bar.update(shard.count)
    return torch.from_numpy(counts)


class _Counts(TypedDict):
    """File of counts, as far as it is read back."""

    tokenizer: str
    counts: list[Annotated[int, Field(ge=0, lt=1 << 63)]]


def read_counts(path: Path, tokenizer: Path) -> Int[Tensor, " codes"]:
    """Read the file of counts that ``reduce_codebook.py count`` writes.

    Raises:
        UserError: The file cannot be read, or counts the codes of another tokenizer.
    """
    content = read_json(path, "file of counts (reduce_codebook.py count writes it)", TypeAdapter(_Counts))
    if content["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{path}: these are counts of another tokenizer's codes; count on shards of {tokenizer}."
        )
    return torch.tensor(content["counts"])


def reduce_tokenizer(
    full: Path, out: Path, counts: Int[Tensor, " codes"], min_count: int = 1, unused: Unused = "bucket"
) -> Reduced:
    """Write the bundle of a tokenizer reduced to the codes that occur.

    Args:
        full: Bundle of the tokenizer with all codes.
        out: Output bundle.
        counts: Number of occurrences of each code; see `count_codes`.
        min_count: Minimum number of occurrences of a used code.
        unused: Treatment of unused codes.

    Raises:
        UserError: The counts do not match the tokenizer's codes, the tokenizer is already reduced, or no code
            is unused.
    """
    tokenizer = _full(full)
    if len(counts) != tokenizer.codes:
        raise UserError(
            f"{full}: has {tokenizer.codes} codes, but those of {len(counts)} were counted; count on shards "
            f"of this tokenizer."
        )
    if unused == "bucket":
        return _save(tokenizer, out, map_from_counts(counts, min_count), unused)
    map = map_to_nearest(counts, tokenizer.code_vectors(), min_count)
    return _save(tokenizer, out, map, unused, used_codes(counts, min_count))


def reduce_by_map(full: Path, out: Path, map: Int[Tensor, " full"]) -> Reduced:
    """Write the bundle of a tokenizer reduced by a given map, such as a published one.

    Raises:
        UserError: The map is for another number of codes, or the tokenizer is already reduced.
    """
    tokenizer = _full(full)
    check_map(map, tokenizer.codes, int(map.max()) + 1, "the map")
    return _save(tokenizer, out, map, "bucket")


def remap_shards(tokens: Location, out: Location, full: Path, reduced: Path) -> ShardSet:
    """Write a token dataset in the codes of a reduced tokenizer; resumable shard by shard.

    Args:
        tokens: Token dataset in all codes.
        out: Output dataset; everything else in a sample is copied.
        full: Bundle of the tokenizer that made the dataset.
        reduced: Bundle of the same tokenizer, reduced.

    Raises:
        UserError: The tokens are from another tokenizer, the reduced tokenizer is not a reduction of
            ``full``, or the output folder contains another dataset or cannot be written.
    """
    source = ShardSet.open(tokens)
    meta = TokenSetMeta.of(source)
    meta.check(full, None, tokens)
    tokenizer, target = _full(full), load_tokenizer(reduced, _CPU)
    if not isinstance(target, Reduced) or not _is_same(target.full.state_dict(), tokenizer.state_dict()):
        raise UserError(
            f"{reduced}: is not a reduction of the tokenizer in {full}, so its map does not fit; reduce "
            f"this tokenizer, or name the one that was reduced."
        )
    map = target.map.numpy().astype(np.uint16 if target.codes <= np.iinfo(np.uint16).max + 1 else np.uint32)
    recipes = [
        ShardRecipe(shard.path.name, shard.count, lambda shard=shard: _remapped_samples(shard, map))
        for shard in source.shards
    ]
    described = replace(
        meta,
        codes=target.codes,
        tokenizer=tokenizer_fingerprint(reduced),
        tokenizer_config=tokenizer_config_digest(reduced),
    )
    remapped = {shard.path.name: shard.sha256 for shard in source.shards}
    return write_shard_set(out, {**source.meta, **asdict(described), "remapped": remapped}, recipes, "remap")


def _remapped_samples(shard: Shard, map: NDArray[np.unsignedinteger[Any]]) -> Iterator[Sample]:
    for sample in read_shard(shard):
        yield {**sample, _TOKENS: map[_tokens(sample, shard)]}


def _tokens(sample: Sample, shard: Shard) -> NDArray[Any]:
    try:
        return decode_array(sample[_TOKENS])
    except (KeyError, BadSample) as error:
        raise UserError(
            f"{shard.path}: the tokens of sample '{sample[KEY]}' cannot be read ({error}); make the shard "
            f"again."
        ) from None


def _full(folder: Path) -> Autoencoder[Any]:
    tokenizer = load_tokenizer(folder, _CPU)
    if not isinstance(tokenizer, Autoencoder):
        raise UserError(f"{folder}: this tokenizer is reduced already; name the one with all its codes.")
    return tokenizer


def _save(
    tokenizer: Autoencoder[Any],
    out: Path,
    map: Int[Tensor, " full"],
    unused: Unused,
    used: Int[Tensor, " codes"] | None = None,
) -> Reduced:
    codes = int(map.max()) + 1
    reduced = Reduced(tokenizer, codes, unused)
    inner = {} if used is None else {"kept": used}
    reduced.load_state_dict({**reduced.state_dict(), "map": map, **inner})
    full = cast(FullTokenizerConfig, tokenizer.config)
    config = ReducedConfig(codebook_size=codes, unused=unused, full=full)
    save_tokenizer(out, config, reduced.state_dict(), "reduce_codebook.py reduce")
    return reduced


def _is_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
