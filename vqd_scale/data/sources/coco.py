"""MSCOCO captions as shards: one sample per image, with all its captions."""

from collections import defaultdict
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.folder_walk import list_folder
from vqd_scale.data.sources.base import ImageSource, SourceImage, existing

_Id = int | float | str


class _Image(TypedDict):
    id: _Id
    file_name: str


class _Annotation(TypedDict):
    id: NotRequired[_Id]
    image_id: _Id
    caption: str | None


class _Annotations(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]


_SHAPE = TypeAdapter(_Annotations)


class CocoConfig(ImageSource):
    """Pack one split of MSCOCO; SOURCE contains annotations/ and the image folders.

    A sample's key is the image id, ``txt`` the first caption, and ``json`` has all captions. The input folder
    contains ``annotations/captions_train2014.json`` (or another split) and the images in ``train2014``,
    ``train2014/train2014`` or ``images/train2014``. If an id is not a number, the keys number the images.

    Source: Chen et al., "Microsoft COCO Captions: Data Collection and Evaluation Server", 2015.
    """

    name: ClassVar[str] = "coco"
    example: ClassVar[str] = "/data/coco runs/coco/val year=2014 split=val"
    year: Literal[2014, 2017] = 2014
    """Release year of the train/val split."""
    split: Literal["train", "val"] = "train"
    """Split to pack."""

    def list_images(self, folder: Path) -> list[SourceImage]:
        """Return the images of the split, ordered by id."""
        part = f"{self.split}{self.year}"
        lists = (folder / "annotations" / f"captions_{part}.json", folder / f"captions_{part}.json")
        annotations = existing(*lists, name=f"COCO's file of captions for {part}")
        places = (folder / part / part, folder / part, folder / "images" / part)
        image_folder = existing(*places, name=f"COCO's folder of images {part}")
        content = read_json(annotations, "file of COCO captions", _SHAPE)
        captions: defaultdict[int | str, list[str]] = defaultdict(list)
        for entry in sorted(content["annotations"], key=lambda entry: _order(_id(entry.get("id", 0)))):
            captions[_id(entry["image_id"])].append(" ".join((entry["caption"] or "").split()))
        names: dict[int | str, str] = {}
        for image in content["images"]:
            if names.setdefault(_id(image["id"]), image["file_name"]) != image["file_name"]:
                raise UserError(f"{annotations}: {image['id']} is the id of two images.")
        listing = list_folder(image_folder)
        files = {path.relative_to(image_folder).as_posix() for path in listing.files}
        is_numbered = all(isinstance(number, int) and 0 <= number < 10**12 for number in names)
        images: list[SourceImage] = []
        for position, (number, name) in enumerate(sorted(names.items(), key=lambda item: _order(item[0]))):
            file = _file_name(name, number, part, files)
            fault = "" if file else f"is not in {image_folder.name}; fetch COCO's {part} again"
            images.append(
                SourceImage(
                    image_folder / file,
                    f"{number if is_numbered else position:012d}",
                    f"{part}/{name}",
                    tuple(captions[number]),
                    {"image_id": number},
                    fault if captions[number] else "has no caption in COCO's file",
                )
            )
        listing.report(image.path for image in images)
        return images


def _id(value: _Id) -> int | str:
    """Return an id as a number if it is one; some files have ``"000000000139"`` or ``139.0``."""
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value)
    return int(text) if text.isdecimal() and len(text) < 20 else text


def _order(number: int | str) -> tuple[int, str]:
    """Return a key for sorting: numbers before texts."""
    return (number, "") if isinstance(number, int) else (10**20, number)


def _file_name(name: str, number: int | str, part: str, files: set[str]) -> str:
    """Return an image's path in its folder, or ''; 2017 names are 2014 names without the split prefix."""
    candidates = [name, name.replace("\\", "/").rpartition(f"{part}/")[2]]
    if isinstance(number, int):
        candidates += [f"{number:012d}.jpg", f"COCO_{part}_{number:012d}.jpg"]
    return next((candidate for candidate in candidates if candidate in files), "")
