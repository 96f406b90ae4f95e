"""Common code of the image sources: packing a list of image files into shards."""

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import Field

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import read_bounded
from vqd_scale.data.folder_walk import FolderListing
from vqd_scale.data.shards.decode import (
    IMAGE_EXTENSIONS,
    BadSample,
    Pixels,
    decode_image,
    decode_text,
    image_extension_of,
    image_format,
)
from vqd_scale.data.shards.near_duplicates import DuplicatesConfig, hash_excluded_images
from vqd_scale.data.shards.perceptual_hash import ExcludedImages
from vqd_scale.data.shards.shard_index import ShardSet, SkippedSample
from vqd_scale.data.shards.shard_io import KEY, Sample, shard_recipes, write_shard_set
from vqd_scale.data.transforms import fitted


class OriginalFile(Config):
    """Original file bytes at original size, after a test decode."""

    kind: Literal["original"] = "original"


class Png(Config):
    """Lossless PNG, resized and cropped to ``image_size``."""

    kind: Literal["png"] = "png"


class Jpeg(Config):
    """Lossy, smaller JPEG, resized and cropped to ``image_size``."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of Pillow. Lower it to save space."""


Encoding = Annotated[OriginalFile | Png | Jpeg, Field(discriminator="kind")]


@dataclass(frozen=True)
class SourceImage:
    """Image file of a source with its metadata.

    Attributes:
        path: Path of the image file.
        key: Key of the sample.
        source: Name of the image in reports.
        captions: Captions, or the text file with the captions.
        facts: Other entries of the sample's ``json``, such as ``class``.
        fault: Reason why the image cannot be used, completing the sentence 'this sample …'; empty if none is
            known yet.
    """

    path: Path
    key: str
    source: str
    captions: "tuple[str, ...] | CaptionFile" = ()
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fault: str = ""

    def read(self) -> tuple[bytes, "tuple[str, ...] | CaptionFile"]:
        """Return the content of the image file, and the captions.

        Raises:
            BadSample: The file cannot be read.
        """
        return _read_file(self.path), self.captions


@dataclass(frozen=True)
class CaptionFile:
    """Text file with one caption, or with one caption per line (``by_line``)."""

    path: Path
    by_line: bool

    def read(self) -> tuple[str, ...]:
        """Return the captions.

        Raises:
            BadSample: The file cannot be read, is not UTF-8 or is empty.
        """
        text = decode_text(_read_file(self.path))
        return tuple(filter(None, map(str.strip, text.splitlines()))) if self.by_line else (text,)


class ImageSource(Config, ABC):
    """Source of image files, and how they are packed into shards.

    A source is a subclass with a name, the fields that select its images, and `list_images`. Its docstring is
    the help of its command.
    """

    name: ClassVar[str]
    """Name of the source and of its command."""
    example: ClassVar[str]
    """Arguments of an example command."""

    encoding: Encoding = OriginalFile()
    """Storage format of the images. With ``original``, training can choose its own crops."""
    image_size: int = Field(default=256, ge=8, le=4096)
    """Side in pixels: the short side is resized to it and the center square cut. Unused with ``original``."""
    samples_per_shard: int = Field(default=1_000, ge=1, le=1 << 20)
    """Images per shard. Lower it for large images, so that a shard stays below about 1 GB."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Largest fraction of unusable images, which are skipped and reported."""
    near_duplicates: DuplicatesConfig | None = None
    """Images to exclude; their near-duplicates are skipped and reported. Set it if the dataset may contain
    evaluation images."""
    num_workers: int = Field(default=1, ge=1, le=1 << 10)
    """Number of processes."""

    @abstractmethod
    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the images in sample order.

        Args:
            folder: Folder of the source, which contains all its files.

        Raises:
            UserError: There is no image, or a file is missing or has an invalid format.
        """

    def pack(self, source: Path, folder: Location) -> ShardSet:
        """Pack the images into shards.

        Args:
            source: Folder of the source.
            folder: Output folder.

        Raises:
            UserError: The source is incomplete, too many images are unusable, or ``folder`` contains another
                dataset or cannot be written.
        """
        try:
            images = self.list_images(source)
        except OSError as error:
            raise UserError(f"{error.filename or source}: cannot be read ({error.strerror}).") from None
        for number, image in enumerate(images):
            if not image.path.is_relative_to(source) or ".." in image.path.relative_to(source).parts:
                images[number] = replace(image, path=source, fault="lies outside of the source's folder")
        faults = [image for image in images if image.fault]
        if len(faults) > self.max_bad_fraction * len(images):
            raise UserError(
                f"{source}: {len(faults)} of {len(images)} images cannot be used, more than "
                f"max_bad_fraction={self.max_bad_fraction}; '{faults[0].source}' for one {faults[0].fault}."
            )
        excluded_images = hash_excluded_images(self.near_duplicates, self.num_workers)
        samples = functools.partial(_samples, self, excluded_images)
        recipes = shard_recipes(images, self.samples_per_shard, samples)
        # They do not change the contents of a shard; near_duplicates has its own fingerprint.
        unstored = {"max_bad_fraction", "num_workers", "near_duplicates"}
        origin = {
            "name": self.name,
            "images": _fingerprint(images, source),
            "config": self.model_dump(mode="json", exclude=unstored),
            "near_duplicates": None if excluded_images is None else excluded_images.fingerprint,
        }
        meta, title = {"content": "images", "source": origin}, f"packing {self.name}"
        return write_shard_set(
            folder, meta, recipes, title, workers=self.num_workers, max_bad_fraction=self.max_bad_fraction
        )


def images_of(listing: FolderListing) -> list[Path]:
    """Return the image files of a listing.

    Raises:
        UserError: There is none.
    """
    paths = [path for path in listing.files if image_extension_of(path.name)]
    if not paths:
        raise UserError(f"{listing.folder}: holds no image ({', '.join(IMAGE_EXTENSIONS)}).")
    return paths


def name_below(path: Path, folder: Path) -> str:
    """Return a file's path below a folder for reports; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "backslashreplace")


