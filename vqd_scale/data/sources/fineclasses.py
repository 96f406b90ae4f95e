"""Common code of CUB-200-2011 and Oxford-102: captions and class split of Reed et al.

Source of the captions: Reed et al., "Learning Deep Representations of Fine-Grained Visual Descriptions",
CVPR 2016. There is one text file per image, with one caption per line.

Text-to-image papers use Reed's split by *class* (birds: 8,855 training and 2,933 test images), not the
datasets' own split by image. The caption archives list the split in ``trainvalclasses.txt`` and
``testclasses.txt``. The ``filenames.pickle`` in circulation for the same purpose is never opened, since
unpickling runs arbitrary code.
"""

from pathlib import Path

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import read_bounded
from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.sources.base import CaptionFile, SourceImage, existing

_LISTS = {"train": "trainvalclasses.txt", "test": "testclasses.txt"}


def captions_folder(*folders: Path) -> Path:
    """Find the captions folder below some folders.

    Raises:
        UserError: There is none.
    """
    candidates = [folder / name for folder in folders for name in ("text/text", "text", "text_c10")]
    return existing(*dict.fromkeys(candidates), name="the captions' folder")


def listed_classes(split: str, *folders: Path) -> set[str]:
    """Read the classes of a split from its list file in one of the folders or in a parent of one.

    Raises:
        UserError: The split does not exist, or its list file is missing.
    """
    if split not in _LISTS:
        raise UserError(f"split: given '{split}', allowed with protocol=classes: train, test.")
    name = _LISTS[split]
    candidates = [parent / name for folder in folders for parent in (folder, folder.parent)]
    name_of_list = f"the list of the classes for split={split} (without it, set protocol=images)"
    return set(read_table(existing(*dict.fromkeys(candidates), name=name_of_list)).split())


def read_table(path: Path) -> str:
    """Return the text of a table.

    Raises:
        UserError: The file cannot be read, or is not UTF-8.
    """
    try:
        return read_bounded(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this table cannot be read ({error}).") from None


def check_files(name: str, images: list[SourceImage], folder: Path) -> list[SourceImage]:
    """Check that every image and caption file is in the folder, and return the images.

    Raises:
        UserError: A file is missing, or named by a path that leaves the folder, or there is no image.
    """
    files = set(list_folder(folder).files)
    needed = [image.path for image in images]
    needed += [image.captions.path for image in images if isinstance(image.captions, CaptionFile)]
    missing = [path for path in needed if path not in files]
    if missing:
        raise UserError(f"{missing[0]}: missing, as {len(missing)} files are; fetch {name} again.")
    if not images:
        raise UserError(f"{folder}: holds no image of this split.")
    return images
