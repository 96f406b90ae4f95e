import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.sources.base import ImageSource, Jpeg, OriginalFile, SourceImage
from vqd_scale.data.sources.imagefolder import ImageFolderConfig
from vqd_scale.data.transforms import fitted

CONFIG = ImageFolderConfig(image_size=32, samples_per_shard=4, max_bad_fraction=0.2)


def texture(number: int) -> Image.Image:
    """Return smooth colors with grain, unlike a rendered scene."""
    rng = np.random.default_rng(number)
    waves = np.sin(np.mgrid[0:40, 0 : 50 + number] * rng.uniform(0.05, 0.3)).sum(axis=0)
    colors = waves[..., None] * rng.uniform(20, 60, 3) + rng.uniform(80, 160, 3)
    return Image.fromarray((colors + rng.normal(0, 8, colors.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number in range(10):
        path = folder / ("deep/er" if number % 3 else "") / f"pic {number}.{('png', 'JPG')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        texture(number).save(path)
        path.with_suffix(".txt").write_text(f"texture number {number}\n")
    return folder


def corrupt(image_folder: Path, count: int) -> list[str]:
    paths = sorted(path for path in image_folder.rglob("*") if path.suffix in (".png", ".JPG"))[:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    return [path.relative_to(image_folder).as_posix() for path in paths]


def quarantined(out: Path) -> list[str]:
    lines = (out / QUARANTINE).read_text().splitlines()
    return sorted(json.loads(line)["key"] for line in lines)


def samples_of(shards: ShardSet) -> dict[str, str]:
    """Return the first caption of each sample by the name of its file."""
    samples = [sample for shard in shards.shards for sample in read_shard(shard)]
    return {json.loads(sample["json"])["source"]: sample["txt"].decode() for sample in samples}


def test_every_image_with_its_caption(image_folder: Path, tmp_path: Path) -> None:
    shards = CONFIG.pack(image_folder, tmp_path / "out")
    assert [shard.count for shard in shards.shards] == [4, 4, 2]
    samples = [sample for shard in shards.shards for sample in read_shard(shard)]
    assert len(samples) == 10
    for sample in samples:
        source = image_folder / json.loads(sample["json"])["source"]
        assert sample["txt"].decode() == source.with_suffix(".txt").read_text().strip()
        with Image.open(source) as original:
            expected = fitted(np.array(original.convert("RGB")), 32)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sample["png"]))), expected)
    assert not (tmp_path / "out" / QUARANTINE).exists()


def test_jpeg(image_folder: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"encoding": Jpeg(quality=90)})
    (shard, *_) = config.pack(image_folder, tmp_path / "out").shards
    sample = next(iter(read_shard(shard)))
    assert Image.open(io.BytesIO(sample["jpg"])).format == "JPEG"


def test_corrupt_images_are_reported_and_skipped(image_folder: Path, tmp_path: Path) -> None:
    corrupt_files = corrupt(image_folder, 2)
    shards = CONFIG.pack(image_folder, tmp_path / "out")
    assert shards.count == 8
    written_files = [
        json.loads(sample["json"])["source"] for shard in shards.shards for sample in read_shard(shard)
    ]
    assert not set(written_files) & set(corrupt_files)
    lines = (tmp_path / "out" / QUARANTINE).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == corrupt_files
    assert all("not a readable image" in line for line in lines)
    CONFIG.pack(image_folder, tmp_path / "out")
    assert (tmp_path / "out" / QUARANTINE).read_text().splitlines() == lines


def test_corrupt_image_limit_stops_and_higher_limit_resumes(image_folder: Path, tmp_path: Path) -> None:
    corrupt(image_folder, 3)
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.2 of the 10 samples"):
        CONFIG.pack(image_folder, tmp_path / "out")
    with pytest.raises(UserError, match="half-made"):
        ShardSet.open(tmp_path / "out")
    tolerant = CONFIG.model_copy(update={"max_bad_fraction": 0.3})
    assert tolerant.pack(image_folder, tmp_path / "out").count == 7


