"""An index that does not fit the tars, tables that were changed, and files of others in their place."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.shards.test_index_builder import write_tar
from vqd_scale.cli.make_shards import main
from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.index_builder import build_index
from vqd_scale.data.shards.manifest import INDEX, read_index
from vqd_scale.data.shards.parallel_writer import Worker, WorkerIndex, write_own_shards
from vqd_scale.data.shards.quarantine import QUARANTINE, Quarantine
from vqd_scale.data.shards.shard_index import Shard, ShardSet, begin_set
from vqd_scale.data.shards.shard_io import KEY, ShardReader, ShardRecipe, read_shard


def captioned_tars(folder: Path, captions: str = "a large fluffy cat {} on a sofa") -> Path:
    for shard in range(2):
        members = [(f"{shard}{number}.txt", captions.format(number).encode()) for number in range(4)]
        write_tar(folder / f"{shard}.tar", members)
    return folder


def captions_of(folder: Path) -> list[str]:
    shards = ShardSet.open(folder).shards
    return [sample["txt"].decode() for shard in shards for sample in read_shard(shard)]


def replace_keeping_times(path: Path, content: bytes) -> None:
    """Replace a file by one of the same size with the same mtime."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


REPLACEMENTS: dict[str, Callable[[bytes], bytes]] = {
    "another caption": lambda content: content.replace(b"fluffy cat 2", b"fluffy dog 2"),
    "a shorter caption": lambda content: changed_tar(content, lambda members: shorten(members, 1)),
    "another order": lambda content: changed_tar(content, lambda members: members[::-1]),
    "another key": lambda content: changed_tar(content, lambda members: rename(members, 0)),
    "a flipped bit": lambda content: content[:520] + bytes([content[520] ^ 4]) + content[521:],
    "a zeroed page": lambda content: bytes(4096) + content[4096:],
}


Members = list[tuple[str, bytes]]


def shorten(members: Members, number: int) -> Members:
    name, content = members[number]
    return [*members[:number], (name, content[:7]), *members[number + 1 :]]


def rename(members: Members, number: int) -> Members:
    return [*members[:number], ("9.txt", members[number][1]), *members[number + 1 :]]


def changed_tar(content: bytes, change: Callable[[Members], Members]) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members: Members = []
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            members.append((member.name, file.read()))
    with io.BytesIO() as output:
        with tarfile.open(fileobj=output, mode="w") as archive:
            for name, data in change(members):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return output.getvalue()


@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_replaced_tar_is_named_and_indexed_again(tmp_path: Path, replacement: str) -> None:
    folder = captioned_tars(tmp_path / "set")
    build_index(folder)
    path = folder / "1.tar"
    replace_keeping_times(path, REPLACEMENTS[replacement](path.read_bytes()))
    with pytest.raises(UserError, match=r"1\.tar: changed or damaged since it was indexed"):
        captions_of(folder)
    build_index(folder, max_bad_fraction=1.0)
    with tarfile.open(path) as archive:
        names = [member.name.removesuffix(".txt") for member in archive]
    keys = [sample[KEY] for sample in read_shard(ShardSet.open(folder).shards[1])]
    assert keys == names or replacement in ("a zeroed page", "a flipped bit")


