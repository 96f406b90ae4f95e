from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import read_tensors, write_tensors

WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


class Planted:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_all_kinds_of_files_give_the_same(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    torch.save(WEIGHTS, tmp_path / "w.pt")
    torch.save(WEIGHTS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": WEIGHTS | {"epoch": 3}, "epoch": 3}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.pt", "old.bin", "w.ckpt"):
        found = read_tensors(tmp_path / name)
        assert found.keys() == WEIGHTS.keys()
        assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    torch.save(WEIGHTS["a"], tmp_path / "single.pt")
    assert list(read_tensors(tmp_path / "single.pt")) == [""]


@pytest.mark.parametrize("new_format", [True, False])
def test_trap_33_a_pickle_that_would_run_is_not_run(tmp_path: Path, new_format: bool) -> None:
    witness = tmp_path / "witness"
    torch.save(
        WEIGHTS | {"c": Planted(witness)}, tmp_path / "w.pt", _use_new_zipfile_serialization=new_format
    )
    with pytest.raises(UserError, match="nothing in it was executed"):
        read_tensors(tmp_path / "w.pt")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_cut_and_garbled_files_are_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(WEIGHTS, path) if name == "w.pt" else save_file(WEIGHTS, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"garbage " * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"w\.(pt|safetensors): is damaged"):
            read_tensors(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_a_torchscript_program_is_to_be_converted(tmp_path: Path) -> None:
    program: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    program.save(str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match=r"is a TorchScript program.*convert it by"):
        read_tensors(tmp_path / "ViT-B-32.pt")


def test_missing_files_and_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "w.pt")


def test_what_is_written_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3).T, "n": torch.tensor([1, 2])}
    write_tensors(tmp_path / "w.safetensors", tensors, {"schedule": "paper"})
    read = read_tensors(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    (tmp_path / "other").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
