"""Sample kinds of a stream: read the rows of a batch and collate them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.data.config import DecodeConfig
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.shards.decode import (
    BadSample,
    decode_arrays,
    decode_captions,
    decode_image,
    decode_text,
    image_extension,
    no_member,
)
from vqd_scale.data.shards.shard_io import ShardReader
from vqd_scale.data.transforms import Transform

BatchType_co = TypeVar("BatchType_co", covariant=True)


class SampleLocation(NamedTuple):
    """Location of a sample: shard reader, sample index in the shard, and index of the caption to read."""

    reader: ShardReader
    member: int
    caption: int = 0


Slots = Int64[NDArray[np.int64], " batch"]

Columns = dict[str, NDArray[Any]]
"""Arrays with one row per sample, sent from a reading process to its rank."""

ReadRows = tuple[Columns, dict[int, str]]
"""Columns, with blank rows for bad samples, and the reason of each bad row."""


class SampleKind(Protocol[BatchType_co]):
    """Kind of sample; picklable, since it may be used in another process."""

    def read(self, locations: Sequence[SampleLocation], slots: Slots, seed: int) -> ReadRows:
        """Read samples into rows.

        Args:
            locations: Locations of the samples.
            slots: Global slot of each sample; also the id of its random numbers.
            seed: Seed of the run.
        """
        ...

    def batch(self, columns: Columns) -> BatchType_co:
        """Collate the columns from `read`, plus ``slots``, ``valid`` and ``keys``, into a batch."""
        ...


@dataclass(frozen=True)
class TokenSamples:
    """Samples with ``tokens.npy``, and ``text.npy`` or ``cls`` if the model is conditioned on them.

    ``text.npy`` contains the ids of one caption, or one row of ids per caption.

    Attributes:
        length: Codes per image.
        codes: Codebook size; a sample with a code outside it is bad.
        text_length: Ids per caption; 0 skips captions.
        classes: Number of classes, the range of ``cls``; 0 skips class labels.
    """

    length: int
    codes: int
    text_length: int = 0
    classes: int = 0

    def read(self, locations: Sequence[SampleLocation], slots: Slots, seed: int) -> ReadRows:
        """Read codes, and caption ids or class labels; uses no random numbers."""
        del slots, seed
        errors: dict[int, str] = {}
        conditions = {"text.npy": self.text_length, "cls": self.classes}
        extensions = ("tokens.npy", *(extension for extension, size in conditions.items() if size))
        contents = _read_together(locations, extensions, errors)
        tokens = _integers(contents["tokens.npy"], len(locations), self.length, errors)
        columns: Columns = {"tokens": tokens, "text": np.zeros((len(locations), 0), np.int64)}
        if self.text_length:
            captions = [location.caption for location in locations]
            text = contents["text.npy"]
            columns["text"] = _integers(text, len(locations), self.text_length, errors, captions)
        if self.classes:
            columns["labels"] = _labels(contents["cls"], len(locations), self.classes, errors)
        outside = (tokens.min(axis=1) < 0) | (tokens.max(axis=1) >= self.codes)
        for row in np.flatnonzero(outside).tolist():
            errors.setdefault(row, f"has tokens outside 0 to {self.codes - 1}")
        for column in columns.values():
            column[list(errors)] = 0
        return columns, errors

    def batch(self, columns: Columns) -> TokenBatch:
        """Collate token samples."""
        return TokenBatch(
            tokens=_int64(columns["tokens"]),
            text=_int64(columns["text"]),
            slots=torch.from_numpy(columns["slots"]),
            valid=torch.from_numpy(columns["valid"]),
            keys=columns["keys"].tolist(),
            labels=torch.from_numpy(columns["labels"]) if self.classes else None,
        )


@dataclass(frozen=True)
class ImageSamples:
    """Samples with an image and a caption (``txt``).

    Attributes:
        transform: Transform from an image to the network's square input.
        decode: Image decoding options.
        captioned: Treat a sample without a caption as bad. If false, its caption is empty.
    """

    transform: Transform
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    captioned: bool = True

    def read(self, locations: Sequence[SampleLocation], slots: Slots, seed: int) -> ReadRows:
        """Read images and captions."""
        size = self.transform.size
        images = np.zeros((len(locations), 3, size, size), np.uint8)
        captions = [""] * len(locations)
        errors: dict[int, str] = {}
        uniform_rows = uniforms(seed, Purpose.CROP, torch.from_numpy(slots), self.transform.draws).tolist()
        for row, location in enumerate(locations):
            try:
                if self.captioned or "txt" in location.reader.extensions(location.member):
                    captions[row] = caption_of(location)
                images[row] = self._pixels(location, uniform_rows[row])
            except BadSample as error:
                captions[row] = ""
                errors[row] = str(error)
        return {"images": images, "captions": np.array(captions, dtype=np.object_)}, errors

    def batch(self, columns: Columns) -> ImageBatch:
        """Collate image samples."""
        return ImageBatch(
            images=torch.from_numpy(columns["images"]),
            captions=columns["captions"].tolist(),
            slots=torch.from_numpy(columns["slots"]),
            valid=torch.from_numpy(columns["valid"]),
            keys=columns["keys"].tolist(),
        )

    def _pixels(
        self, location: SampleLocation, uniforms: Sequence[float]
    ) -> UInt8[NDArray[np.uint8], "3 height width"]:
        extension = image_extension(location.reader.extensions(location.member))
        data = location.reader.read(location.member, extension)
        pixels = decode_image(data, self.decode, smallest_side=self.transform.smallest_side)
        return self.transform(pixels, uniforms).transpose(2, 0, 1)


def _read_together(
    locations: Sequence[SampleLocation], extensions: tuple[str, ...], errors: dict[int, str]
) -> dict[str, dict[int, bytes]]:
    """Read members by extension and row; a row that lacks one is omitted and added to ``bad``."""
    contents: dict[str, dict[int, bytes]] = {extension: {} for extension in extensions}
    for row, location in enumerate(locations):
        try:
            members = location.reader.read_together(location.member, extensions)
        except BadSample as error:
            errors[row] = str(error)
            continue
        for extension, content in zip(extensions, members, strict=True):
            contents[extension][row] = content
    return contents


def _integers(
    contents: Mapping[int, bytes],
    batch: int,
    length: int,
    errors: dict[int, str],
    captions: Sequence[int] | None = None,
) -> Integer[NDArray[np.integer], "batch length"]:
    """Decode one row of integers per sample, in their stored dtype; errors are added to ``bad``.

    With ``captions``, the index of each sample's caption, a member may contain one row of integers per
    caption, from which this row is selected.
    """
    numbered = list(contents)
    groups: list[tuple[list[int], NDArray[np.integer]]] = []
    for numbers, arrays in decode_arrays(list(contents.values())):
        rows = [numbered[number] for number in numbers]
        if isinstance(arrays, BadSample):
            errors |= {row: str(arrays) for row in rows if row not in errors}
            continue
        if captions is not None:
            several = arrays if arrays.ndim == 3 else arrays[:, None]
            arrays, rows = _of_captions(several, rows, captions, errors)
        if arrays.shape[1:] == (length,) and arrays.dtype.kind in "iu":
            groups.append((rows, arrays))
            continue
        kind = f"type {arrays.dtype} and shape {arrays.shape[1:]}"
        errors |= {row: f"has an array of {kind}, not {length} integers" for row in rows if row not in errors}
    # A small dtype keeps transfers between processes small; int64 fits any mixture of dtypes.
    types = {arrays.dtype for _, arrays in groups}
    is_small = len(types) == 1 and max(types).itemsize < np.dtype(np.int64).itemsize
    column = np.zeros((batch, length), types.pop() if is_small else np.int64)
    for rows, arrays in groups:
        column[rows] = arrays
    return column


def caption_of(location: SampleLocation) -> str:
    """Read the caption of a location, from the sample's ``txt`` or ``json`` as in `decode_captions`.

    Raises:
        BadSample: The sample has no such caption.
    """
    reader, member, number = location
    extensions = reader.extensions(member)
    members: dict[str, bytes] = {}
    for extension in ("txt", "json"):
        if extension in extensions:
            members[extension] = reader.read(member, extension)
        if number == 0 and members.get("txt", b"").strip():
            return decode_text(members["txt"])
    if not members:
        raise no_member("txt", extensions)
    captions = decode_captions(members)
    if number >= len(captions):
        raise BadSample(f"has no caption {number} in its 'json'")
    return captions[number]


def _of_captions(
    arrays: NDArray[np.integer], rows: Sequence[int], captions: Sequence[int], errors: dict[int, str]
) -> tuple[NDArray[np.integer], list[int]]:
    """Select each sample's caption row; also return the batch rows that have this caption."""
    caption_count = arrays.shape[1]
    errors |= {
        row: f"has the ids of {caption_count} captions, not of all that it has; tokenize its images again"
        for row in rows
        if captions[row] >= caption_count and row not in errors
    }
    numbers = [number for number, row in enumerate(rows) if captions[row] < caption_count]
    indices = [captions[rows[number]] for number in numbers]
    return arrays[numbers, indices], [rows[number] for number in numbers]


def _labels(
    contents: Mapping[int, bytes], batch: int, classes: int, errors: dict[int, str]
) -> Int64[NDArray[np.int64], " batch"]:
    labels = np.zeros(batch, np.int64)
    for row, content in contents.items():
        text = content.strip()
        if text.isdigit() and int(text) < classes:
            labels[row] = int(text)
        else:
            errors.setdefault(row, f"has a class that is none of 0 to {classes - 1}")
    return labels


def _int64(column: Integer[NDArray[np.integer], "batch length"]) -> Int64[Tensor, "batch length"]:
    return torch.from_numpy(column.astype(np.int64, copy=False))
