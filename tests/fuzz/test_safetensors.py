"""Fuzzing of safetensors files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.fuzz.harness import SECONDS, fuzz
from vqd_scale.core.tensors import check_finite, read_tensors

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.float16)}
HEADERS = [
    b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',
    b'{"a":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}',
    b"[" * 5000,
]
CORPUS = [
    save(WEIGHTS, {"schedule": "{}"}),
    save({"n": torch.arange(9), "empty": torch.zeros(0, 3), "small": torch.ones(3).to(torch.float8_e4m3fn)}),
    *(len(header).to_bytes(8, "little") + header for header in HEADERS),
    b"\xff" * 8 + b"{}",
]


@pytest.mark.parametrize("seconds", SECONDS)
def test_safetensors_are_read_or_refused(seconds: float, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        check_finite(read_tensors(path), "file")

    assert fuzz(target, CORPUS, seconds, tmp_path / "failure") > len(CORPUS)
