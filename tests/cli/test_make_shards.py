import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from vqd_scale.cli.make_shards import main
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.shard_index import ShardSet

ROOT = Path(__file__).parents[2]
SMALL_DATASET = ["train_samples=20", "held_out_samples=5", "samples_per_shard=8"]


def failing(arguments: Sequence[str], capture: pytest.CaptureFixture[str]) -> str:
    """Return the single line on stderr of a command that exits with code 2."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    output = capture.readouterr()
    assert output.out == ""
    return output.err


def test_shapes_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shapes", str(tmp_path / "out"), *SMALL_DATASET])
    assert "20 samples in 3 shards" in capsys.readouterr().out
    assert ShardSet.open(tmp_path / "out" / "train").count == 20
    assert ShardSet.open(tmp_path / "out" / "held_out").count == 5


def test_imagefolder_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        Image.radial_gradient("L").rotate(number).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("a soft spot")
    (tmp_path / "in" / "1.png").write_bytes(b"nothing")
    main(
        ["imagefolder", str(tmp_path / "in"), str(tmp_path / "out"), "image_size=16", "max_bad_fraction=0.5"]
    )
    output = capsys.readouterr().out
    assert "2 samples in 1 shards" in output
    assert "quarantine.jsonl" in output


@pytest.mark.long
@pytest.mark.ranks
def test_restart_after_kill_writes_equal_bytes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (300, 300, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text(f"noise {number}")
    (tmp_path / "in" / "7.png").write_bytes(b"nothing")
    settings = ["image_size=256", "samples_per_shard=5", "max_bad_fraction=0.1"]

    def command(out: str) -> list[str]:
        return ["imagefolder", str(tmp_path / "in"), str(tmp_path / out), *settings]

    main(command("whole"))
    reference_files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    cut = tmp_path / "cut"
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), *command("cut"), "num_workers=2"]
    for published in (1, 4):
        with subprocess.Popen(tool, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(cut.glob("*.npz"))) < published:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
        assert not json.loads((cut / INDEX).read_text())["complete"]
    main(command("cut"))
    after = {path.name: path.read_bytes() for path in cut.iterdir() if path.suffix != ".partial"}
    assert after == reference_files


def test_index_existing_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TarWriter(str(tmp_path / "theirs.tar")) as writer:
        writer.write({"__key__": "a", "txt": "words"})
    main(["index", str(tmp_path)])
    assert "1 samples in 1 shards" in capsys.readouterr().out


def test_index_some_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        with TarWriter(str(tmp_path / f"{number:02d}.tar")) as writer:
            writer.write({"__key__": f"{number}", "txt": "words"})
    (tmp_path / "04.tar.gz").touch()
    for notation, count in {"{00..01}.tar": 2, "03.tar": 1, "*.tar": 4}.items():
        out = tmp_path / f"index-{count}"
        main(["index", str(tmp_path / notation), "--output", str(out), "num_workers=2"])
        assert f"{count} samples in {count} shards" in capsys.readouterr().out
        assert ShardSet.open(out).count == count
    assert "1 .tar.gz (04.tar.gz)" in caplog.text


def test_index_tolerates_what_its_setting_allows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        writer.write({"__key__": "a", "txt": "words"})
        writer.write({"__key__": "b", "json": b"no JSON"})
    assert "more than max_bad_fraction=0.01" in failing(["index", str(tmp_path)], capsys).splitlines()[-1]
    main(["index", str(tmp_path), "max_bad_fraction=0.5"])
    assert "1 samples in 1 shards" in capsys.readouterr().out


def test_print_config_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["shapes", str(tmp_path / "out"), "--print-config", "seed=4"])
    assert "seed: 4" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


DOCUMENTED = [
    shlex.split(line, comments=True)[2:]
    for line in (ROOT / "docs" / "data.md").read_text().splitlines()
    if line.startswith("python tools/make_shards.py")
]


@pytest.mark.parametrize("arguments", DOCUMENTED, ids=" ".join)
def test_documented_commands_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    if arguments[0] == "index":
        assert "no such folder" in failing(arguments, capsys)
        return
    main([*arguments, "--print-config"])
    assert ": " in capsys.readouterr().out


def test_user_errors_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cases = {
        "size: unknown key": ["shapes", str(out), "size=3"],
        "image_size: given 'big'": ["shapes", str(out), "image_size=big"],
        "there is no such folder": ["imagefolder", str(tmp_path / "nowhere"), str(out)],
        "there is no .tar file": ["index", str(tmp_path)],
        "is a file, not a folder": ["shapes", str(tmp_path / "file" / "out"), *SMALL_DATASET],
    }
    (tmp_path / "file").write_text("")
    for sentence, arguments in cases.items():
        error = failing(arguments, capsys)
        assert sentence in error
        assert error.count("\n") == 1
    assert not out.exists()
    assert "No such command 'mountains'" in failing(["mountains"], capsys)


def test_different_config_in_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["shapes", str(tmp_path), *SMALL_DATASET])
    capsys.readouterr()
    before = (tmp_path / "train" / INDEX).read_bytes()
    assert "seed was 0, now is 1" in failing(["shapes", str(tmp_path), *SMALL_DATASET, "seed=1"], capsys)
    assert (tmp_path / "train" / INDEX).read_bytes() == before
