import io
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from tests.data.sources.conftest import photograph
from vqd_scale.cli.make_shards import main
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.filters import Bounds, Filters
from vqd_scale.data.shards.manifest import INDEX
from vqd_scale.data.shards.quarantine import DUPLICATES
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.sources.img2dataset import Img2datasetConfig, index_img2dataset
from vqd_scale.data.transforms import NearCenterCrop

Place = Callable[..., Path]

CONFIGS = Path(__file__).parents[3] / "configs" / "shards"
PER_SHARD = 6
SHARDS = 2


def jpeg(number: int, size: int = 64) -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(photograph(number, 48, size)).save(file, "JPEG", quality=95)
        return file.getvalue()


def metadata(number: int) -> dict[str, Any]:
    """Write what img2dataset writes for LAION, with the columns of its dataset_examples."""
    return {
        "caption": f"A picture, number {number}, of a person" if number % 2 else f"Icon {number}",
        "url": f"http://example.invalid/{number}.jpg",
        "key": f"{number // PER_SHARD:05d}{number % PER_SHARD:04d}",
        "status": "success",
        "error_message": None,
        "width": 64,
        "height": 48,
        "original_width": 640,
        "original_height": 480,
        "exif": "{}",
        "sha256": "0" * 64,
        "similarity": 0.2 + number / 100,
        "punsafe": 0.9 if number == 7 else 0.01,
        "pwatermark": 0.5,
        "aesthetic": 8.5 if number % 3 else 5.0,
    }


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """Write a folder as img2dataset does with output_format=webdataset; failures are in no tar."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for shard in range(SHARDS):
        rows = [metadata(number) for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD)]
        with TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for index, row in enumerate(rows):
                members = {"jpg": jpeg(shard * PER_SHARD + index), "txt": row["caption"]}
                writer.write({KEY: row["key"], **members, "json": json.dumps(row, indent=4).encode()})
        statistics = {
            "count": PER_SHARD + 3,
            "successes": PER_SHARD,
            "failed_to_download": 2,
            "failed_to_resize": 1,
            "duration": 1.5,
            "status_dict": {"success": PER_SHARD, "HTTP Error 404: Not Found": 2},
        }
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps(statistics))
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 never opened: the tar's samples have their json")
    return folder


def keys(shards: ShardSet) -> list[str]:
    return [sample[KEY] for shard in shards.shards for sample in read_shard(shard)]


def stream_of(folder: Path, report: Path) -> list[ImageBatch]:
    """Return one epoch of the dataset."""
    count = ShardSet.open(folder).count
    config = StreamConfig(path=folder, global_batch_size=1, max_bad_fraction=0.5)
    stream: Stream[ImageBatch] = Stream(
        config, ImageSamples(NearCenterCrop(size=32)), seed=0, rank=0, ranks=1, cursor=0, quarantine=report
    )
    with closing(iter(stream)) as batches:
        return list(itertools.islice(batches, count))


def test_index_in_place(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in download.iterdir()}
    main(["img2dataset", str(download)])
    assert "12 samples in 2 shards" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in download.iterdir()}
    assert after.keys() - before.keys() == {INDEX, "00000.npz", "00001.npz"}
    assert {name: after[name] for name in before} == before
    webdataset_samples = WebDataset(
        [str(path) for path in sorted(download.glob("*.tar"))], shardshuffle=False
    )
    opened = ShardSet.open(download)
    assert [sample[KEY] for sample in webdataset_samples] == keys(opened)
    batches = stream_of(download, tmp_path / "bad.jsonl")
    assert sorted(key for batch in batches for key in batch.keys) == sorted(keys(opened))
    assert all(batch.valid.all() for batch in batches)
    assert all(
        batch.captions[0] == metadata(number)["caption"]
        for batch in batches
        for number in [int(batch.keys[0][:5]) * PER_SHARD + int(batch.keys[0][5:])]
    )


def test_filtered_index_in_another_folder(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(download.iterdir())
    index = tmp_path / "art"
    main(
        [
            "img2dataset",
            str(download),
            "--output",
            str(index),
            "filters.columns.aesthetic.min=8",
            "filters.columns.punsafe.max=0.5",
            "filters.any_of=[person]",
        ]
    )
    expected_numbers = [n for n in range(12) if n % 3 and n % 2 and n != 7]
    assert keys(ShardSet.open(index)) == [metadata(number)["key"] for number in expected_numbers]
    assert sorted(download.iterdir()) == before
    output = capsys.readouterr().out
    assert f"{len(expected_numbers)} samples in 2 shards" in output
    assert f"left out: {12 - len(expected_numbers)} filtered" in output
    batches = stream_of(index, tmp_path / "bad.jsonl")
    assert sorted(key for batch in batches for key in batch.keys) == keys(ShardSet.open(index))
    with pytest.raises(UserError, match=r"filters\.columns\.aesthetic\.min was 8\.0, now is 9\.0"):
        filters = Filters(
            columns={"aesthetic": Bounds(min=9), "punsafe": Bounds(max=0.5)}, any_of=("person",)
        )
        index_img2dataset(Img2datasetConfig(filters=filters), download, index)


def test_missing_column_is_refused(download: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["img2dataset", str(download), "--config", str(CONFIGS / "laion400m.yaml")])
    assert end.value.code == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert "this set has no column 'NSFW'; it has aesthetic," in error


def write_tar(path: Path, contents: list[dict[str, Any]]) -> None:
    with TarWriter(str(path)) as writer:
        for number, content in enumerate(contents):
            writer.write({"__key__": f"{number:09d}", "jpg": jpeg(number), "txt": "a", "json": content})


def test_sample_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [{"punsafe": 0.1}, {"caption": "x"}])
    config = Img2datasetConfig(filters=Filters(columns={"punsafe": Bounds(max=0.5)}))
    with pytest.raises(
        UserError, match=r"00000\.tar: sample '000000001': .* no column 'punsafe'; it has caption"
    ):
        index_img2dataset(config, tmp_path, None)


def test_numbers_of_any_size_are_filtered(tmp_path: Path) -> None:
    sizes: list[Any] = [5, 10**400, -(10**400), float("inf"), float("nan"), None]
    write_tar(tmp_path / "00000.tar", [{"size": size, "width": size, "height": 3} for size in sizes])
    bounds = {"min": Bounds(min=6), "max": Bounds(max=6), "aspect": Bounds()}
    expected = {"min": [1, 3], "max": [0, 2], "aspect": [0, 1]}
    for name, bound in bounds.items():
        aspect = Bounds(max=1e308) if name == "aspect" else Bounds()
        config = Img2datasetConfig(filters=Filters(columns={"size": bound}, aspect=aspect))
        shards = index_img2dataset(config, tmp_path, tmp_path / name)
        assert keys(shards) == [f"{number:09d}" for number in expected[name]]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets(path: Path) -> None:
    filters = load_config(Img2datasetConfig, path).filters
    row = {**metadata(1), "NSFW": "UNLIKELY", "aesthetic": 9, "similarity": 0.35, "width": 512, "height": 512}
    caption = "A cartoon of some people" if "human" not in path.stem else "A portrait of a man"
    assert filters.accept(row, caption)
    assert not filters.accept(row, "People")


def test_near_duplicates_are_skipped(
    download: Path, tmp_path: Path, image_writer: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images 2 and 9 occur, enlarged, in the evaluation dataset."""
    for number in (2, 9, 100):
        image_writer(tmp_path / "val" / f"{number}.jpg", number, 480, 640).with_suffix(".txt").write_text(
            "words"
        )
    main(["imagefolder", str(tmp_path / "val"), str(tmp_path / "known"), "encoding.kind=original"])
    main(
        [
            "img2dataset",
            str(download),
            "--output",
            str(tmp_path / "index"),
            f"near_duplicates.evaluation_set={tmp_path / 'known'}",
        ]
    )
    assert "left out: 2 near duplicates" in capsys.readouterr().out
    expected_keys = [metadata(number)["key"] for number in range(12) if number not in (2, 9)]
    assert keys(ShardSet.open(tmp_path / "index")) == expected_keys
    lines = [json.loads(line) for line in (tmp_path / "index" / DUPLICATES).read_text().splitlines()]
    assert [line["key"] for line in lines] == [metadata(2)["key"], metadata(9)["key"]]
    assert "is nearly the image '000000001'" in lines[0]["reason"]
    # The same when image files are packed.
    for number in range(10):
        path = image_writer(tmp_path / "own" / f"{number}.jpg", number, 48, 64)
        path.with_suffix(".txt").write_text("words")
    main(
        [
            "imagefolder",
            str(tmp_path / "own"),
            str(tmp_path / "packed"),
            f"near_duplicates.evaluation_set={tmp_path / 'known'}",
            "image_size=16",
        ]
    )
    assert ShardSet.open(tmp_path / "packed").count == 8
    lines = [json.loads(line) for line in (tmp_path / "packed" / DUPLICATES).read_text().splitlines()]
    assert [line["key"] for line in lines] == ["2.jpg", "9.jpg"]
    with pytest.raises(SystemExit):
        main(
            [
                "img2dataset",
                str(download),
                "--output",
                str(tmp_path / "index"),
                f"near_duplicates.evaluation_set={tmp_path / 'known'}",
                "near_duplicates.max_hamming_distance=2",
            ]
        )
    assert "near_duplicates was" in capsys.readouterr().err
