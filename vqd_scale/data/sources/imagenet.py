"""ImageNet, or any folder with one image folder per class, as shards."""

from pathlib import Path
from typing import ClassVar

from pydantic import TypeAdapter

from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import read_bounded
from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.sources.base import ImageSource, SourceImage, images_of, name_below

_CLASS_INDEX = TypeAdapter(dict[str, tuple[str, str]])


class ImageNetConfig(ImageSource):
    """Pack ImageNet, or any folder that has one folder of images per class, such as ``n01440764``.

    A sample's ``json`` has the class number, folder and name; ``cls`` is the number and ``txt`` the name.
    """

    name: ClassVar[str] = "imagenet"
    example: ClassVar[str] = "/data/imagenet/train runs/imagenet classes=LOC_synset_mapping.txt"
    classes: Path | None = None
    """File with the order and names of the classes; see `class_names`."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the images below the class folders.

        Raises:
            UserError: There is no image, one is outside of the class folders, or a class is not listed.
        """
        listing = list_folder(folder)
        paths = images_of(listing)
        listing.report(paths)
        sources = [name_below(path, folder) for path in paths]
        misplaced = [path for path, source in zip(paths, sources, strict=True) if "/" not in source]
        if misplaced:
            raise UserError(f"{misplaced[0]}: lies in no class's folder; put each image into its class's.")
        folders = [source.partition("/")[0] for source in sources]
        names = class_names(self.classes, sorted(set(folders)))
        numbers = {name: number for number, name in enumerate(names)}
        return [
            SourceImage(
                path,
                f"{number:09d}",
                source,
                (names[class_folder],),
                {"class": numbers[class_folder], "folder": class_folder, "name": names[class_folder]},
            )
            for number, (path, source, class_folder) in enumerate(zip(paths, sources, folders, strict=True))
        ]


def class_names(path: Path | None, folders: list[str]) -> dict[str, str]:
    """Return the readable name of each class folder, in the order of the class numbers.

    Args:
        path: ``imagenet_class_index.json`` (number to folder and name), or a text file with a folder and its
            names on each line, as ImageNet's ``LOC_synset_mapping.txt``. None takes the sorted folders.
        folders: Folders that the file must list.

    Raises:
        UserError: The file has neither format, or does not list a folder.
    """
    if path is None:
        return {folder: folder.replace("_", " ") for folder in folders}
    names = _from_json(path) if path.suffix == ".json" else _from_text(path)
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise UserError(f"{path}: lists no class '{missing[0]}', whose folder holds images.")
    return names


def _from_json(path: Path) -> dict[str, str]:
    content = read_json(path, 'list of classes, such as {"0": ["n01440764", "tench"]},', _CLASS_INDEX)
    try:
        numbers = {int(number): entry for number, entry in content.items()}
    except ValueError:
        raise UserError(f"{path}: a key of this list of classes is not a number.") from None
    return {folder: name.replace("_", " ") for _, (folder, name) in sorted(numbers.items())}


def _from_text(path: Path) -> dict[str, str]:
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: this list of classes cannot be read ({error}).") from None
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path}: each line must hold a folder and its class's name.")
    # Keep the first of several names, as in "tench, Tinca tinca".
    return {folder: name.split(",")[0].strip() for folder, name in pairs}
