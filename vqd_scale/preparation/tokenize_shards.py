"""Tokenization of image shards to token shards, the denoiser's training data."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int64
from pydantic import TypeAdapter

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import Location, publish_json, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.fingerprint import json_digest
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.core.safe_json import parse_json
from vqd_scale.data.shards.decode import (
    BadSample,
    Pixels,
    decode_arrays,
    decode_captions,
    decode_image,
    decode_json,
    image_extension,
    listed_captions,
)
from vqd_scale.data.shards.manifest import read_index
from vqd_scale.data.shards.parallel_writer import Worker, WorkerIndex, forget_parts, write_own_shards
from vqd_scale.data.shards.shard_index import Shard, ShardSet, SkippedSample, begin_set, finish_set
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard
from vqd_scale.data.transforms import NearCenterCrop, RandomResizedCrop, fitted
from vqd_scale.models.bundle import load_tokenizer, tokenizer_fingerprint
from vqd_scale.preparation.config import EncodingConfig, TokenizeConfig
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import ImageTokenizer, SamplingKey, to_signal
from vqd_scale.tokenizers.codebook.usage import usage_of

STATISTICS = "statistics.json"
"""File name of a token dataset's statistics."""

CENTER = "center"
"""Value of `TokenSetMeta.views` for center crops, the crop that evaluation uses."""

_UINT16_CODES = 1 << 16


@dataclass(frozen=True)
class TokenSetMeta:
    """Metadata of a token dataset.

    Attributes:
        codes: K, the number of codes.
        grid: Token grid (rows, columns).
        tokenizer: Fingerprint of the tokenizer's weights, including the map of a reduced codebook.
        captions: Fingerprint of the caption vocabulary; empty without caption ids.
        source: Digests of the image shards' tars.
        encoding: Encoding options of the tokenizer.
        device: Device type of the encoding; another type rounds differently and changes a few codes.
        views: Crops of the images that were encoded.
        tokenizer_config: Digest of the tokenizer's configuration; empty in datasets of earlier versions.
        caption_member: Member of the image shards with the captions.
    """

    codes: int
    grid: tuple[int, int]
    tokenizer: str
    captions: str
    source: dict[str, str]
    encoding: str = str(EncodingConfig())
    device: str = "cpu"
    views: str = CENTER
    tokenizer_config: str = ""
    caption_member: str = "txt"

    @classmethod
    def of(cls, shards: ShardSet) -> "TokenSetMeta":
        """Read the metadata of a dataset.

        Raises:
            UserError: The dataset has no tokens.
        """
        meta = shards.meta
        if meta.get("kind") != "tokens":
            raise UserError(
                f"{shards.folder}: these shards contain no tokens; tokenize_shards.py writes them."
            )
        values = {name: meta[name] for name in cls.__dataclass_fields__ if name in meta}
        try:
            return parse_json(json.dumps(values), TypeAdapter(cls))
        except ValueError as error:
            raise UserError(
                f"{shards.folder}: the description of these tokens cannot be read ({error}); make them again."
            ) from None

    def check(self, tokenizer: Path, captions: CaptionTokenizer | None, folder: Location) -> None:
        """Check that tokens match a tokenizer and, if captions are used, caption ids a vocabulary.

        Raises:
            UserError: The tokens or the caption ids do not match.
        """
        is_same = tokenizer_fingerprint(tokenizer) == self.tokenizer
        if not is_same or self.tokenizer_config not in ("", tokenizer_config_digest(tokenizer)):
            raise UserError(
                f"{folder}: these tokens are from another tokenizer than {tokenizer}; tokenize the "
                f"images again, or name the tokenizer they are from."
            )
        if captions is not None and not self.captions:
            raise UserError(
                f"{folder}: these tokens have no caption ids; tokenize the images with captions, or "
                f"train a network without text condition."
            )
        if captions is not None and captions.fingerprint != self.captions:
            raise UserError(
                f"{folder}: the captions were not tokenized with text.context_length="
                f"{captions.context_length} and text.bpe_merges={captions.merges}; use the same values."
            )


def tokenizer_config_digest(folder: Path) -> str:
    """Return the hex SHA-256 of the configuration in a tokenizer bundle; errors as for `read_json`."""
    return json_digest(read_json(folder / "config.json", "tokenizer bundle"))


