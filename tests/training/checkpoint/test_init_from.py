"""A bundle's weights into the pieces of several ranks, which are threads here."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.training.ranks import on_ranks, partition_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint import init_from as start
from vqd_scale.training.checkpoint.init_from import start_from
from vqd_scale.training.checkpoint.manager import consolidated


def network() -> nn.Module:
    return nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(7, 3), nn.LayerNorm(3))})


def stored(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Weights as a bundle has them."""
    torch.manual_seed(1)
    weights = {
        name.removeprefix("model."): torch.randn_like(value) for name, value in network().named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors", weights


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_gets_its_own_elements(tmp_path: Path, ranks: int) -> None:
    path, weights = stored(tmp_path)

    def load(world: World) -> list[tuple[str, int, Tensor]]:
        partition = partition_of(network(), world)
        start_from(path, partition, prefix="model.")
        return [
            (piece.name, piece.start, partition.view(partition.masters, piece).clone())
            for piece in partition.pieces
            if piece.length
        ]

    loaded = [piece for rank in on_ranks(ranks, load) for piece in rank]
    assert sum(len(values) for *_, values in loaded) == sum(value.numel() for value in weights.values())
    for name, first, values in loaded:
        whole = weights[name.removeprefix("model.")].flatten()
        assert torch.equal(values, whole[first : first + len(values)])


def test_no_rank_reads_a_whole_tensor_of_which_it_holds_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.arange(64.0).view(16, 4)}, tmp_path / "model.safetensors")
    read: list[tuple[int, int]] = []

    class Recorded:
        """A stored tensor that remembers which of its rows were asked for."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_shape(self) -> list[int]:
            return self.inner.get_shape()

        def __getitem__(self, rows: slice) -> Tensor:
            read.append((rows.start, rows.stop))
            return self.inner[rows]

    class File:
        def __init__(self, path: Path, framework: str) -> None:
            self.inner: Any = safe_open(path, framework=framework)

        def __enter__(self) -> "File":
            self.inner = self.inner.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.inner.keys())

        def get_slice(self, key: str) -> Recorded:
            return Recorded(self.inner.get_slice(key))

    monkeypatch.setattr(start, "safe_open", File)

    def load(world: World) -> None:
        start_from(tmp_path / "model.safetensors", partition_of(nn.Linear(4, 16, bias=False), world))

    on_ranks(3, load)
    # 64 elements in pieces of 22, 22 and 20, in rows of 4.
    assert sorted(read) == [(0, 6), (5, 11), (11, 16)]


def fails(path: Path, *fresh: str) -> str:
    with pytest.raises(UserError) as caught:
        on_ranks(1, lambda world: start_from(path, partition_of(network(), world), "model.", fresh))
    return str(caught.value)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    path, weights = stored(tmp_path)
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(3, 8)
    weights["tower"] = torch.zeros(1)
    save_file(weights, path)
    message = fails(path)
    assert "3 of its tensors are not those that this run trains" in message
    for part in (
        "model.0.bias (absent there, (5,) here)",
        "model.1.weight ((3, 8) there, (3, 7) here)",
        "model.tower ((1,) there, absent here)",
    ):
        assert part in message


def test_what_a_run_adds_is_named_and_starts_anew(tmp_path: Path) -> None:
    path, weights = stored(tmp_path)
    bias = weights.pop("0.bias")
    save_file(weights, path)

    def load(world: World) -> dict[str, Tensor]:
        module = network()
        partition = partition_of(module, world)
        start_from(path, partition, "model.", fresh=["0.bias"])
        found = {piece.name: partition.view(partition.masters, piece) for piece in partition.pieces}
        assert torch.equal(found["model.0.bias"], dict(module.named_parameters())["model.0.bias"])
        return found

    (found,) = on_ranks(1, load)
    assert not torch.equal(found["model.0.bias"], bias)
    assert torch.equal(found["model.2.bias"], weights["2.bias"])
    save_file({**weights, "0.bias": bias}, path)
    assert "model.0.bias ((5,) there, absent here)" in fails(path, "0.bias")


@pytest.mark.parametrize("damage", ["absent", "truncated"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, damage: str) -> None:
    path, _ = stored(tmp_path)
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    assert "cannot be read" in fails(path)


@pytest.mark.ranks
def test_a_run_starts_from_what_another_exported(
    token_world: Path, tmp_path: Path, run_tool: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    config = str(token_world / "train.yaml")
    done = run_tool("train.py", config, f"run={tmp_path / 'first'}", "total_images=16")
    assert done.returncode == 0, done.stderr
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "gone")
    second = tmp_path / "second"
    wanted = (f"run={second}", "total_images=8", "seed=9", f"init_from.bundle={tmp_path / 'first'}")
    done = run_tool("train.py", config, *wanted, ranks=2)
    assert done.returncode == 0, done.stderr
    exported = load_file(tmp_path / "first" / "export" / "model.safetensors")
    for kind in ("master", "ema"):
        began = consolidated(second / "checkpoints" / "000000000000", kind)
        assert {name.removeprefix("model.") for name in began} == set(exported)
        for name, value in began.items():
            assert torch.equal(value, exported[name.removeprefix("model.")])

    done = run_tool("train.py", config, *wanted, f"run={tmp_path / 'other-times'}", "diffusion.steps=5")
    assert done.returncode == 2
    assert "this model knows 10 timesteps, and diffusion.steps is 5" in done.stderr

    weights = tmp_path / "first" / "export" / "tokenizer" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    done = run_tool("train.py", config, *wanted, f"run={tmp_path / 'third'}")
    assert done.returncode == 2
    assert "knows the codes of another tokenizer" in done.stderr
