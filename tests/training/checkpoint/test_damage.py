"""Damaged checkpoints are set aside and written again, and never exported, counted or mirrored."""

import errno
import logging
import os
import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.training.checkpoint.damages import DAMAGES, flip_a_byte
from tests.training.checkpoint.test_manager import FILES, checkpoints_of, resumed, saved
from tests.training.rank_threads import on_ranks
from vqd_scale.core.atomic_io import PARTIAL, publish_json, sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.training.checkpoint import manager, manifest
from vqd_scale.training.checkpoint.manager import consolidated, newest_consolidated
from vqd_scale.training.checkpoint.retention import prune
from vqd_scale.training.checkpoint.shards import HostSlices
from vqd_scale.training.config import CheckpointConfig

KEEP = CheckpointConfig(keep_last=5)
MATRIX = [
    # Every file and every damage once in `make test`, all pairs in `make test-all`.
    pytest.param(file, damage, marks=[] if (row + column) % 4 == 0 else pytest.mark.long)
    for row, file in enumerate(FILES)
    for column, damage in enumerate(DAMAGES)
]
every_damage = pytest.mark.parametrize(("file", "damage"), MATRIX)


def names(folder: Path) -> list[str]:
    return sorted(path.name.lstrip("0") for path in folder.iterdir())


def spoil(folder: Path, images: int, file: str, damage: str) -> None:
    DAMAGES[damage](folder / f"{images:012d}" / file)


def digests(checkpoint: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in checkpoint.iterdir()}


@every_damage
def test_checkpoint_found_damaged_is_set_aside_and_saved_again(
    tmp_path: Path, file: str, damage: str
) -> None:
    saved(tmp_path, 8, 16, 24, config=KEEP)
    expected = digests(tmp_path / "000000000024")
    for images in (16, 24):
        spoil(tmp_path, images, file, damage)
    assert resumed(tmp_path) == 8
    assert names(tmp_path) == ["16.damaged", "24.damaged", "8"]
    saved(tmp_path, 24, config=KEEP)
    assert digests(tmp_path / "000000000024") == expected
    # The folder of an image count that training reaches is verified, too; nothing is deleted.
    spoil(tmp_path, 24, file, damage)
    saved(tmp_path, 24, config=KEEP)
    assert digests(tmp_path / "000000000024") == expected
    assert names(tmp_path) == ["16.damaged", "24", "24.damaged", "24.damaged-2", "8"]


@every_damage
@pytest.mark.parametrize("images", [16, 24])
def test_pruning_counts_only_valid_checkpoints(tmp_path: Path, file: str, damage: str, images: int) -> None:
    saved(tmp_path, 8, 16, 24, config=KEEP)
    spoil(tmp_path, images, file, damage)
    prune(tmp_path, CheckpointConfig(keep_last=2))
    assert names(tmp_path) == sorted({"8", "16", "24", f"{images}.damaged"} - {str(images)})


@every_damage
def test_damaged_checkpoint_is_never_consolidated(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 8, 16)
    spoil(tmp_path, 16, file, damage)
    with pytest.raises(UserError, match=file):
        consolidated(tmp_path / "000000000016", "ema")
    images, weights = newest_consolidated(tmp_path, "ema")
    assert images == 8
    assert all((tensor == 208).all() for tensor in weights.values())
    assert f"000000000016: not used, {file} is " in caplog.text
    # Another process may be training in this folder: a reader renames nothing.
    assert names(tmp_path) == ["16", "8"]


@every_damage
def test_damaged_checkpoint_is_never_exported(tmp_path: Path, file: str, damage: str) -> None:
    saved(tmp_path, 8, 16)
    spoil(tmp_path, 16, file, damage)
    exported: list[dict[str, torch.Tensor]] = []

    def export(world: World) -> None:
        checkpoints_of(tmp_path, world).weights(16, exported.append)

    with pytest.raises(UserError, match="run the same command again"):
        on_ranks(2, export)
    assert exported == []
    assert resumed(tmp_path) == 8


