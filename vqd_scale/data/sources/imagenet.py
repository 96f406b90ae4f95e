"""ImageNet, or any folder with a folder of pictures for each class, as a set of shards."""

from pathlib import Path
from typing import Any, cast

from vqd_scale.core.atomic_io import Location, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import PackingConfig, SourceImage, pictures_below, write_pictures


class ImageNetConfig(PackingConfig):
    """How folders of classes become shards.

    Attributes:
        classes: The classes' order and names; see `class_names`.
    """

    classes: Path | None = None


def write_imagenet(config: ImageNetConfig, pictures: Path, folder: Location) -> ShardSet:
    """Write the pictures below a folder of class folders, such as ``train/n01440764/*.JPEG``.

    A sample's ``json`` has the class's number, folder and name, ``cls`` the number, and ``txt`` the name.

    Raises:
        UserError: There is no picture, one lies in no class's folder, a class is not listed; too many are
            unusable; ``folder`` holds another set or cannot be written.
    """
    found = pictures_below(pictures)
    places = [path.relative_to(pictures) for path in found]
    stray = [path for path, place in zip(found, places, strict=True) if len(place.parts) < 2]
    if stray:
        raise UserError(f"{stray[0]}: lies in no class's folder; put each picture into its class's.")
    folders = sorted({place.parts[0] for place in places})
    names = class_names(config.classes, folders)
    numbers = {name: number for number, name in enumerate(names)}
    listed = [
        SourceImage(
            path,
            f"{number:09d}",
            place.as_posix(),
            (names[place.parts[0]],),
            {"class": numbers[place.parts[0]], "folder": place.parts[0], "name": names[place.parts[0]]},
        )
        for number, (path, place) in enumerate(zip(found, places, strict=True))
    ]
    return write_pictures(config, "imagenet", listed, folder, root=pictures)


def class_names(path: Path | None, folders: list[str]) -> dict[str, str]:
    """Each class folder's name for people, in the order of the classes' numbers.

    Args:
        path: ``imagenet_class_index.json`` (number to folder and name), or a text file with a folder and its
            names on each line, as ImageNet's ``LOC_synset_mapping.txt``; without one, the sorted folders.
        folders: The folders that must be listed.

    Raises:
        UserError: The file is neither, or lacks a folder.
    """
    if path is None:
        return {folder: folder.replace("_", " ") for folder in folders}
    names = _from_json(path) if path.suffix == ".json" else _from_text(path)
    missing = [folder for folder in folders if folder not in names]
    if missing:
        raise UserError(f"{path}: lists no class '{missing[0]}', whose folder holds pictures.")
    return names


def _from_json(path: Path) -> dict[str, str]:
    content = read_json(path, "list of classes")
    try:
        entries = sorted((int(number), *entry) for number, entry in cast("dict[str, Any]", content).items())
        return {str(folder): str(name).replace("_", " ") for _, folder, name in entries}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f'{path}: not a list of classes, such as {{"0": ["n01440764", "tench"]}}.') from None


def _from_text(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this list of classes cannot be read ({error}).") from None
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path}: each line must hold a folder and its class's name.")
    # The first of several names: "tench, Tinca tinca".
    return {folder: name.split(",")[0].strip() for folder, name in pairs}