def test_images_without_captions(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "pic 0.txt").unlink()
    (image_folder / "deep/er/pic 4.txt").unlink()
    strict = CONFIG.model_copy(update={"max_bad_fraction": 0.1})
    with pytest.raises(
        UserError, match=r"2 of 10 images .* 'deep/er/pic 4\.png' for one has no caption; write it"
    ):
        strict.pack(image_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert CONFIG.pack(image_folder, tmp_path / "out").count == 8
    assert quarantined(tmp_path / "out") == ["deep/er/pic 4.png", "pic 0.png"]


def test_empty_caption_is_a_bad_sample(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "pic 0.txt").write_text(" \n")
    assert CONFIG.pack(image_folder, tmp_path / "out").count == 9
    assert "empty caption" in (tmp_path / "out" / QUARANTINE).read_text()


def test_changed_images_are_refused(image_folder: Path, tmp_path: Path) -> None:
    CONFIG.pack(image_folder, tmp_path / "out")
    os.utime(image_folder / "pic 0.png", ns=(1, 1))
    with pytest.raises(UserError, match=r"source\.images was"):
        CONFIG.pack(image_folder, tmp_path / "out")


def test_invalid_use_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        CONFIG.pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        CONFIG.pack(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


TOLERANT = CONFIG.model_copy(update={"max_bad_fraction": 0.5})


def write_image(path: Path, kind: str = "PNG", caption: str | None = "a texture") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texture(0).save(path, kind)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def test_linked_folders_and_images_are_packed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for path in (folder / "a" / "0.png", tmp_path / "store" / "b" / "1.png"):
        write_image(path)
    (folder / "b").symlink_to(tmp_path / "store" / "b")
    (folder / "loop").symlink_to(folder)
    for name in ("2.png", "2.txt"):
        (folder / name).symlink_to(tmp_path / "store" / "b" / f"1{name[1:]}")
    shards = CONFIG.pack(folder, tmp_path / "out")
    assert sorted(samples_of(shards)) == ["2.png", "a/0.png", "b/1.png"]


def test_links_whose_target_is_missing_are_bad_samples(tmp_path: Path) -> None:
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png")
    for name in ("9.png", "9.txt"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "nowhere" / name)
    (tmp_path / "in" / "0.txt").unlink()
    (tmp_path / "in" / "0.txt").symlink_to(tmp_path / "nowhere")
    assert TOLERANT.pack(tmp_path / "in", tmp_path / "out").count == 2
    assert quarantined(tmp_path / "out") == ["0.png", "9.png"]


def test_images_of_rare_names_are_packed_and_others_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"0.jpg": "JPEG", "1.jfif": "JPEG", "2.jpe": "JPEG", "3.avif": "AVIF", "4.jpg_large": "JPEG"}
    for name, kind in kinds.items():
        write_image(tmp_path / "in" / name, kind)
    for name in ("5.heic", "6.heic", "7.mp4", "noname"):
        (tmp_path / "in" / name).write_bytes(b"something else")
    os.mkfifo(tmp_path / "in" / "8.png")
    original = CONFIG.model_copy(update={"encoding": OriginalFile()})
    shards = original.pack(tmp_path / "in", tmp_path / "out")
    assert sorted(samples_of(shards)) == sorted(kinds)
    members = [
        set(sample) - {"__key__", "json", "txt"} for shard in shards.shards for sample in read_shard(shard)
    ]
    assert members == [{"jpg"}, {"jpg"}, {"jpg"}, {"avif"}, {"jpg"}]
    (record,) = caplog.records
    for text in (
        "2 .heic (5.heic)",
        "1 .mp4 (7.mp4)",
        "1 without extension (noname)",
        "1 special files (8.png)",
    ):
        assert text in record.getMessage()


def test_files_of_operating_systems_are_no_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("0.png", "__MACOSX/0.png", "@eaDir/0.png", ".ipynb_checkpoints/0-checkpoint.png"):
        write_image(tmp_path / "in" / name, caption="a texture" if name == "0.png" else None)
    for name in ("._0.png", "._0.txt", ".DS_Store"):
        (tmp_path / "in" / name).write_bytes(b"\0\5\x16\7")
    assert list(samples_of(CONFIG.pack(tmp_path / "in", tmp_path / "out"))) == ["0.png"]
    assert "6 hidden (" in caplog.records[0].getMessage()


@pytest.mark.skipif(os.geteuid() != 0, reason="the test drops root's rights")
def test_unreadable_folders_and_files_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "0.png")
    write_image(tmp_path / "in" / "deep" / "1.png")
    (tmp_path / "in" / "deep").chmod(0)
    rights = "-dac_override,-dac_read_search"
    tool = [
        sys.executable,
        "tools/make_shards.py",
        "imagefolder",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
    ]
    command = ["setpriv", "--bounding-set", rights, "--inh-caps", rights, *tool]
    end = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert end.returncode == 2, end.stderr
    assert f"{tmp_path / 'in' / 'deep'}: cannot be read (Permission denied)" in end.stderr