@every_damage
def test_damage_reaches_and_leaves_no_mirror(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder, mirror = tmp_path / "here", tmp_path / "there"
    config = CheckpointConfig(mirror=mirror)
    saved(run_folder, 8, 16, config=config)
    spoil(mirror, 16, file, damage)
    shutil.rmtree(run_folder)

    def resume(world: World) -> int:
        restored = checkpoints_of(run_folder, world, config).resume()
        assert restored is not None
        return restored.images

    assert on_ranks(2, resume) == [8, 8]
    assert "000000000016: not used, " in caplog.text
    assert names(run_folder) == ["8"]
    # All local ones are damaged: the copy serves.
    spoil(run_folder, 8, file, damage)
    assert on_ranks(2, resume) == [8, 8]
    assert names(run_folder) == ["8", "8.damaged"]


def test_mirror_without_a_valid_copy_stops_the_run(tmp_path: Path) -> None:
    run_folder, mirror = tmp_path / "here", tmp_path / "there"
    config = CheckpointConfig(mirror=mirror)
    saved(run_folder, 8, config=config)
    shutil.rmtree(run_folder)
    spoil(mirror, 8, FILES[0], "flipped byte")
    with pytest.raises(UserError, match="contains no valid copy"):
        on_ranks(2, lambda world: checkpoints_of(run_folder, world, config).resume())


def test_file_damaged_before_the_upload_is_not_mirrored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def prune_and_damage(folder: Path, *arguments: object) -> None:
        flip_a_byte(folder / "000000000008" / FILES[1])

    monkeypatch.setattr("vqd_scale.training.checkpoint.manager.prune", prune_and_damage)
    saved(tmp_path / "here", 8, config=CheckpointConfig(mirror=tmp_path / "there"))
    assert f"was not copied to the mirror: {FILES[1]} is damaged" in caplog.text
    assert names(tmp_path / "there") == ["8"]
    assert names(tmp_path / "there" / "000000000008") == [FILES[0]]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        "5",
        '"text"',
        "{}",
        "[" * 100_000,
        '{"format": 2}',
        '{"format": 2, "files": 7}',
        "\0",
        "\udcff",
    ],
)
def test_manifest_of_any_shape_is_damage(tmp_path: Path, content: str) -> None:
    saved(tmp_path, 8, 16)
    path = tmp_path / "000000000016" / "manifest.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert resumed(tmp_path) == 8
    assert names(tmp_path) == ["16.damaged", "8"]


def test_damaged_description_of_slices_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def garbled(path: Path, value: object) -> None:
        publish_json(path, [] if path.name.startswith("slices") else value)

    saved(tmp_path, 8)
    with monkeypatch.context() as patch:
        patch.setattr(manager, "publish_json", garbled)
        with pytest.raises(UserError, match=r"slices-0000.-of-00002\.json is damaged"):
            saved(tmp_path, 16)
    assert names(tmp_path) == ["8"]
    assert resumed(tmp_path) == 8


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_byte_is_hashed_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    saved(tmp_path, 8, 16, ranks=3)
    hashed: Counter[Path] = Counter()
    threads: set[int] = set()

    def counting(path: Path) -> str:
        hashed[path] += path.stat().st_size
        threads.add(threading.get_ident())
        return sha256_of(path)

    monkeypatch.setattr(manifest, "sha256_of", counting)
    assert resumed(tmp_path, ranks) == 16
    files = {path for path in (tmp_path / "000000000016").iterdir() if path.suffix == ".safetensors"}
    assert hashed == {path: path.stat().st_size for path in files}
    assert len(threads) == min(ranks, len(files))
    # The export of the checkpoint that was just loaded reads no digest again.
    before = hashed.copy()

    def finish(world: World) -> None:
        checkpoints = checkpoints_of(tmp_path, world)
        checkpoints.resume()
        checkpoints.weights(16, lambda weights: None)

    on_ranks(ranks, finish)
    assert hashed == Counter({path: 2 * count for path, count in before.items()})


