"""Caltech-UCSD Birds-200-2011 with ten captions per image, as shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import CaptionFile, PackingConfig, SourceImage, existing
from vqd_scale.data.sources.fineclasses import captions_folder, listed_classes, pack_captioned


class CubConfig(PackingConfig):
    """Packing of CUB-200-2011.

    Attributes:
        split: Split to pack.
        protocol: Split definition. ``classes``: no class is in both splits, as in text-to-image papers;
            ``pictures``: the dataset's own ``train_test_split.txt``.
    """

    split: Literal["train", "test"] = "train"
    protocol: Literal["classes", "pictures"] = "classes"


def write_cub200(config: CubConfig, birds: Path, folder: Location) -> ShardSet:
    """Pack one split of CUB-200-2011.

    The input folder is ``CUB_200_2011`` (with ``images.txt``, ``images``, …) or its parent. Captions are
    searched in ``text``, ``text/text`` and ``text_c10``, in both folders.

    Raises:
        UserError: A file is missing or has an invalid format; too many images are unusable; ``folder``
            contains another dataset or cannot be written.
    """
    data = existing(birds / "CUB_200_2011" / "images.txt", birds / "images.txt", name="images.txt").parent
    captions = captions_folder(birds, data)
    names = _pairs(data / "images.txt")
    classes = {number: int(label) for number, label in _pairs(data / "image_class_labels.txt").items()}
    labels = _pairs(data / "classes.txt")
    if config.protocol == "classes":
        split_classes = listed_classes(config.split, birds, data, captions)
        selected = [number for number in names if labels[str(classes[number])] in split_classes]
    else:
        is_training = _pairs(data / "train_test_split.txt")
        selected = [number for number in names if (is_training[number] == "1") == (config.split == "train")]
    entries = [
        SourceImage(
            data / "images" / names[number],
            f"{int(number):09d}",
            names[number],
            CaptionFile(captions / Path(names[number]).with_suffix(".txt"), by_line=True),
            {"class": classes[number] - 1, "name": labels[str(classes[number])]},
        )
        for number in sorted(selected, key=int)
    ]
    return pack_captioned(config, "cub200", entries, folder, birds)


def _pairs(path: Path) -> Mapping[str, str]:
    """Read a two-column table whose first column is a number."""
    lines = existing(path, name="a table of CUB-200-2011").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 or not pair[0].isdigit() for pair in pairs):
        raise UserError(f"{path}: not a table of CUB-200-2011, a number and a value on each line.")
    return {number: value.strip() for number, value in pairs}
