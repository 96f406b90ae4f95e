"""Caltech-UCSD Birds-200-2011 with ten captions per image, as shards."""

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from vqd_scale.core.errors import UserError
from vqd_scale.data.sources.base import CaptionFile, ImageSource, SourceImage, existing
from vqd_scale.data.sources.fineclasses import captions_folder, check_files, listed_classes, read_table


class CubConfig(ImageSource):
    """Pack one split of CUB-200-2011 with captions; SOURCE contains CUB_200_2011/ and text/.

    The input folder is ``CUB_200_2011`` (with ``images.txt``, ``images``, …) or its parent. Captions are
    searched in ``text``, ``text/text`` and ``text_c10``, in both folders.
    """

    name: ClassVar[str] = "cub200"
    example: ClassVar[str] = "/data/birds runs/birds/train split=train"
    split: Literal["train", "test"] = "train"
    """Split to pack."""
    protocol: Literal["classes", "images"] = "classes"
    """Split definition. ``classes``: no class is in both splits, as in text-to-image papers; ``images``:
    the dataset's own ``train_test_split.txt``."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the images of the split, ordered by number."""
        lists = (folder / "CUB_200_2011" / "images.txt", folder / "images.txt")
        data = existing(*lists, name="images.txt").parent
        captions = captions_folder(folder, data)
        names = _pairs(data / "images.txt")
        labels = _pairs(data / "classes.txt")
        classes = _pairs(data / "image_class_labels.txt", names, labels)
        if self.protocol == "classes":
            split_classes = listed_classes(self.split, folder, data, captions)
            selected = [number for number in names if labels[classes[number]] in split_classes]
        else:
            is_training = _pairs(data / "train_test_split.txt", names, ("0", "1"))
            selected = [number for number in names if (is_training[number] == "1") == (self.split == "train")]
        entries = [
            SourceImage(
                data / "images" / names[number],
                f"{int(number):09d}",
                names[number],
                CaptionFile(captions / Path(names[number]).with_suffix(".txt"), by_line=True),
                {"class": int(classes[number]) - 1, "name": labels[classes[number]]},
            )
            for number in sorted(selected, key=int)
        ]
        return check_files(self.name, entries, folder)


def _pairs(path: Path, rows: Iterable[str] = (), values: Container[str] | None = None) -> Mapping[str, str]:
    """Read a two-column table whose first column is a number; check that it has some rows and values only."""
    lines = read_table(existing(path, name="a table of CUB-200-2011")).splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 or not re.fullmatch("[0-9]{1,9}", pair[0]) for pair in pairs):
        raise UserError(f"{path}: not a table of CUB-200-2011, a number and a value on each line.")
    table = {number: value.strip() for number, value in pairs}
    for number in rows:
        if number not in table or (values is not None and table[number] not in values):
            raise UserError(f"{path}: has no valid value for image {number}; fetch CUB-200-2011 again.")
    return table