@pytest.mark.parametrize(("ranks", "keep_last"), [(2, 2), (3, 3)])
def test_ranks_share_the_reads_before_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, keep_last: int
) -> None:
    """A save reads each file of the checkpoints that it counts once, and a rank reads its share."""
    config = CheckpointConfig(keep_last=keep_last)
    saved(tmp_path, 8, 16, 24, config=config, ranks=ranks)
    hashed: Counter[str] = Counter()
    by_thread: Counter[int] = Counter()

    def counting(path: Path) -> str:
        hashed[path.parent.name] += path.suffix == ".safetensors"
        by_thread[threading.get_ident()] += 1
        return sha256_of(path)

    for module in (manager, manifest):
        monkeypatch.setattr(module, "sha256_of", counting)
    saved(tmp_path, 32, config=config, ranks=ranks)
    assert set(hashed.values()) == {ranks, ranks + 1}
    assert len(hashed) == keep_last
    assert len(by_thread) == ranks
    assert max(by_thread.values()) <= 2 * keep_last
    assert len(names(tmp_path)) == keep_last


def test_slices_damaged_during_a_save_fail_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(host: HostSlices, path: Path) -> dict[str, object]:
        description = whole_write(host, path)
        flip_a_byte(path)
        return description

    saved(tmp_path, 8)
    whole_write = HostSlices.write
    with monkeypatch.context() as patch:
        patch.setattr(HostSlices, "write", write)
        with pytest.raises(UserError, match="damaged while it was written"):
            saved(tmp_path, 16)
    assert names(tmp_path) == ["8"]


def test_only_damaged_checkpoints_stop_every_start(tmp_path: Path) -> None:
    saved(tmp_path, 8)
    spoil(tmp_path, 8, FILES[0], "flipped byte")
    for _ in range(2):
        with pytest.raises(UserError, match=r"000000000008\.damaged had to be set aside"):
            resumed(tmp_path)
    shutil.rmtree(tmp_path / "000000000008.damaged")
    with pytest.raises(AssertionError):
        resumed(tmp_path)


@pytest.mark.parametrize(("code", "is_damage"), [(errno.EACCES, False), (errno.EIO, True)])
def test_forbidden_file_stops_the_start_and_unreadable_disk_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_damage: bool
) -> None:
    def failing(path: Path) -> str:
        if path.name == FILES[1] and path.parent.name.endswith("16"):
            raise OSError(code, os.strerror(code))
        return sha256_of(path)

    saved(tmp_path, 8, 16)
    monkeypatch.setattr(manifest, "sha256_of", failing)
    if is_damage:
        assert resumed(tmp_path) == 8
        return
    with pytest.raises(UserError, match=rf"{FILES[1]}: cannot be read \(Permission denied\)"):
        resumed(tmp_path)
    assert names(tmp_path) == ["16", "8"]


def test_other_folders_and_saves_in_progress_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A save deletes only what is in its own place, and a start only what a kill left behind."""
    saved(tmp_path, 8)
    other_folders = [tmp_path / name for name in ("2024", f"mine{PARTIAL}")]
    in_progress = tmp_path / f"000000000016{PARTIAL}"
    for folder in (*other_folders, in_progress):
        folder.mkdir()
        (folder / "note").write_text("kept")
    saved(tmp_path, 24)
    assert (in_progress / "note").exists()
    with caplog.at_level(logging.WARNING):
        assert resumed(tmp_path) == 24
    assert not in_progress.exists()
    assert all((folder / "note").read_text() == "kept" for folder in other_folders)
    assert caplog.records == []


def test_checkpoint_of_another_process_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process published the same count while this one wrote: a sentence, no traceback."""

    def publish_late(path: Path, value: object) -> None:
        if path.name == "manifest.json":
            path.parent.with_suffix("").mkdir()
            (path.parent.with_suffix("") / "file").touch()
        publish_json(path, value)

    def save(world: World) -> None:
        checkpoints_of(tmp_path, world).save(8, {}, must=True)

    monkeypatch.setattr(manager, "publish_json", publish_late)
    with pytest.raises(UserError, match="cannot be written"):
        on_ranks(2, save)
    assert (tmp_path / "000000000008" / "file").exists()
