"""Fuzzing of files of torch.save, in both formats, and of pickles inside valid archives."""

import io
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.core.tensors import check_finite, read_tensors

WEIGHTS = OrderedDict({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.float16)})


def saved(value: object, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES = [saved(WEIGHTS), saved({"state_dict": WEIGHTS, "epoch": 3}), saved(torch.arange(5))]
LEGACY = [saved(WEIGHTS, zipped=False), saved({"model": WEIGHTS, "steps": (1, [2.0])}, zipped=False)]


def pickle_in(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return next(file.read(name) for name in file.namelist() if name.endswith("data.pkl"))


def with_pickle(archive: bytes, content: bytes) -> bytes:
    """Replace the pickle of an archive, with a correct checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as file, zipfile.ZipFile(buffer, "w") as changed:
        for name in file.namelist():
            changed.writestr(name, content if name.endswith("data.pkl") else file.read(name))
    return buffer.getvalue()


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("kind", ["file", "pickle"])
def test_saved_files_are_read_or_refused(kind: str, seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"

    def target(data: bytes) -> None:
        path.write_bytes(data if kind == "file" else with_pickle(FILES[0], data))
        check_finite(read_tensors(path), "file")

    corpus = [*FILES, *LEGACY] if kind == "file" else [pickle_in(file) for file in FILES]
    assert fuzz(target, corpus, seconds / 2, tmp_path / "failure") > len(corpus)
