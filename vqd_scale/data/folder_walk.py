"""Listing of folders: one walk for all sources, which reports what it passes over."""

import logging
import os
import re
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vqd_scale.core.errors import UserError

logger = logging.getLogger(__name__)

_SYSTEM = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders that operating systems and file servers create, besides those whose names begin with a dot."""


@dataclass(frozen=True)
class FolderListing:
    """Files of a folder, sorted by path.

    Attributes:
        folder: The folder.
        files: Files, and links whose target is missing, which are reported when they are read.
        passed_over: Kind and path of each entry that is neither a file nor a folder to list.
    """

    folder: Path
    files: list[Path]
    passed_over: list[tuple[str, Path]]

    def report(self, used_files: Iterable[Path]) -> None:
        """Warn of everything that is not used, in one sentence: the number and an example of each kind."""
        used = set(used_files)
        unused = [(kind_of(path.name), path) for path in self.files if path not in used] + self.passed_over
        warn_of_unused(self.folder, [(kind, str(path.relative_to(self.folder))) for kind, path in unused])


def warn_of_unused(folder: object, unused: Iterable[tuple[str, str]]) -> None:
    """Warn of (kind, name) of the entries of a folder that are not used, in one sentence."""
    examples = dict(reversed(list(unused)))
    counts = Counter(kind for kind, _ in unused)
    if counts:
        kinds = (f"{count:,} {kind} ({examples[kind]})" for kind, count in counts.most_common())
        logger.warning("%s: not used: %s", folder, ", ".join(kinds))


def list_folder(folder: Path, *, recursive: bool = True) -> FolderListing:
    """List a folder with its subfolders; links to folders are followed, and each folder is listed once.

    Hidden entries, such as ``.ipynb_checkpoints`` and ``._0.jpg``, and system folders are passed over.

    Args:
        folder: Folder.
        recursive: List subfolders too.

    Raises:
        UserError: The folder does not exist, or it or a subfolder cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the folder that holds the files.")
    files: list[Path] = []
    passed_over: list[tuple[str, Path]] = []
    visited: set[tuple[int, int]] = set()
    # Links come last, so that a folder is listed under its own name rather than under that of a link.
    folders, links = [folder], deque[Path]()
    while folders or links:
        current = folders.pop() if folders else links.popleft()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in visited:
                passed_over.append(("links to listed folders", current))
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(current) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                path, is_link = current / entry.name, entry.is_symlink()
                if entry.name.startswith(".") or entry.name in _SYSTEM:
                    passed_over.append(("hidden", path))
                elif path.is_dir() if is_link else entry.is_dir():
                    if recursive:
                        (links if is_link else folders).append(path)
                    else:
                        passed_over.append(("folders", path))
                elif is_link or entry.is_file():
                    files.append(path)
                else:
                    passed_over.append(("special files", path))
        except OSError as error:
            raise UserError(
                f"{current}: cannot be read ({error.strerror}); allow it, or move it elsewhere."
            ) from None
    return FolderListing(folder, sorted(files), passed_over)


def kind_of(name: str) -> str:
    """Return the kind of a file by its name: its extension, such as ``.tar.gz``."""
    suffix = re.search(r"(\.tar)?\.\w+$", name)
    return suffix[0] if suffix else "without extension"