def test_file_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
    write_image(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    assert list(samples_of(CONFIG.pack(tmp_path / "in", tmp_path / "out"))) == ["caf\\xe9.png"]


ROWS = [("train/0.png", "a red square"), ("train/1.png", "a blue square")]


def write_metadata(folder: Path, kind: str, rows: list[tuple[str, str]], column: str = "text") -> None:
    table = [{"file_name": name, "other": 5, column: text} for name, text in rows]
    if kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(table), folder / "metadata.parquet")
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["file_name", "other", column])
            writer.writeheader()
            writer.writerows(table)
    else:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "my words"])
def test_captions_from_metadata(tmp_path: Path, kind: str, column: str) -> None:
    for name, _ in ROWS:
        write_image(tmp_path / "in" / name, caption=None)
    write_image(tmp_path / "in" / "more" / "2.png", caption=None)
    write_image(tmp_path / "in" / "3.png", caption="a text file")
    write_metadata(tmp_path / "in", kind, ROWS, column)
    write_metadata(tmp_path / "in" / "more", kind, [("2.png", 'a "quoted", one\nin lines')], column)
    config = CONFIG.model_copy(update={"caption_column": "my words" if column == "my words" else None})
    expected = {**dict(ROWS), "more/2.png": 'a "quoted", one\nin lines', "3.png": "a text file"}
    assert samples_of(config.pack(tmp_path / "in", tmp_path / "out")) == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_name_no_file_outside_of_their_folder(tmp_path: Path, kind: str) -> None:
    write_image(tmp_path / "secret.png", caption=None)
    for name, _ in ROWS:
        write_image(tmp_path / "in" / name, caption=None)
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "other")
    write_image(tmp_path / "other" / "4.png", caption=None)
    names = [
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "folder/4.png",
        "train/../0.png",
        "",
        "9.png",
    ]
    names += ["a\0.png"] if kind != "csv" else []
    write_metadata(tmp_path / "in", kind, [*ROWS, *((name, "a secret") for name in names)])
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.9})
    shards = config.pack(tmp_path / "in", tmp_path / "out")
    assert samples_of(shards) == dict(ROWS)
    assert [name for name in quarantined(tmp_path / "out") if name.startswith("metadata")] == sorted(
        f"metadata.{kind}:{number}" for number in range(3, 3 + len(names))
    )


def test_bad_rows_of_metadata_are_counted(tmp_path: Path) -> None:
    for number in range(6):
        write_image(tmp_path / "in" / f"{number}.png", caption=None)
    rows = [
        '{"file_name": "0.png", "text": "good"}',
        '{"file_name": "0.png", "text": "another"}',
        '{"file_name": "1.png", "text": ["", "one", "two"]}',
        '{"file_name": "2.png", "text": "half \\ud83d"}',
        '{"file_name": "3.png", "text": null}',
        '{"file_name": "4.png", "text": 5}',
        '{"file_name": "5.png", "te',
        "[]",
    ]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(rows))
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.9})
    shards = config.pack(tmp_path / "in", tmp_path / "out")
    assert samples_of(shards) == {"0.png": "good", "1.png": "one"}
    assert sum(shards.captions) == 4
    assert len(quarantined(tmp_path / "out")) == 5 + 2
    with pytest.raises(UserError, match="has no column words, only file_name, text"):
        CONFIG.model_copy(update={"caption_column": "words"}).pack(tmp_path / "in", tmp_path / "other")


class ListedFiles(ImageSource):
    """Images whose paths are taken from a list as they are."""

    name: ClassVar[str] = "listed"
    example: ClassVar[str] = ""

    def list_images(self, folder: Path) -> list[SourceImage]:
        names = (folder / "list.txt").read_text().splitlines()
        return [SourceImage(folder / name, str(number), name) for number, name in enumerate(names)]


def test_no_source_reads_files_outside_of_its_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    write_image(tmp_path / "in" / "0.png")
    names = ["0.png", "../secret.png", str(tmp_path / "secret.png"), "a\0.png"]
    (tmp_path / "in" / "list.txt").write_text("\n".join(names))
    assert ListedFiles(max_bad_fraction=0.75).pack(tmp_path / "in", tmp_path / "out").count == 1
    assert quarantined(tmp_path / "out") == sorted(names[1:])
    source = tmp_path / "in" / ".." / "in"
    assert ListedFiles(max_bad_fraction=0.75).pack(source, tmp_path / "again").count == 1
    with pytest.raises(UserError, match=r"2 of 4 .* '\.\./secret\.png' for one lies outside of"):
        ListedFiles(max_bad_fraction=0.25).pack(tmp_path / "in", tmp_path / "other")