def tokenize_shards(
    config: TokenizeConfig, device: torch.device, worker: Worker | None = None
) -> ShardSet | None:
    """Write a token shard for every image shard of a worker; resumable shard by shard.

    The output bytes do not depend on the number of workers. The worker that finds all shards finished
    publishes the index, the quarantine report and the statistics.

    Args:
        config: Tokenization job.
        device: Device of the tokenizer.
        worker: This worker. Default: the only one.

    Returns:
        The dataset, or None while other workers are unfinished.

    Raises:
        UserError: The images or the tokenizer are missing, sizes do not fit, the disk is full, too many
            samples are invalid, or the folder contains tokens of other images, another tokenizer or
            vocabulary.
    """
    source = ShardSet.open(config.images)
    tokenizer = load_tokenizer(config.tokenizer, device)
    if config.encoding.precision == "bf16":
        tokenizer.compute_in(torch.bfloat16)
    if config.size % tokenizer.factor:
        raise UserError(
            f"size: {config.size} is not a multiple of the tokenizer's factor {tokenizer.factor}."
        )
    vocabulary = config.captions
    captions = vocabulary and CaptionTokenizer(vocabulary.context_length, vocabulary.bpe_merges)
    side = config.size // tokenizer.factor
    described = TokenSetMeta(
        codes=tokenizer.codes,
        grid=(side, side),
        tokenizer=tokenizer_fingerprint(config.tokenizer),
        captions="" if captions is None else captions.fingerprint,
        source={shard.path.name: shard.sha256 for shard in source.shards},
        encoding=str(config.encoding),
        device=device.type,
        views=CENTER if config.augmented_views is None else str(config.augmented_views),
        tokenizer_config=tokenizer_config_digest(config.tokenizer),
        caption_member="txt" if vocabulary is None else vocabulary.member,
    )
    meta = {"kind": "tokens", **asdict(described)}
    encode = _ShardEncoder(config, tokenizer, captions, device)
    views = 1 if config.augmented_views is None else config.augmented_views.count
    first_slots = accumulate((shard.count for shard in source.shards), initial=0)
    recipes = [
        ShardRecipe(shard.path.name, views * shard.count, lambda shard=shard, slot=slot: encode(shard, slot))
        for shard, slot in zip(source.shards, first_slots, strict=False)
    ]
    begin_set(config.output, meta)
    merged = write_own_shards(
        config.output,
        recipes,
        Worker() if worker is None else worker,
        lambda shard: code_counts(shard, tokenizer.codes),
        "tokenize",
        max_bad_fraction=config.max_bad_fraction,
    )
    if merged is not None:
        publish_json(config.output / STATISTICS, statistics_of(merged), shared=True)
        finish_set(config.output, meta, merged.shards)
    elif (index := read_index(config.output)) is None or not index.complete:
        return None
    forget_parts(config.output)
    return ShardSet.open(config.output)


def code_counts(shard: Shard, codes: int) -> Int64[NDArray[np.int64], " codes"]:
    """Count the occurrences of each code in a token shard.

    Raises:
        UserError: The shard cannot be read, or has a token outside 0..codes - 1.
    """
    counts = np.zeros(codes, np.int64)
    samples = list(read_shard(shard))
    for rows, tokens in decode_arrays([sample["tokens.npy"] for sample in samples]):
        if isinstance(tokens, BadSample):
            raise UserError(
                f"{shard.path}: the tokens of sample '{samples[rows[0]][KEY]}' cannot be read ({tokens}); "
                f"delete the shard and make it again."
            )
        shard_counts = np.bincount(tokens.reshape(-1), minlength=codes)
        if len(shard_counts) > codes:
            row = rows[int(tokens.reshape(len(rows), -1).max(axis=1).argmax())]
            raise UserError(
                f"{shard.path}: sample '{samples[row][KEY]}' has the token {len(shard_counts) - 1}, but its "
                f"tokenizer has {codes} codes; delete the shard and make it again."
            )
        counts += shard_counts
    return counts


def statistics_of(merged: WorkerIndex) -> dict[str, Any]:
    """Compute JSON statistics of a token dataset: samples, captions, failures by reason, codebook usage."""
    failures = Counter(
        # Reasons that differ only in numbers are counted together.
        re.sub(r"\d+", "N", sample.reason)
        for shard in merged.shards
        for sample in shard.left_out
    )
    return {
        "samples": sum(shard.count for shard in merged.shards),
        "captions": sum(shard.captions for shard in merged.shards),
        "failures": dict(sorted(failures.items())),
        "usage": asdict(usage_of(torch.from_numpy(merged.totals))),
        "counts": merged.totals.tolist(),
    }


