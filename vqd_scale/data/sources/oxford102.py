"""Oxford-102 flowers with ten captions per image, as shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import CaptionFile, PackingConfig, SourceImage, existing
from vqd_scale.data.sources.fineclasses import captions_folder, listed_classes, pack_captioned


class OxfordConfig(PackingConfig):
    """Packing of Oxford-102.

    Attributes:
        split: Split to pack; ``all`` packs every image.
        protocol: Split definition. ``classes``: no class is in both splits; ``pictures``: the dataset's own
            ``setid.mat``.
    """

    split: Literal["train", "val", "test", "all"] = "train"
    protocol: Literal["classes", "pictures"] = "classes"


def write_oxford102(config: OxfordConfig, flowers: Path, folder: Location) -> ShardSet:
    """Pack one split of Oxford-102 from ``jpg``, ``imagelabels.mat``, ``setid.mat`` and ``text_c10``.

    Raises:
        UserError: A file is missing or has an invalid format; too many images are unusable; ``folder``
            contains another dataset or cannot be written.
    """
    labels = _matrix(flowers / "imagelabels.mat", "labels")
    captions = captions_folder(flowers, flowers)
    numbers: Sequence[int] = range(1, len(labels) + 1)
    if config.split != "all" and config.protocol == "classes":
        split_classes = listed_classes(config.split, flowers, captions)
        numbers = [number for number in numbers if f"class_{labels[number - 1]:05d}" in split_classes]
    elif config.split != "all":
        parts = {"train": "trnid", "val": "valid", "test": "tstid"}
        numbers = sorted(_matrix(flowers / "setid.mat", parts[config.split]))
    entries = [
        SourceImage(
            flowers / "jpg" / f"image_{number:05d}.jpg",
            f"{number:09d}",
            f"jpg/image_{number:05d}.jpg",
            CaptionFile(
                captions / f"class_{labels[number - 1]:05d}" / f"image_{number:05d}.txt", by_line=True
            ),
            {"class": labels[number - 1] - 1},
        )
        for number in numbers
    ]
    return pack_captioned(config, "oxford102", entries, folder, flowers)


def _matrix(path: Path, name: str) -> list[int]:
    existing(path, name="a table of Oxford-102")
    try:
        content: Mapping[str, Any] = loadmat(str(path))
        return [int(value) for value in content[name].reshape(-1)]
    except (MatReadError, ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(f"{path}: not a table of Oxford-102 that holds '{name}' ({error}).") from None
