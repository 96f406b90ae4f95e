"""C functions of this package for the CPU, compiled on first use."""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vqd_scale.core.environment import processor_features

logger = logging.getLogger(__name__)

FLAGS = "-O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -shared -fPIC"


def compiled(source: Path, consequence: str, *flags: str) -> ctypes.CDLL | None:
    """Load the library of a C file from the user's cache or compile it; ``None`` on failure, with a warning.

    Args:
        source: C file.
        consequence: What happens without the library, for the warning.
        flags: Further flags of the compiler; part of the library's name in the cache.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        logger.warning("no C compiler is installed; %s", consequence)
        return None
    try:
        return ctypes.CDLL(str(_build(source, compiler, flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("%s cannot be built by %s or saved; %s: %s", source, compiler, consequence, reason)
        return None


def over_threads(compute: Callable[[int, int], int], items: int, threads: int) -> None:
    """Call a C function on consecutive ranges of items, one range per thread.

    Args:
        compute: Function from the first item and the item after the last to 0, or 1 if memory was short.
        items: Number of items.
        threads: Number of threads.

    Raises:
        MemoryError: A call returned 1.
    """
    count = max(1, min(threads, items))
    cuts = [items * part // count for part in range(count + 1)]
    apply = _threads(os.getpid(), count).map if count > 1 else map
    if any(list(apply(compute, cuts[:-1], cuts[1:]))):
        raise MemoryError(f"{items} items of a compiled function")


def _build(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    command = [compiler, *FLAGS.split(), *flags, str(source)]
    identity = repr((source.read_bytes(), command, sorted(processor_features())))
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "vqd_scale"
    library = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            temporary = Path(scratch) / library.name
            subprocess.run(  # noqa: S603 - our own source, and the user's own compiler
                [*command, "-o", str(temporary), "-lm"], capture_output=True, text=True, check=True
            )
            temporary.replace(library)
    return library


@functools.lru_cache(maxsize=1)
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    # One pool per process: threads do not survive a fork.
    return ThreadPoolExecutor(count, f"compiled-{process}")