@dataclass(frozen=True)
class _View:
    """A crop of an image, to be encoded as a sample.

    Attributes:
        number: Unique index of the crop over all images.
        key: Key of the sample.
        pixels: uint8 [size, size, 3].
        captions: Captions of the image, first the one in its ``txt``; empty without caption ids.
        is_list: True if the image's ``json`` lists the captions.
        copied: Fields copied unchanged, by extension.
    """

    number: int
    key: str
    pixels: Pixels
    captions: list[str]
    is_list: bool
    copied: dict[str, bytes | str]


@dataclass(frozen=True)
class _ShardEncoder:
    """Encoder of an image shard's samples to token samples; a batch never spans two shards."""

    config: TokenizeConfig
    tokenizer: ImageTokenizer
    captions: CaptionTokenizer | None
    device: torch.device

    def __call__(self, shard: Shard, first_slot: int) -> Iterator[Sample | SkippedSample]:
        left_out: list[SkippedSample] = []
        views = self._views(shard, first_slot, left_out)
        while batch := list(islice(views, self.config.batch_size)):
            for view, codes, ids in zip(batch, self._encode(batch), self._ids(batch), strict=True):
                yield {KEY: view.key, "tokens.npy": codes, **ids, **view.copied}
        yield from left_out

    def _views(self, shard: Shard, first_slot: int, left_out: list[SkippedSample]) -> Iterator[_View]:
        for slot, sample in enumerate(read_shard(shard), first_slot):
            try:
                captions, is_list, copied = self._texts(sample)
                squares = self._squares(sample, slot)
            except BadSample as error:
                left_out.append(SkippedSample(sample[KEY], str(error)))
                continue
            for number, pixels in enumerate(squares):
                key = sample[KEY] if self.config.augmented_views is None else f"{sample[KEY]}_{number}"
                yield _View(slot * len(squares) + number, key, pixels, captions, is_list, copied)

    def _texts(self, sample: dict[str, Any]) -> tuple[list[str], bool, dict[str, bytes | str]]:
        """Return the captions, whether ``json`` lists them, and the fields to copy.

        Raises:
            BadSample: The sample has no caption, or one that is not text.
        """
        copied = {name: sample[name] for name in ("txt", "json", "cls") if name in sample}
        if self.config.captions is None:
            return [], False, copied
        captions = decode_captions(sample, self.config.captions.member)
        copied["txt"] = captions[0]
        content = decode_json(sample.get("json", b"{}"))
        if self.config.captions.member != "txt" and isinstance(content, dict):
            # The token shards have the captions where all readers look for them.
            copied["json"] = json.dumps({**cast("dict[str, Any]", content), "captions": captions})
            return captions, True, copied
        return captions, bool(listed_captions(content)), copied

    def _squares(self, sample: dict[str, Any], slot: int) -> list[Pixels]:
        """Return the crops of an image to encode."""
        pixels = decode_image(sample[image_extension(sample)])
        size, views = self.config.size, self.config.augmented_views
        if views is None:
            return [fitted(pixels, size)]
        crop = NearCenterCrop(size=size) if views.crop == "near_center" else RandomResizedCrop(size=size)
        return [
            crop(
                pixels,
                uniforms(views.seed, Purpose.CROP, torch.tensor([slot]), crop.draws, draw=view)[0].tolist(),
            )
            for view in range(views.count)
        ]

    def _ids(self, views: list[_View]) -> Iterator[dict[str, NDArray[np.int32]]]:
        """Yield each sample's caption ids: one vector, or one row per caption listed in its ``json``."""
        if self.captions is None:
            yield from ({} for _ in views)
            return
        ids = self.captions([caption for view in views for caption in view.captions]).astype(np.int32)
        end = 0
        for view in views:
            begin, end = end, end + len(view.captions)
            yield {"text.npy": ids[begin:end] if view.is_list else ids[begin]}

    @torch.no_grad()
    def _encode(self, views: list[_View]) -> NDArray[np.unsignedinteger[Any]]:
        # The last batch is padded to the full size, so an image's codes do not depend on its neighbors.
        padded = views + [views[-1]] * (self.config.batch_size - len(views))
        pixels = np.stack([view.pixels for view in padded])
        signal = to_signal(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device))
        slots = torch.tensor([view.number for view in padded], device=self.device)
        seed = self.config.encoding.sample_codes
        sampling_key = None if seed is None else SamplingKey(seed, slots)
        codes = self.tokenizer.encode(signal, sampling_key).flatten(1)[: len(views)].cpu().numpy()
        return codes.astype(np.uint16 if self.tokenizer.codes <= _UINT16_CODES else np.uint32)
