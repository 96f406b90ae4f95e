"""Loading a bundle's weights into the partitions of several ranks, which are threads."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.training.rank_threads import on_ranks, partition_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint import init_from as start
from vqd_scale.training.checkpoint.init_from import load_initial_weights
from vqd_scale.training.checkpoint.manager import consolidated


def network() -> nn.Module:
    return nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(7, 3), nn.LayerNorm(3))})


def stored(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write weights as in a bundle."""
    torch.manual_seed(1)
    weights = {
        name.removeprefix("model."): torch.randn_like(value) for name, value in network().named_parameters()
    }
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors", weights


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_rank_loads_its_own_elements(tmp_path: Path, ranks: int) -> None:
    path, weights = stored(tmp_path)

    def load(world: World) -> list[tuple[str, int, Tensor]]:
        partition = partition_of(network(), world)
        load_initial_weights(path, partition, prefix="model.")
        return [
            (piece.name, piece.start, partition.view(partition.masters, piece).clone())
            for piece in partition.pieces
            if piece.length
        ]

    loaded = [piece for rank in on_ranks(ranks, load) for piece in rank]
    assert sum(len(values) for *_, values in loaded) == sum(value.numel() for value in weights.values())
    for name, first, values in loaded:
        flat_weight = weights[name.removeprefix("model.")].flatten()
        assert torch.equal(values, flat_weight[first : first + len(values)])


def test_ranks_read_only_the_rows_of_their_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"weight": torch.arange(64.0).view(16, 4)}, tmp_path / "model.safetensors")
    read_ranges: list[tuple[int, int]] = []

    class Recorded:
        """Stored tensor that records the requested rows."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_shape(self) -> list[int]:
            return self.inner.get_shape()

        def __getitem__(self, rows: slice) -> Tensor:
            read_ranges.append((rows.start, rows.stop))
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
        load_initial_weights(
            tmp_path / "model.safetensors", partition_of(nn.Linear(4, 16, bias=False), world)
        )

    on_ranks(3, load)
    # 64 elements in pieces of 22, 22 and 20, in rows of 4.
    assert sorted(read_ranges) == [(0, 6), (5, 11), (11, 16)]


def fails(path: Path, *fresh: str) -> str:
    with pytest.raises(UserError) as caught:
        on_ranks(1, lambda world: load_initial_weights(path, partition_of(network(), world), "model.", fresh))
    return str(caught.value)


def test_mismatched_tensors_are_listed(tmp_path: Path) -> None:
    path, weights = stored(tmp_path)
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(3, 8)
    weights["tower"] = torch.zeros(1)
    save_file(weights, path)
    message = fails(path)
    assert "3 of its tensors differ from those that this run trains" in message
    for part in (
        "model.0.bias (None in the file, (5,) in the run)",
        "model.1.weight ((3, 8) in the file, (3, 7) in the run)",
        "model.tower ((1,) in the file, None in the run)",
    ):
        assert part in message


def test_missing_tensors_must_be_named_and_are_initialized(tmp_path: Path) -> None:
    path, weights = stored(tmp_path)
    bias = weights.pop("0.bias")
    save_file(weights, path)

    def load(world: World) -> dict[str, Tensor]:
        module = network()
        partition = partition_of(module, world)
        load_initial_weights(path, partition, "model.", init_missing=["0.bias"])
        loaded_values = {piece.name: partition.view(partition.masters, piece) for piece in partition.pieces}
        assert torch.equal(loaded_values["model.0.bias"], dict(module.named_parameters())["model.0.bias"])
        return loaded_values

    (loaded_values,) = on_ranks(1, load)
    assert not torch.equal(loaded_values["model.0.bias"], bias)
    assert torch.equal(loaded_values["model.2.bias"], weights["2.bias"])
    save_file({**weights, "0.bias": bias}, path)
    assert "model.0.bias ((5,) in the file, None in the run)" in fails(path, "0.bias")


@pytest.mark.parametrize("damage", ["absent", "truncated"])
def test_unreadable_file_raises_user_error(tmp_path: Path, damage: str) -> None:
    path, _ = stored(tmp_path)
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    assert "cannot be read" in fails(path)


@pytest.mark.ranks
def test_run_starts_from_an_exported_bundle(
    token_world: Path, tmp_path: Path, run_tool: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    config = str(token_world / "train.yaml")
    completed = run_tool("train.py", config, f"run={tmp_path / 'first'}", "total_images=16")
    assert completed.returncode == 0, completed.stderr
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "gone")
    second = tmp_path / "second"
    run_overrides = (f"run={second}", "total_images=8", "seed=9", f"init_from.bundle={tmp_path / 'first'}")
    completed = run_tool("train.py", config, *run_overrides, ranks=2)
    assert completed.returncode == 0, completed.stderr
    exported = load_file(tmp_path / "first" / "export" / "model.safetensors")
    for kind in ("master", "ema"):
        began = consolidated(second / "checkpoints" / "000000000000", kind)
        assert {name.removeprefix("model.") for name in began} == set(exported)
        for name, value in began.items():
            assert torch.equal(value, exported[name.removeprefix("model.")])

    completed = run_tool(
        "train.py", config, *run_overrides, f"run={tmp_path / 'other-times'}", "diffusion.steps=5"
    )
    assert completed.returncode == 2
    assert "this model was trained with 10 timesteps, and diffusion.steps is 5" in completed.stderr

    weights = tmp_path / "first" / "export" / "tokenizer" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    completed = run_tool("train.py", config, *run_overrides, f"run={tmp_path / 'third'}")
    assert completed.returncode == 2
    assert "was trained on the codes of another tokenizer" in completed.stderr
