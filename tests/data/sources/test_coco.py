import json
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset

from vqd_scale.cli.make_shards import main
from vqd_scale.core.errors import UserError
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.shards.shard_table import read_table
from vqd_scale.data.sources.base import Jpeg
from vqd_scale.data.sources.coco import CocoConfig
from vqd_scale.data.transforms import NearCenterCrop

Place = Callable[..., Path]

IDS = (581929, 9, 25, 30)
"""Not in order, as the published files are."""


def captions_file(part: str, names: dict[int, str]) -> dict[str, Any]:
    """Write the published layout in mixed order; image n has n % 3 + 1 captions."""
    annotations = [
        {
            "image_id": number,
            "id": 1000 * turn + index,
            "caption": f" Picture {number},\n caption {turn}. ",
        }
        for index, number in enumerate(IDS)
        for turn in reversed(range(number % 3 + 1))
    ]
    images = [
        {"license": 5, "file_name": names[number], "height": 40, "width": 60, "id": number} for number in IDS
    ]
    return {"info": {"year": int(part[-4:])}, "images": images, "licenses": [], "annotations": annotations}


@pytest.fixture
def make_coco(tmp_path: Path, image_writer: Place) -> Callable[..., Path]:
    def make(year: int = 2014, split: str = "val", inside: str = "{part}") -> Path:
        part = f"{split}{year}"
        prefix = f"COCO_{part}_" if year == 2014 else ""
        names = {number: f"{prefix}{number:012d}.jpg" for number in IDS}
        coco = tmp_path / "coco"
        (coco / "annotations").mkdir(parents=True)
        (coco / "annotations" / f"captions_{part}.json").write_text(json.dumps(captions_file(part, names)))
        for number, name in names.items():
            image_writer(coco / inside.format(part=part) / name, number)
        return coco

    return make


def samples_of(shards: ShardSet) -> list[dict[str, Any]]:
    return [sample for shard in shards.shards for sample in read_shard(shard)]


@pytest.mark.parametrize("inside", ["{part}", "{part}/{part}", "images/{part}"])
@pytest.mark.parametrize("year", [2014, 2017])
def test_one_sample_per_image_with_all_captions(
    make_coco: Callable[..., Path], tmp_path: Path, year: int, inside: str
) -> None:
    coco = make_coco(year, "val", inside)
    shards = CocoConfig.model_validate({"year": year, "split": "val"}).pack(coco, tmp_path / "out")
    samples = samples_of(shards)
    assert [sample[KEY] for sample in samples] == [f"{number:012d}" for number in sorted(IDS)]
    for sample, number in zip(samples, sorted(IDS), strict=True):
        described = json.loads(sample["json"])
        captions = [f"Picture {number}, caption {turn}." for turn in range(number % 3 + 1)]
        assert sample["txt"].decode() == captions[0]
        assert described.get("captions", captions[:1]) == captions
        assert described["image_id"] == number
        (file,) = coco.rglob(described["source"].rpartition("/")[2])
        assert sample["jpg"] == file.read_bytes()
    assert shards.captions == (sum(number % 3 + 1 for number in IDS),)
    assert read_table(shards.shards[0]).columns["captions"].tolist() == [n % 3 + 1 for n in sorted(IDS)]


