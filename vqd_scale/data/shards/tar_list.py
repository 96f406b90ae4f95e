"""Names of the tars to index: of a folder, or by webdataset's notation for several tars."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from vqd_scale.core.atomic_io import Location, file_sizes, parse_location
from vqd_scale.core.errors import UserError
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.folder_walk import kind_of, list_folder, warn_of_unused
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE

_SEVERAL = re.compile(r"\.tar$|[*{]|::")
_REPORTS = (INDEX, QUARANTINE, DUPLICATES, "statistics.json")


def list_tars(tars: Location) -> tuple[Location, list[str]]:
    """Return the folder of the tars and their names, sorted; warn of other files in the folder.

    Args:
        tars: Folder; or one tar, a pattern such as ``DIR/*.tar``, braces such as ``DIR/{000..012}.tar``, or
            several of these joined by ``::``.

    Raises:
        UserError: There is no tar, a named one is missing, or they lie in several folders.
    """
    places = [tars] if _is_folder(tars) else _expanded(tars)
    folders = {place if _is_folder(place) else place.parent for place in places}
    if len(folders) > 1:
        raise UserError(
            f"{tars}: names tars in several folders; index each folder by itself, and mix the datasets with "
            f"data.sources."
        )
    (folder,) = folders
    names, unused = _entries(folder)
    selected: set[str] = set()
    for pattern in ["*.tar" if place == folder else place.name for place in places]:
        matches = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matches and pattern != "*.tar":
            raise UserError(f"{folder / pattern}: there is no such tar.")
        selected |= matches
    unused += [(kind_of(name), name) for name in _unused(names, selected)]
    if not selected:
        kinds = ", ".join(sorted({kind for kind, _ in unused})) or "an empty folder"
        raise UserError(f"{folder}: there is no .tar file here, only {kinds}; unpack compressed tars.")
    dangling = [name for name in selected if isinstance(folder, Path) and not (folder / name).is_file()]
    if dangling:
        raise UserError(
            f"{folder / min(dangling)}: is a link to a file that is missing; fetch it, or remove the link."
        )
    warn_of_unused(folder, unused)
    return folder, sorted(selected)


def _is_folder(place: Location) -> bool:
    # Folders in S3 have no entry of their own.
    return place.is_dir() if isinstance(place, Path) else not _SEVERAL.search(place.key)


def _expanded(tars: Location) -> list[Location]:
    if not _SEVERAL.search(str(tars)):
        raise UserError(f"{tars}: there is no such folder; name the folder of the tars.")
    # Imported here: webdataset imports torch.
    from webdataset.shardlists import expand_urls

    try:
        return [parse_location(text) for text in expand_urls(str(tars))]
    except (ValueError, AssertionError) as error:
        raise UserError(f"{tars}: names no tars ({error}).") from None


def _entries(folder: Location) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the names of the files of a folder, and (kind, name) of what is no file."""
    if isinstance(folder, S3Path):
        return sorted(file_sizes(folder)), []
    listing = list_folder(folder, recursive=False)
    return [path.name for path in listing.files], [(kind, path.name) for kind, path in listing.passed_over]


def _unused(names: Sequence[str], selected: set[str]) -> list[str]:
    """Return the files that are not selected, not beside a tar of their name, and not a report of ours."""
    stems = {name.split(".")[0] for name in names if name.endswith(".tar")}
    return [
        name
        for name in names
        if name not in {*selected, *_REPORTS}
        and (".tar" in name or name.split(".")[0].removesuffix("_stats") not in stems)
    ]
