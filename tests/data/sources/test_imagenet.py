import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.shards.shard_table import read_table
from vqd_scale.data.sources.base import Jpeg
from vqd_scale.data.sources.ffhq import FFHQConfig
from vqd_scale.data.sources.imagenet import ImageNetConfig, class_names

Place = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, image_writer: Place) -> Path:
    folder = tmp_path / "train"
    for number, name in enumerate(("n01443537", "n01440764", "n01440764")):
        image_writer(folder / name / f"{name}_{number}.JPEG", number)
    # Some of ImageNet's .JPEG files have another format.
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "n01440764" / "n01440764_9.JPEG", "PNG")
    return folder


def test_classes_by_folder(train: Path, tmp_path: Path) -> None:
    (shard,) = ImageNetConfig().pack(train, tmp_path / "out").shards
    samples = list(read_shard(shard))
    assert [json.loads(sample["json"])["class"] for sample in samples] == [0, 0, 0, 1]
    assert [sample["cls"].decode() for sample in samples] == ["0", "0", "0", "1"]
    assert samples[3]["txt"].decode() == "n01443537"
    assert samples[0]["jpeg"] == (train / json.loads(samples[0]["json"])["source"]).read_bytes()
    assert read_table(shard).columns["class"].tolist() == [0, 0, 0, 1]


NAMES = {
    "classes.txt": "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\nn2 third\n",
    "index.json": '{"1": ["n01440764", "tench"], "0": ["n01443537", "goldfish"], "10": ["n2", "third_one"]}',
}


@pytest.mark.parametrize("name", NAMES)
def test_classes_by_a_list(train: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(NAMES[name])
    (shard,) = ImageNetConfig(classes=tmp_path / name).pack(train, tmp_path / "out").shards
    described = [json.loads(sample["json"]) for sample in read_shard(shard)]
    assert [entry["class"] for entry in described] == [1, 1, 1, 0]
    assert [entry["name"] for entry in described] == ["tench", "tench", "tench", "goldfish"]


def test_invalid_use_raises_user_error(train: Path, tmp_path: Path, image_writer: Place) -> None:
    folders = ["n01440764", "n01443537"]
    (tmp_path / "few.txt").write_text("n01440764 tench\n")
    with pytest.raises(UserError, match="lists no class 'n01443537'"):
        class_names(tmp_path / "few.txt", folders)
    (tmp_path / "bad.txt").write_text("n01440764\n")
    with pytest.raises(UserError, match="each line must hold"):
        class_names(tmp_path / "bad.txt", folders)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"this list of classes, such as .*Input should be an object"):
        class_names(tmp_path / "bad.json", folders)
    image_writer(train / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png: lies in no class's folder"):
        ImageNetConfig().pack(train, tmp_path / "out")


def test_ffhq_has_no_captions(tmp_path: Path, image_writer: Place) -> None:
    for number in (0, 1, 1000):
        image_writer(tmp_path / "in" / f"{number // 1000 * 1000:05d}" / f"{number:05d}.png", number, 48, 48)
    (shard,) = FFHQConfig().pack(tmp_path / "in", tmp_path / "out").shards
    samples = list(read_shard(shard))
    assert [json.loads(sample["json"]) for sample in samples] == [
        {"source": source} for source in ("00000/00000.png", "00000/00001.png", "01000/01000.png")
    ]
    assert all(set(sample) == {"__key__", "__url__", "png", "json"} - {"__url__"} for sample in samples)
    assert samples[2]["png"] == (tmp_path / "in" / "01000" / "01000.png").read_bytes()
    small = FFHQConfig(encoding=Jpeg(), image_size=16)
    (shard,) = small.pack(tmp_path / "in", tmp_path / "small").shards
    assert set(next(iter(read_shard(shard)))) == {"__key__", "jpg", "json"}
