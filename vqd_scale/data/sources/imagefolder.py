"""A folder of pictures, each with its caption in a text file of the same name, as a set of shards."""

import functools
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.data.decode import IMAGE_EXTENSIONS, BadSample, decode_image, decode_text, fitted
from vqd_scale.data.index import ShardSet
from vqd_scale.data.quarantine import Quarantine
from vqd_scale.data.shards import KEY, Sample, ShardRecipe, shard_name, write_shard_set

QUARANTINE = "quarantine.jsonl"


class Png(Config):
    """Lossless."""

    kind: Literal["png"] = "png"


class Jpeg(Config):
    """Lossy and smaller."""

    kind: Literal["jpeg"] = "jpeg"
    quality: int = Field(default=95, ge=1, le=100)


class ImageFolderConfig(Config):
    """How a folder of pictures becomes shards.

    Attributes:
        image_size: The short side is resized to this, and the centre square cut.
        encoding: How the pictures are stored.
        shard_size: Pictures per shard.
        max_bad_share: Which share of the pictures may be unreadable; they are left out and reported.
    """

    image_size: int = Field(default=256, ge=8, le=4096)
    encoding: Annotated[Png | Jpeg, Field(discriminator="kind")] = Png()
    shard_size: int = Field(default=1_000, ge=1)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)


def write_imagefolder(config: ImageFolderConfig, pictures: Path, folder: Path) -> ShardSet:
    """Write the pictures below one folder as a set of shards into another.

    Raises:
        UserError: There is no picture, one has no caption, too many are unreadable, or ``folder`` holds
            another set or cannot be written.
    """
    paths = find_pictures(pictures)
    quarantine = Quarantine(folder / QUARANTINE)
    tolerated = config.max_bad_share * len(paths)

    def made(shard: str, numbers: range) -> Iterator[Sample]:
        for number in numbers:
            source = paths[number].relative_to(pictures).as_posix()
            try:
                yield {KEY: f"{number:09d}", "json": {"source": source}, **_members(config, paths[number])}
            except BadSample as error:
                quarantine.add(shard, source, str(error))
                if len(quarantine) > tolerated:
                    raise UserError(
                        f"{pictures}: more than max_bad_share={config.max_bad_share} of the {len(paths)} "
                        f"pictures cannot be used; '{source}' for one {error}; {quarantine.path} lists them."
                    ) from None

    recipes = [
        ShardRecipe(name, len(numbers), functools.partial(made, name, numbers))
        for shard, first in enumerate(range(0, len(paths), config.shard_size))
        for name, numbers in [(shard_name(shard), range(first, min(first + config.shard_size, len(paths))))]
    ]
    meta = {
        "content": "images",
        "image_size": config.image_size,
        "source": {
            "name": "imagefolder",
            "pictures": _fingerprint(pictures, paths),
            # How many bad pictures are tolerated does not change what a shard holds.
            "config": config.model_dump(mode="json", exclude={"max_bad_share"}),
        },
    }
    return write_shard_set(folder, meta, recipes, title="packing pictures")


def find_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, sorted by path.

    Raises:
        UserError: There is no such folder, no picture, or a picture without a caption.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder that holds the pictures.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGE_EXTENSIONS)
    if not found:
        raise UserError(f"{folder}: holds no picture ({', '.join(IMAGE_EXTENSIONS)}).")
    silent = [path for path in found if not path.with_suffix(".txt").is_file()]
    if silent:
        raise UserError(
            f"{silent[0]}: this picture has no caption, as {len(silent)} of {len(found)} have none; write "
            f"each one's caption to a file of its name, such as '{silent[0].with_suffix('.txt').name}'."
        )
    return found


def _members(config: ImageFolderConfig, path: Path) -> dict[str, bytes | str]:
    try:
        data, text = path.read_bytes(), path.with_suffix(".txt").read_bytes()
    except OSError as error:
        raise BadSample(f"cannot be read ({error.strerror})") from None
    image = fitted(decode_image(data), config.image_size)
    return {**_encoded(image, config.encoding), "txt": decode_text(text)}


def _encoded(image: Image.Image, encoding: Png | Jpeg) -> dict[str, bytes]:
    with io.BytesIO() as file:
        if isinstance(encoding, Png):
            image.save(file, format="PNG")
            return {"png": file.getvalue()}
        image.save(file, format="JPEG", quality=encoding.quality)
        return {"jpg": file.getvalue()}


def _fingerprint(folder: Path, paths: Sequence[Path]) -> str:
    """Names, sizes and times of pictures and captions: shards finished from others must not be kept."""
    digest = hashlib.sha256()
    for path in paths:
        for file in (path, path.with_suffix(".txt")):
            state = file.stat()
            digest.update(f"{file.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()
