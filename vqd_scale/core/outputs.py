"""Output folders: a marker lists the files that a tool may write; nothing else in a folder is ever replaced.

A new output folder is absent or empty. Its marker is written before the first output. It lists file names by
purpose, which is the name of the writing tool. Any other folder that contains files belongs to someone else.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vqd_scale.core.atomic_io import is_partial, partial_of, publish_json, sync_to_disk, writing
from vqd_scale.core.errors import UserError

MARKER = ".vqd-output.json"
TRAINING = "training"
"""Purpose of a run folder."""
EXPORT = "a run's export"
"""Purpose of the bundle in a run folder."""
JOBS = "jobs"
"""Name of the folder of launches in a run folder."""

_MARKER_CONTENT = TypeAdapter(dict[str, list[str]])
_PLAIN_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.,=+ -]{0,98}[a-z0-9_=+-])?")
_UNUSABLE_NAME = re.compile(r".*-[0-9a-f]{16}|(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def check_output(
    folder: Path, purpose: str, files: Iterable[str] = (), *, siblings: Collection[str] | None = ()
) -> dict[str, list[str]]:
    """Check that an output folder may be written to; tools call it before the work.

    Args:
        folder: Output folder: absent, empty, or written for the same purpose before.
        purpose: Name of the writing tool.
        files: Names of the files to write, relative to the folder.
        siblings: Entries that a new output folder may contain; None allows all.

    Returns:
        Content of the marker; empty for a new output folder.

    Raises:
        UserError: The folder is a file or a link, or something in it was not written for this purpose.
    """
    if folder.name in ("", "..") or re.search("[\0\ud800-\udfff]", str(folder)):
        raise UserError(f"output: given {str(folder)!r}, allowed: a folder with a name of its own.")
    names, marked = set(files), dict[str, list[str]]()
    with writing(folder):
        paths = folder.iterdir() if folder.is_dir() else ()
        entries = {path.name for path in paths if not is_partial(path.name)}
        if MARKER in entries:
            try:
                marked = _MARKER_CONTENT.validate_json((folder / MARKER).read_bytes())
            except ValidationError:
                raise UserError(f"{folder / MARKER}: damaged; name another output folder.") from None
        parents = {parent for name in names for parent in Path(name).parents[:-1]}
        obstacles = [folder / parent for parent in parents if (folder / parent).is_symlink()]
        if purpose not in marked and (folder.is_symlink() or (folder.exists() and not folder.is_dir())):
            obstacles = [folder]
        elif purpose not in marked and siblings is not None:
            obstacles = [folder / entry for entry in entries.difference(siblings)]
        new = names.difference(marked.get(purpose, ())) if entries else ()
        obstacles += [folder / name for name in new if os.path.lexists(folder / name)]
    if obstacles:
        raise UserError(f"{min(obstacles)}: is in the way, as {purpose} did not write it; name a new folder.")
    return marked


def reserve(
    folder: Path, purpose: str, files: Iterable[str], *, siblings: Collection[str] | None = ()
) -> None:
    """Mark the names of files to be written in an output folder; arguments and errors of `check_output`."""
    names = set(files)
    marked = check_output(folder, purpose, names, siblings=siblings)
    if purpose not in marked or not names.issubset(marked[purpose]):
        names.update(marked.get(purpose, ()))
        publish_json(folder / MARKER, {**marked, purpose: sorted(names)}, shared=True)


@contextmanager
def published_folder(folder: Path, purpose: str) -> Generator[Path]:
    """Yield a temporary folder to fill; on success it becomes the output folder or replaces its files.

    Raises:
        UserError: See `check_output`; or the disk is full, or permission is denied.
    """
    check_output(folder, purpose)
    with writing(folder):
        partial = partial_of(folder)
        partial.mkdir(parents=True)
        try:
            yield partial
            names = [str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()]
            publish_json(partial / MARKER, {purpose: sorted(names)})
            for path in partial.rglob("*"):
                sync_to_disk(path)
            if folder.is_dir() and any(folder.iterdir()):
                reserve(folder, purpose, names)
                # Without the JSON files at the top the folder is no model: they are written last.
                names.sort(key=lambda name: (name.endswith(".json") and "/" not in name, name))
                for name in reversed(names):
                    (folder / name).unlink(missing_ok=True)
                for name in names:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).rename(folder / name)
            else:
                partial.rename(folder)
            sync_to_disk(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def safe_name(key: str, reserved: Collection[str] = ()) -> str:
    """Return a file name for a text from data; different texts get different names, whatever their case.

    A short name of lower-case ASCII letters, digits and ``_.,=+ -`` stays, unless it is ``reserved``; another
    text gets a digest.
    """
    if _PLAIN_NAME.fullmatch(key) and not _UNUSABLE_NAME.fullmatch(key) and key not in reserved:
        return key
    plain = re.sub(r"[^a-z0-9_=+-]+", "_", key.lower()).lstrip("=+-")[:80] or "_"
    return f"{plain}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