def test_commands_from_download_to_batches(
    make_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco, out = make_coco(), tmp_path / "out"
    main(["coco", str(coco), str(out), "year=2014", "split=val"])
    assert "4 samples in 1 shards" in capsys.readouterr().out
    tars = [str(path) for path in sorted(out.glob("*.tar"))]
    keys = [f"{number:012d}" for number in sorted(IDS)]
    assert [sample[KEY] for sample in WebDataset(tars, shardshuffle=False)] == keys
    listed = subprocess.run(["tar", "-t", "-f", tars[0]], check=True, capture_output=True, text=True).stdout
    assert listed.split()[:4] == [f"{keys[0]}.{extension}" for extension in ("jpg", "json", "txt")] + [
        f"{keys[1]}.jpg"
    ]
    main(["index", str(out), "--output", str(tmp_path / "index")])
    for folder in (out, tmp_path / "index"):
        assert ShardSet.open(folder).captions == (sum(number % 3 + 1 for number in IDS),)
        config = StreamConfig(path=folder, global_batch_size=2)
        stream: Stream[ImageBatch] = Stream(
            config,
            ImageSamples(NearCenterCrop(size=32)),
            seed=0,
            rank=0,
            ranks=1,
            cursor=0,
            quarantine=tmp_path / "bad",
        )
        with closing(iter(stream)) as batches:
            epoch = [next(batches) for _ in range(2)]
        assert sorted(key for batch in epoch for key in batch.keys) == keys
        for batch in epoch:
            assert batch.valid.all()
            assert batch.images.shape == (2, 3, 32, 32)
            assert batch.captions == [f"Picture {int(key)}, caption 0." for key in batch.keys]


def test_images_of_another_year_are_refused(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    coco = make_coco(2014, "train")
    for number in IDS:
        name = coco / "train2014" / f"COCO_train2014_{number:012d}.jpg"
        name.rename(name.with_name(f"{number:012d}.jpg"))
    assert CocoConfig().pack(coco, tmp_path / "out").count == 4


def test_fitted_images_and_a_bad_image(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    coco = make_coco()
    (coco / "val2014" / "COCO_val2014_000000000025.jpg").write_bytes(b"")
    config = CocoConfig(split="val", encoding=Jpeg(), image_size=16, max_bad_fraction=0.25)
    assert config.pack(coco, tmp_path / "out").count == 3
    (line,) = (tmp_path / "out" / QUARANTINE).read_text().splitlines()
    assert json.loads(line)["key"] == "val2014/COCO_val2014_000000000025.jpg"


def test_invalid_use_raises_user_error(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captions_train2014\.json: COCO's file of captions"):
        CocoConfig().pack(tmp_path, tmp_path / "out")
    coco = make_coco(split="train")
    annotations = coco / "annotations" / "captions_train2014.json"
    (coco / "train2014" / "COCO_train2014_000000000009.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 4 .*_000000000009\.jpg' for one is not in train2014"):
        CocoConfig().pack(coco, tmp_path / "out")
    content = json.loads(annotations.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 25]
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"2 of 4 .*_000000000009\.jpg' for one is not in train2014"):
        CocoConfig().pack(coco, tmp_path / "out")
    annotations.write_text('{"images": []}')
    with pytest.raises(UserError, match="this file of COCO captions cannot be read"):
        CocoConfig().pack(coco, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pack_annotations(
    folder: Path,
    images: list[dict[str, Any]],
    captions: list[tuple[Any, Any]],
    config: CocoConfig | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Pack a file of annotations; return the samples, and the keys in the report of bad samples."""
    entries = [{"id": n, "image_id": image, "caption": text} for n, (image, text) in enumerate(captions)]
    (folder / "coco" / "annotations").mkdir(parents=True)
    annotations = folder / "coco" / "annotations" / "captions_train2017.json"
    annotations.write_text(json.dumps({"images": images, "annotations": entries}))
    shards = (config or CocoConfig(year=2017, max_bad_fraction=0.5)).pack(folder / "coco", folder / "out")
    report = folder / "out" / QUARANTINE
    lines = report.read_text().splitlines() if report.exists() else []
    return samples_of(shards), [json.loads(line)["key"] for line in lines]


IDENTIFIERS = {
    "texts": (["000000000001", "000000000002"], [1, 2], ["000000000001", "000000000002"]),
    "floats": ([1.0, 2.0], [1, 2], ["000000000001", "000000000002"]),
    "mixed": (["1", 2.0], [1, 2], ["000000000001", "000000000002"]),
    "names": (["img_1", "img_2"], ["img_1", "img_2"], ["000000000000", "000000000001"]),
    "one name": ([7, "img_2"], [7, "img_2"], ["000000000000", "000000000001"]),
    "huge": ([10**30, 10**31], [str(10**30), str(10**31)], ["000000000000", "000000000001"]),
    "negative": ([-1, 5], ["-1", 5], ["000000000000", "000000000001"]),
}


@pytest.mark.parametrize("kind", IDENTIFIERS)
def test_identifiers_of_any_type(kind: str, tmp_path: Path, image_writer: Place) -> None:
    identifiers, stored, keys = IDENTIFIERS[kind]
    images = [{"id": value, "file_name": f"img_{number}.jpg"} for number, value in enumerate(identifiers)]
    for number in range(2):
        image_writer(tmp_path / "coco" / "train2017" / f"img_{number}.jpg", number)
    captions = [(value, f"picture {number}") for number, value in enumerate(identifiers)]
    samples, bad_keys = pack_annotations(tmp_path, images, captions)
    assert sorted(sample["txt"].decode() for sample in samples) == ["picture 0", "picture 1"]
    assert [sample[KEY] for sample in samples] == keys
    assert sorted(str(json.loads(sample["json"])["image_id"]) for sample in samples) == sorted(
        map(str, stored)
    )
    assert bad_keys == []


def test_images_without_a_caption_are_bad_samples(tmp_path: Path, image_writer: Place) -> None:
    """Captions that are empty or null are skipped; the first of the others becomes ``txt``."""
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (1, 2, 3, 4, 5, 3)]
    for number in range(1, 6):
        image_writer(tmp_path / "coco" / "train2017" / f"{number:012d}.jpg", number)
    captions = [
        (1, "\n"),
        (1, "good"),
        (1, "better"),
        (2, ""),
        (3, "three"),
        (3, " "),
        (4, None),
        (9, "of none"),
    ]
    samples, bad_keys = pack_annotations(
        tmp_path, images, captions, CocoConfig(year=2017, max_bad_fraction=0.6)
    )
    assert [sample["txt"].decode() for sample in samples] == ["good", "three"]
    assert json.loads(samples[0]["json"])["captions"] == ["good", "better"]
    assert bad_keys == [f"train2017/{number:012d}.jpg" for number in (2, 4, 5)]


def test_folders_in_file_names(tmp_path: Path, image_writer: Place, caplog: pytest.LogCaptureFixture) -> None:
    names = ("sub/cat.jpg", "train2017/dog.jpg", "C:\\x\\train2017\\cow.jpg", "../../secret.jpg", "gone.jpg")
    for path in ("coco/train2017/sub/cat", "coco/train2017/dog", "coco/train2017/cow", "secret"):
        image_writer(tmp_path / f"{path}.jpg")
    image_writer(tmp_path / "coco" / "train2017" / "unlisted.jpg")
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    samples, bad_keys = pack_annotations(
        tmp_path, images, [(number, name) for number, name in enumerate(names)]
    )
    assert [sample["txt"].decode() for sample in samples] == list(names[:3])
    assert bad_keys == ["train2017/../../secret.jpg", "train2017/gone.jpg"]
    assert "1 .jpg (unlisted.jpg)" in caplog.records[0].getMessage()


def test_two_images_of_one_identifier_are_refused(tmp_path: Path, image_writer: Place) -> None:
    image_writer(tmp_path / "coco" / "train2017" / "a.jpg")
    with pytest.raises(UserError, match="5 is the id of two images"):
        pack_annotations(
            tmp_path, [{"id": 5, "file_name": "a.jpg"}, {"id": "5", "file_name": "b.jpg"}], [(5, "a")]
        )
