"""ImageNet, or any folder with one image folder per class, as shards."""

from pathlib import Path
from typing import Any, cast

from vqd_scale.core.atomic_io import Location, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import PackingConfig, SourceImage, pictures_below, write_pictures


class ImageNetConfig(PackingConfig):
    """Packing of class folders.

    Attributes:
        classes: File with the order and names of the classes; see `class_names`.
    """

    classes: Path | None = None


def write_imagenet(config: ImageNetConfig, pictures: Path, folder: Location) -> ShardSet:
    """Pack the images below a folder of class folders, such as ``train/n01440764/*.JPEG``.

    A sample's ``json`` has the class number, folder and name; ``cls`` is the number and ``txt`` the name.

    Raises:
        UserError: There is no image; an image is outside of the class folders; a class is not listed; too
            many images are unusable; ``folder`` contains another dataset or cannot be written.
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
    # Keep the first of several names, as in "tench, Tinca tinca".
    return {folder: name.split(",")[0].strip() for folder, name in pairs}