def test_tar_of_another_size_is_named_by_every_process(tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    shards = build_index(folder).shards
    path = folder / "1.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"1\.tar: changed .* \(it has 10752 bytes"):
        ShardSet.open(folder)
    with pytest.raises(UserError, match=r"1\.tar: changed .* \(it has 10752 bytes"):
        ShardReader(shards[1])
    path.unlink()
    with pytest.raises(UserError, match=r"1\.tar: missing, as 1 of 2 tars"):
        ShardSet.open(folder)


def test_copied_dataset_is_read_without_indexing(tmp_path: Path) -> None:
    build_index(captioned_tars(tmp_path / "set"))
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    assert captions_of(tmp_path / "copy") == captions_of(tmp_path / "set")


def test_index_with_a_relative_folder_is_used_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    captioned_tars(tmp_path / "data" / "set")
    monkeypatch.chdir(tmp_path / "data")
    build_index(Path("set"), Path("deep/index"))
    expected = captions_of(Path("deep/index"))
    monkeypatch.chdir(tmp_path)
    assert captions_of(Path("data/deep/index")) == expected
    # Moved together with its tars, and then alone.
    (tmp_path / "data").rename(tmp_path / "moved")
    assert captions_of(tmp_path / "moved" / "deep" / "index") == expected
    build_index(tmp_path / "moved" / "set", tmp_path / "moved" / "deep" / "index")
    (tmp_path / "moved" / "deep" / "index").rename(tmp_path / "index")
    assert captions_of(tmp_path / "index") == expected
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(UserError, match=r"0\.tar: missing, as 2 of 2 tars"):
        ShardSet.open(tmp_path / "index")


def test_any_flipped_bit_of_index_or_table_is_noticed(tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    opened = build_index(folder)
    for name in (INDEX, "0.npz"):
        path = folder / name
        content = path.read_bytes()
        for number in range(0, len(content), 1 if name == INDEX else 7):
            damaged = bytearray(content)
            damaged[number] ^= 1 << number % 8
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=name):
                ShardSet.open(folder) if name == INDEX else ShardReader(opened.shards[0])
        path.write_bytes(content)
    assert ShardSet.open(folder) == opened


def with_entry(*names: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        for name in names[:-1]:
            index = index[name]
        if value is None:
            del index[names[-1]]
        else:
            index[names[-1]] = value

    return change


CHANGED_INDICES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no shards": with_entry("shards", value=None),
    "no sizes": with_entry("shards", "size", value=None),
    "a short column": with_entry("shards", "size", value=[10_240]),
    "negative counts": with_entry("shards", "count", value=[-1, 4]),
    "huge counts": with_entry("shards", "count", value=[10**30, 4]),
    "counts that are text": with_entry("shards", "count", value=["4", "4"]),
    "a name of a folder": with_entry("shards", "name", value=["../0.tar", "1.tar"]),
    "a name with NUL": with_entry("shards", "name", value=["0\0.tar", "1.tar"]),
    "a command for the tars": with_entry("tars", value=["pipe:touch x"]),
    "a number for the tars": with_entry("tars", value=5),
    "a list for the metadata": with_entry("meta", value=[]),
}


@pytest.mark.parametrize("change", CHANGED_INDICES)
def test_index_of_another_shape_is_one_sentence(tmp_path: Path, change: str) -> None:
    folder = captioned_tars(tmp_path / "set")
    build_index(folder)
    index = json.loads((folder / INDEX).read_text())
    CHANGED_INDICES[change](index)
    publish_json(folder / INDEX, index)
    with pytest.raises(UserError, match=INDEX):
        ShardSet.open(folder)
    for value in ("[]", "null", "5", "[" * 5000, '{"complete": true}', ""):
        (folder / INDEX).write_text(value)
        with pytest.raises(UserError, match=INDEX):
            read_index(folder)


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content


def test_table_of_another_file_is_one_sentence_and_survives(tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    opened = build_index(folder, tmp_path / "index")
    table = tmp_path / "index" / "0.npz"
    with np.load(table) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    bombs: list[dict[str, Any]] = [
        {"features": np.zeros(3)},
        {"keys": np.array(["a"])},
        {**content, "offsets": content["offsets"].astype(float)},
        {**content, "offsets": content["offsets"] + (1 << 40)},
        {**content, "sizes": content["sizes"] * 0 - 5},
        {**content, "sizes": content["sizes"] * 0 + (1 << 62)},
        {**content, "keys": content["keys"][:2]},
        {**content, "checksums": content["checksums"][:, :0]},
        {**content, "indexed": np.frombuffer(b"[" * 9000, np.uint8)},
        {**content, "column_names": np.array([b"captions"]), "columns": np.full((1, 4), 1e15)},
    ]
    for number, arrays in enumerate(bombs):
        (np.savez_compressed if number % 3 == 2 else np.savez)(table, **arrays)
        before = table.read_bytes()
        for read in (lambda: ShardReader(opened.shards[0]), lambda: build_index(folder, tmp_path / "index")):
            with pytest.raises(UserError, match=r"0\.npz: not a readable table of a shard.*move it away"):
                read()
        assert table.read_bytes() == before


def test_file_of_a_user_in_the_place_of_a_table_survives(tmp_path: Path) -> None:
    folder = captioned_tars(tmp_path / "set")
    np.savez(folder / "0.npz", features=np.zeros(3))
    before = (folder / "0.npz").read_bytes()
    with pytest.raises(UserError, match=r"0\.npz: is in the way; name another folder"):
        build_index(folder)
    assert (folder / "0.npz").read_bytes() == before
    assert build_index(folder, tmp_path / "index").count == 8


@pytest.mark.parametrize("target", ["0.tar", ".", INDEX, "0.npz", "index/0.npz"])
def test_what_may_not_be_read_is_one_sentence(tmp_path: Path, target: str) -> None:
    """Run as a user who has no rights beyond those of the file."""
    folder = captioned_tars(tmp_path / "set")
    is_indexed = target not in ("0.tar", ".")
    if is_indexed:
        build_index(folder, folder / "index" if "/" in target else None)
    (folder / target).chmod(0)
    arguments = ["index", "set", "--output", "set/index" if "/" in target else "set" if is_indexed else "out"]
    without_rights = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"]
    script = Path(__file__).parents[3] / "tools" / "make_shards.py"
    command = [*(without_rights if os.geteuid() == 0 else []), sys.executable, str(script), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (folder / target).chmod(0o755)
    assert result.returncode == 2, result.stderr
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("make_shards.py: set") and "ermission denied" in last_line


def test_damaged_part_of_a_worker_is_one_sentence(tmp_path: Path) -> None:
    recipes = [ShardRecipe(f"{number}.tar", 1, lambda: [{KEY: "a", "txt": "b"}]) for number in range(2)]
    begin_set(tmp_path, {})

    def count(shard: Shard) -> NDArray[np.int64]:
        return np.array([shard.count])

    def work(number: int) -> WorkerIndex | None:
        return write_own_shards(
            tmp_path,
            recipes,
            Worker(number, 2),
            count,
            "test",
            max_bad_fraction=0,
        )

    assert work(0) is None
    for content in ("[]", "{", '{"shards": [{}], "totals": []}', '{"shards": [], "totals": [1.5]}'):
        (tmp_path / "worker-0-of-2.json").write_text(content)
        with pytest.raises(UserError, match=r"worker-0-of-2\.json: damaged .*; start worker 0 again"):
            work(1)
    work(0)
    merged = work(1)
    assert merged is not None
    assert merged.totals.tolist() == [2]


def test_damaged_report_is_kept_and_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / QUARANTINE
    Quarantine(path).extend([("0.tar", "a\udcff", "is bad"), ("0.tar", "b", "is bad")])
    first, second = path.read_bytes().splitlines()
    damaged = b"\n".join([first, b"\xff\xfe", bytes(600), b'{"shard": 5}', b"[]", second, second[:20]])
    path.write_bytes(damaged)
    again = Quarantine(path)
    again.extend([("0.tar", "b", "is bad"), ("0.tar", "c", "is bad")])
    assert len(again) == 3
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a\\udcff", "b", "c"]
    assert path.with_name(QUARANTINE + ".damaged").read_bytes() == damaged
    assert "4 damaged lines are left out" in caplog.text


def test_index_command_names_a_stale_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = captioned_tars(tmp_path / "set")
    main(["index", str(folder)])
    path = folder / "0.tar"
    replace_keeping_times(path, path.read_bytes().replace(b"sofa", b"lawn"))
    main(["index", str(folder)])
    assert captions_of(folder)[0] == "a large fluffy cat 0 on a lawn"
    assert "8 samples in 2 shards" in capsys.readouterr().out
