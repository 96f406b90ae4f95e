"""MSCOCO captions as shards: one sample per image, with all its captions."""

from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from vqd_scale.core.atomic_io import file_sizes, read_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.sources.base import ImageSource, SourceImage, existing


class CocoConfig(ImageSource):
    """Pack one split of MSCOCO; SOURCE contains annotations/ and the image folders.

    A sample's key is the image id, ``txt`` the first caption, and ``json`` has all captions. The input folder
    contains ``annotations/captions_train2014.json`` (or another split) and the images in ``train2014``,
    ``train2014/train2014`` or ``images/train2014``.

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
        images, captions = _annotated(annotations)
        files = file_sizes(image_folder)
        return [
            SourceImage(
                image_folder / _file_name(image, part, files, image_folder),
                f"{image['id']:012d}",
                f"{part}/{image['file_name']}",
                captions[image["id"]],
                {"image_id": image["id"]},
            )
            for image in images
        ]


def _annotated(path: Path) -> tuple[list[dict[str, Any]], dict[int, tuple[str, ...]]]:
    """Return the images sorted by id, and the captions of each image sorted by caption id."""
    content = read_json(path, "file of COCO captions")
    try:
        images = sorted(content["images"], key=lambda image: image["id"])
        captions: dict[int, list[str]] = defaultdict(list)
        for entry in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions[entry["image_id"]].append(" ".join(entry["caption"].split()))
        names = [(int(image["id"]), str(image["file_name"])) for image in images]
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: not COCO's captions: 'images', and 'annotations' with 'image_id' and 'caption'."
        ) from None
    captionless = [name for number, name in names if not captions.get(number)]
    if captionless:
        raise UserError(
            f"{path}: has no caption for {captionless[0]}, as for {len(captionless)} of {len(names)}."
        )
    return images, {number: tuple(captions[number]) for number, _ in names}


def _file_name(image: dict[str, Any], part: str, files: dict[str, int], folder: Path) -> str:
    """Return an image's file name in this folder; 2017 names are 2014 names without the split prefix."""
    number = image["id"]
    names = (image["file_name"], f"{number:012d}.jpg", f"COCO_{part}_{number:012d}.jpg")
    for name in names:
        if name in files:
            return name
    raise UserError(f"{folder / image['file_name']}: this image is missing; fetch COCO's {part} again.")
