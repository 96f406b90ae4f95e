import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.quarantine import QUARANTINE
from vqd_scale.data.shards.shard_index import INDEX, ShardSet
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.sources.base import Jpeg
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
    with pytest.raises(UserError, match=r"deep/er/pic 4\.png: .* 2 of 10"):
        CONFIG.pack(image_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
