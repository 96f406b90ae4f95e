"""Sample kinds of a stream: reading the rows of a batch and collating them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, Integer, UInt8
from torch import Tensor

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.rng import Purpose, uniforms
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.shards.decode import (
    IMAGE_EXTENSIONS,
    BadSample,
    DecodeConfig,
    decode_arrays,
    decode_image,
    decode_json,
    decode_text,
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


class SampleKind(Protocol[BatchType_co]):
    """Kind of sample; picklable, since it may be used in another process."""

    def read(
        self, places: Sequence[SampleLocation], slots: Slots, seed: int
    ) -> tuple[Columns, dict[int, str]]:
        """Read samples into rows.

        Args:
            places: Locations of the samples.
            slots: Global slot of each sample; also the id of its random numbers.
            seed: Seed of the run.

        Returns:
            The columns, with blank rows for bad samples, and the reason of each bad row.
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

    def read(
        self, places: Sequence[SampleLocation], slots: Slots, seed: int
    ) -> tuple[Columns, dict[int, str]]:
        """Read codes, and caption ids or class labels; uses no random numbers."""
        del slots, seed
        bad: dict[int, str] = {}
        wanted = (
            "tokens.npy",
            *(["text.npy"] if self.text_length else []),
            *(["cls"] if self.classes else []),
        )
        contents = _read_together(places, wanted, bad)
        tokens = _integers(contents["tokens.npy"], len(places), self.length, bad)
        columns: Columns = {"tokens": tokens, "text": np.zeros((len(places), 0), np.int64)}
        if self.text_length:
            captions = [place.caption for place in places]
            columns["text"] = _integers(contents["text.npy"], len(places), self.text_length, bad, captions)
        if self.classes:
            columns["labels"] = _labels(contents["cls"], len(places), self.classes, bad)
        outside = (tokens.min(axis=1) < 0) | (tokens.max(axis=1) >= self.codes)
        for row in np.flatnonzero(outside).tolist():
            bad.setdefault(row, f"has tokens outside 0 to {self.codes - 1}")
        for column in columns.values():
            column[list(bad)] = 0
        return columns, bad

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

    def read(
        self, places: Sequence[SampleLocation], slots: Slots, seed: int
    ) -> tuple[Columns, dict[int, str]]:
        """Read images and captions."""
        size = self.transform.size
        images = np.zeros((len(places), 3, size, size), np.uint8)
        captions = [""] * len(places)
        bad: dict[int, str] = {}
        draws = uniforms(seed, Purpose.CROP, torch.from_numpy(slots), self.transform.draws).tolist()
        for row, place in enumerate(places):
            try:
                if self.captioned or "txt" in place.reader.extensions(place.member):
                    captions[row] = caption_of(place)
                images[row] = self._pixels(place, draws[row])
            except BadSample as error:
                captions[row] = ""
                bad[row] = str(error)
        return {"images": images, "captions": np.array(captions, dtype=np.object_)}, bad

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
        self, place: SampleLocation, draws: Sequence[float]
    ) -> UInt8[NDArray[np.uint8], "3 height width"]:
        present = set(place.reader.extensions(place.member))
        extension = next((name for name in IMAGE_EXTENSIONS if name in present), None)
        if extension is None:
            raise BadSample("has no picture")
        data = place.reader.read(place.member, extension)
        pixels = decode_image(data, self.decode, smallest_side=self.transform.smallest_side)
        return self.transform(pixels, draws).transpose(2, 0, 1)


def _read_together(
    places: Sequence[SampleLocation], extensions: tuple[str, ...], bad: dict[int, str]
) -> dict[str, dict[int, bytes]]:
    """Read members by extension and row; a row that lacks one is omitted and added to ``bad``."""
    contents: dict[str, dict[int, bytes]] = {extension: {} for extension in extensions}
    for row, place in enumerate(places):
        try:
            read = place.reader.read_together(place.member, extensions)
        except BadSample as error:
            bad[row] = str(error)
            continue
        for extension, content in zip(extensions, read, strict=True):
            contents[extension][row] = content
    return contents


def _integers(
    contents: Mapping[int, bytes],
    batch: int,
    length: int,
    bad: dict[int, str],
    captions: Sequence[int] | None = None,
) -> Integer[NDArray[np.integer], "batch length"]:
    """Decode one row of integers per sample, in their stored dtype; errors are added to ``bad``.

    With ``captions``, the index of each sample's caption, a member may contain one row of integers per
    caption, from which this row is selected.
    """
    numbered = list(contents)
    found: list[tuple[list[int], NDArray[np.integer]]] = []
    for numbers, arrays in decode_arrays(list(contents.values())):
        rows = [numbered[number] for number in numbers]
        if isinstance(arrays, BadSample):
            bad |= {row: str(arrays) for row in rows if row not in bad}
            continue
        if captions is not None:
            several = arrays if arrays.ndim == 3 else arrays[:, None]
            arrays, rows = _of_captions(several, rows, captions, bad)
        if arrays.shape[1:] == (length,) and arrays.dtype.kind in "iu":
            found.append((rows, arrays))
            continue
        kind = f"type {arrays.dtype} and shape {arrays.shape[1:]}"
        bad |= {row: f"has an array of {kind}, not {length} integers" for row in rows if row not in bad}
    # A small dtype keeps transfers between processes small; int64 fits any mixture of dtypes.
    types = {arrays.dtype for _, arrays in found}
    is_small = len(types) == 1 and max(types).itemsize < np.dtype(np.int64).itemsize
    column = np.zeros((batch, length), types.pop() if is_small else np.int64)
    for rows, arrays in found:
        column[rows] = arrays
    return column


def caption_of(place: SampleLocation) -> str:
    """Read the caption of a location: caption 0 from the sample's ``txt``, the others from its ``json``.

    Raises:
        BadSample: The sample has no such caption.
    """
    if place.caption == 0:
        return decode_text(place.reader.read(place.member, "txt"))
    listed = decode_json(place.reader.read(place.member, "json"))
    try:
        return decode_text(listed["captions"][place.caption].encode())
    except (TypeError, KeyError, IndexError, AttributeError):
        raise BadSample(f"has no caption {place.caption} in its 'json'") from None


def _of_captions(
    arrays: NDArray[np.integer], rows: Sequence[int], captions: Sequence[int], bad: dict[int, str]
) -> tuple[NDArray[np.integer], list[int]]:
    """Select each sample's caption row; also return the batch rows that have this caption."""
    several = arrays.shape[1]
    bad |= {
        row: f"has the ids of {several} captions, not of all that it has; tokenize its pictures again"
        for row in rows
        if captions[row] >= several and row not in bad
    }
    there = [number for number, row in enumerate(rows) if captions[row] < several]
    wanted = [captions[rows[number]] for number in there]
    return arrays[there, wanted], [rows[number] for number in there]


def _labels(
    contents: Mapping[int, bytes], batch: int, classes: int, bad: dict[int, str]
) -> Int64[NDArray[np.int64], " batch"]:
    labels = np.zeros(batch, np.int64)
    for row, content in contents.items():
        text = content.strip()
        if text.isdigit() and int(text) < classes:
            labels[row] = int(text)
        else:
            bad.setdefault(row, f"has a class that is none of 0 to {classes - 1}")
    return labels


def _int64(column: Integer[NDArray[np.integer], "batch length"]) -> Int64[Tensor, "batch length"]:
    return torch.from_numpy(column.astype(np.int64, copy=False))
