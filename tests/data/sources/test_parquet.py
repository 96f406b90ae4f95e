"""Parquet files as those of Hugging Face's datasets: an image struct of bytes and path, and a caption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.sources.parquet import ParquetConfig

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")

Place = Callable[..., Path]
CONFIG = ParquetConfig(max_bad_fraction=0.5, samples_per_shard=3)


@pytest.fixture
def files(tmp_path: Path, image_writer: Place) -> list[bytes]:
    return [
        image_writer(tmp_path / f"{number}.{kind}", number).read_bytes()
        for number, kind in enumerate(["jpg", "png", "webp"])
    ]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def samples_of(config: ParquetConfig, source: Path, out: Path) -> list[dict[str, Any]]:
    return [sample for shard in config.pack(source, out).shards for sample in read_shard(shard)]


@pytest.mark.parametrize("column", ["text", "caption", "en_text"])
@pytest.mark.parametrize("is_struct", [True, False])
def test_images_and_captions_of_rows(
    files: list[bytes], tmp_path: Path, column: str, is_struct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = [
        {"bytes": data, "path": f"{number}.x"} if is_struct else data for number, data in enumerate(files)
    ]
    rows = [{"image": image, column: f"image {number}"} for number, image in enumerate(images)]
    write_table(tmp_path / "in" / "data" / "train-00000-of-00002.parquet", rows)
    write_table(tmp_path / "in" / "data" / "train-00001-of-00002.parquet", rows[:1])
    write_table(tmp_path / "in" / "data" / "test-00000-of-00001.parquet", rows)
    options = {"files": "train-*", "caption_column": column if column == "en_text" else None}
    samples = samples_of(CONFIG.model_copy(update=options), tmp_path / "in", tmp_path / "out")
    assert [sample["txt"].decode() for sample in samples] == ["image 0", "image 1", "image 2", "image 0"]
    for sample, data, kind in zip(samples, [*files, files[0]], ["jpg", "png", "webp", "jpg"], strict=True):
        assert sample[kind] == data
    assert json.loads(samples[1]["json"])["source"] == "data/train-00000-of-00002.parquet:1"
    assert "1 .parquet (data/test-00000-of-00001.parquet)" in caplog.records[0].getMessage()


def test_several_captions_and_none(files: list[bytes], tmp_path: Path) -> None:
    write_table(tmp_path / "in" / "a.parquet", [{"image": files[0], "captions": ["one", "", "two"]}])
    (sample,) = samples_of(CONFIG, tmp_path / "in", tmp_path / "out")
    assert json.loads(sample["json"])["captions"] == ["one", "two"]
    write_table(tmp_path / "bare" / "a.parquet", [{"image": files[0], "label": 3}])
    (sample,) = samples_of(CONFIG, tmp_path / "bare", tmp_path / "out2")
    assert "txt" not in sample


def test_bad_rows_are_counted(files: list[bytes], tmp_path: Path) -> None:
    images: list[Any] = [
        *files,
        None,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": b"no image", "path": None},
    ]
    captions = ["a", "", "c", "d", "e", "f"]
    images[:3] = [{"bytes": data, "path": None} for data in files]
    rows = [{"image": image, "text": text} for image, text in zip(images, captions, strict=True)]
    write_table(tmp_path / "in" / "a.parquet", rows)
    config = CONFIG.model_copy(update={"max_bad_fraction": 0.7})
    assert len(samples_of(config, tmp_path / "in", tmp_path / "out")) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / QUARANTINE).read_text().splitlines()]
    assert [line["key"] for line in lines] == [f"a.parquet:{number}" for number in (1, 3, 4, 5)]


def test_invalid_use_raises_user_error(files: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no Parquet file '\*\.parquet'"):
        CONFIG.pack(tmp_path, tmp_path / "out")
    write_table(tmp_path / "in" / "a.parquet", [{"picture": files[0], "text": "a"}])
    with pytest.raises(UserError, match="has no column 'image', only picture, text"):
        CONFIG.pack(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="has no column 'words'"):
        CONFIG.model_copy(update={"image_column": "picture", "caption_column": "words"}).pack(
            tmp_path / "in", tmp_path / "out"
        )
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        CONFIG.pack(tmp_path / "in", tmp_path / "out")
