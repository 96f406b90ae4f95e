from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import check_finite, read_tensors, write_tensors

WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


class Planted:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_all_file_formats_load_equal_tensors(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    torch.save(WEIGHTS, tmp_path / "w.pt")
    torch.save(WEIGHTS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": WEIGHTS | {"epoch": 3}, "epoch": 3}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.pt", "old.bin", "w.ckpt"):
        loaded_weights = read_tensors(tmp_path / name)
        assert loaded_weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(loaded_weights[key], WEIGHTS[key]) for key in WEIGHTS)
    torch.save(WEIGHTS["a"], tmp_path / "single.pt")
    assert list(read_tensors(tmp_path / "single.pt")) == [""]


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_with_code_is_not_executed(tmp_path: Path, new_format: bool) -> None:
    witness = tmp_path / "witness"
    torch.save(
        WEIGHTS | {"c": Planted(witness)}, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(UserError, match="nothing in it was executed"):
        read_tensors(tmp_path / "w.pt")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_raise_user_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(WEIGHTS, path) if name == "w.pt" else save_file(WEIGHTS, path)
    file_bytes = path.read_bytes()
    for damaged in (b"", file_bytes[: len(file_bytes) // 2], b"garbage " * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.(pt|safetensors): is damaged"):
            read_tensors(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_torchscript_file_raises_user_error(tmp_path: Path) -> None:
    program: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    program.save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match=r"is a TorchScript program.*convert it by"):
        read_tensors(tmp_path / "ViT-B-32.pt")


def test_missing_and_foreign_files_raise_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "w.pt")


def test_safetensors_are_recognized_by_content(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_nonfinite_weights_are_refused(dtype: torch.dtype) -> None:
    weights = {"ids": torch.arange(3), "none": torch.zeros(0), "w": torch.ones(3, 5, dtype=dtype)}
    check_finite(weights, "file")
    for value in (torch.nan, torch.inf, -torch.inf):
        weights["w"][1, 2] = value
        with pytest.raises(UserError, match="file: the weight 'w' has NaN or infinite values"):
            check_finite(weights, "file")


def test_written_file_has_default_permissions(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor([1, 2])}
    write_tensors(tmp_path / "w.safetensors", tensors, {"schedule": "paper"})
    loaded_tensors = read_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(loaded_tensors[name], value) for name, value in tensors.items())
    (tmp_path / "other").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
