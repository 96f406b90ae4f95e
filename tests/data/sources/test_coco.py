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
from vqd_scale.data.shards.shard_index import ShardSet, read_table
from vqd_scale.data.shards.shard_io import KEY, read_shard
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
    with pytest.raises(UserError, match=r"COCO_train2014_000000000009\.jpg: this image is missing"):
        CocoConfig().pack(coco, tmp_path / "out")
    content = json.loads(annotations.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 25]
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no caption for COCO_train2014_000000000025\.jpg, as for 1 of 4"):
        CocoConfig().pack(coco, tmp_path / "out")
    annotations.write_text('{"images": []}')
    with pytest.raises(UserError, match="not COCO's captions"):
        CocoConfig().pack(coco, tmp_path / "out")
    assert not (tmp_path / "out").exists()
