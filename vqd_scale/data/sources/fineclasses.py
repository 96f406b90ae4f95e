"""What the birds and the flowers share: Reed's captions, and his division of the classes.

The captions are those of Reed et al., "Learning Deep Representations of Fine-Grained Visual Descriptions",
CVPR 2016: a text file per picture, a caption on each line.

Text-to-image papers do not use the data sets' own division of the pictures but Reed's of the *classes*
(birds: 8,855 pictures for training and 2,933 for tests), which the captions' archives state in
``trainvalclasses.txt`` and ``testclasses.txt``. The ``filenames.pickle`` that circulates for the same purpose
is never opened, since to open a pickle is to run whatever it holds.
"""

from pathlib import Path

from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.sources.base import CaptionFile, PackingConfig, SourceImage, existing, write_pictures

_LISTS = {"train": "trainvalclasses.txt", "test": "testclasses.txt"}


def captions_folder(*folders: Path) -> Path:
    """Where the captions lie below some folders.

    Raises:
        UserError: They do not.
    """
    candidates = [folder / name for folder in folders for name in ("text/text", "text", "text_c10")]
    return existing(*dict.fromkeys(candidates), what="the captions' folder")


def listed_classes(split: str, *folders: Path) -> set[str]:
    """The classes of a part by the list in one of some folders, or beside it.

    Raises:
        UserError: There is no such part or no list of it.
    """
    if split not in _LISTS:
        raise UserError(f"split: given '{split}', allowed with protocol=classes: train, test.")
    name = _LISTS[split]
    candidates = [parent / name for folder in folders for parent in (folder, folder.parent)]
    what = f"the list of the classes for split={split} (without it, set protocol=pictures)"
    return set(existing(*dict.fromkeys(candidates), what=what).read_text(encoding="utf-8").split())


def write_captioned(
    config: PackingConfig, name: str, pictures: list[SourceImage], folder: Location, root: Path
) -> ShardSet:
    """Write pictures all of which must have their captions.

    Raises:
        UserError: A file is missing, there is no picture, or see `write_pictures`.
    """
    captions = [picture.captions for picture in pictures]
    needed = [picture.path for picture in pictures]
    needed += [caption.path for caption in captions if isinstance(caption, CaptionFile)]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: missing, as {len(missing)} files are; fetch {name} again.")
    if not pictures:
        raise UserError(f"{root}: holds no picture of this part.")
    return write_pictures(config, name, pictures, folder, root=root)
