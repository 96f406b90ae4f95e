"""Oxford-102 flowers with ten captions per image, as shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from vqd_scale.core.errors import UserError
from vqd_scale.data.sources.base import CaptionFile, ImageSource, SourceImage, existing
from vqd_scale.data.sources.fineclasses import captions_folder, check_files, listed_classes


class OxfordConfig(ImageSource):
    """Pack one split of Oxford-102 with captions; SOURCE contains jpg/, setid.mat and text_c10/.

    The input folder contains ``jpg``, ``imagelabels.mat``, ``setid.mat`` and ``text_c10``.
    """

    name: ClassVar[str] = "oxford102"
    example: ClassVar[str] = "/data/flowers runs/flowers/train split=train"
    split: Literal["train", "val", "test", "all"] = "train"
    """Split to pack; ``all`` packs every image."""
    protocol: Literal["classes", "images"] = "classes"
    """Split definition. ``classes``: no class is in both splits; ``images``: the dataset's own
    ``setid.mat``."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the images of the split, ordered by number."""
        labels = _matrix(folder / "imagelabels.mat", "labels")
        captions = captions_folder(folder, folder)
        numbers: Sequence[int] = range(1, len(labels) + 1)
        if self.split != "all" and self.protocol == "classes":
            split_classes = listed_classes(self.split, folder, captions)
            numbers = [number for number in numbers if f"class_{labels[number - 1]:05d}" in split_classes]
        elif self.split != "all":
            parts = {"train": "trnid", "val": "valid", "test": "tstid"}
            numbers = sorted(_matrix(folder / "setid.mat", parts[self.split]))
            if numbers and not 1 <= numbers[0] <= numbers[-1] <= len(labels):
                raise UserError(f"{folder / 'setid.mat'}: numbers images that imagelabels.mat lacks.")
        entries = [
            SourceImage(
                folder / "jpg" / f"image_{number:05d}.jpg",
                f"{number:09d}",
                f"jpg/image_{number:05d}.jpg",
                CaptionFile(
                    captions / f"class_{labels[number - 1]:05d}" / f"image_{number:05d}.txt", by_line=True
                ),
                {"class": labels[number - 1] - 1},
            )
            for number in numbers
        ]
        return check_files(self.name, entries, folder)


def _matrix(path: Path, name: str) -> list[int]:
    from scipy.io import loadmat

    existing(path, name="a table of Oxford-102")
    try:
        content: Mapping[str, Any] = loadmat(str(path))
        return [int(value) for value in content[name].reshape(-1)]
    # scipy raises anything on damaged files: MatReadError, NotImplementedError, zlib.error, MemoryError, …
    except Exception as error:  # noqa: BLE001 - see above
        raise UserError(f"{path}: not a table of Oxford-102 that holds '{name}' ({error}).") from None