def existing(*candidates: Path, name: str) -> Path:
    """Return the first candidate path that exists.

    Raises:
        UserError: No candidate exists.
    """
    for path in candidates:
        if path.exists():
            return path
    alternatives = ", ".join(str(path) for path in candidates[1:])
    also = f" (nor {alternatives})" if alternatives else ""
    raise UserError(f"{candidates[0]}: {name} is not here{also}; name the folder that holds it.")


def _samples(
    config: ImageSource, excluded_images: ExcludedImages | None, images: Sequence[SourceImage]
) -> Iterator[Sample | SkippedSample]:
    for source in images:
        try:
            if source.fault:
                raise BadSample(source.fault)
            data, captions = source.read()
            pixels = decode_image(data)
            if excluded_images is not None and (reason := excluded_images.match(pixels)):
                yield SkippedSample(source.source, reason, is_bad=False)
            else:
                image = _image(config, source.path, data, pixels)
                yield {KEY: source.key, **image, **_text_members(source, captions)}
        except BadSample as error:
            yield SkippedSample(source.source, str(error))


def _text_members(source: SourceImage, captions: tuple[str, ...] | CaptionFile) -> dict[str, Any]:
    """Return the members besides the image: ``json``, ``txt`` (first caption) and ``cls`` (class)."""
    is_list = True
    if isinstance(captions, CaptionFile):
        captions, is_list = captions.read(), captions.by_line
    texts = [text for text in map(str.strip, captions) if text]
    if captions and not texts:
        raise BadSample("has an empty caption")
    facts: dict[str, Any] = {"source": source.source, **source.facts}
    if texts and is_list:
        facts["captions"] = texts
    members: dict[str, Any] = {"json": facts}
    if texts:
        members["txt"] = texts[0]
    if "class" in facts:
        members["cls"] = str(facts["class"])
    return members


def _image(config: ImageSource, path: Path, data: bytes, pixels: Pixels) -> dict[str, bytes]:
    if isinstance(config.encoding, OriginalFile):
        return {image_extension_of(path.name) or image_format(data): data}
    image = Image.fromarray(fitted(pixels, config.image_size))
    with io.BytesIO() as file:
        if isinstance(config.encoding, Png):
            image.save(file, format="PNG")
            return {"png": file.getvalue()}
        image.save(file, format="JPEG", quality=config.encoding.quality)
        return {"jpg": file.getvalue()}


def _read_file(path: Path) -> bytes:
    try:
        return read_bounded(path)
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise BadSample(f"cannot be read ({error})") from None


def _fingerprint(images: Sequence[SourceImage], root: Path) -> str:
    """Return a digest of file names, sizes, times and captions; shards of other inputs are not reused."""
    digest = hashlib.sha256()
    states: dict[Path, str] = {}
    for source in images:
        files = [source.path]
        if isinstance(source.captions, CaptionFile):
            files.append(source.captions.path)
        captions = None if isinstance(source.captions, CaptionFile) else source.captions
        entry = (source.key, source.source, captions, sorted(source.facts.items()), source.fault)
        digest.update(repr(entry).encode())
        for file in files:
            if file not in states:
                states[file] = _state(file)
            digest.update(states[file].encode())
    return digest.hexdigest()


def _state(path: Path) -> str:
    """Return size and time of a file; a file that is missing is reported when it is read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
