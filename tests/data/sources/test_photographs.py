from pathlib import Path

import numpy as np
import pytest

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import decode_image
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.sources.photographs import PhotographsConfig, photographs, write_photographs


def test_no_training_crop_is_from_the_held_out_photograph(tmp_path: Path) -> None:
    config = PhotographsConfig(held_out="china", size=32, train_samples=30, samples_per_shard=20)
    sets = write_photographs(config, tmp_path)
    photograph_pixels = {name: decode_image(path.read_bytes()) for name, path in photographs().items()}
    assert (sets["train"].count, len(sets["train"].shards)) == (30, 2)
    rows, columns = (side // 32 for side in photograph_pixels["china"].shape[:2])
    assert sets["held_out"].count == rows * columns
    training_photographs = {name: pixels for name, pixels in photograph_pixels.items() if name != "china"}
    for shard in sets["train"].shards[:1]:
        for sample in list(read_shard(shard))[:3]:
            crop = decode_image(sample["png"])
            assert crop.shape == (32, 32, 3)
            assert any(_lies_in(crop, pixels) for pixels in training_photographs.values())
    first = next(read_shard(sets["held_out"].shards[0]))
    assert first[KEY] == "00000-00000"
    assert np.array_equal(decode_image(first["png"]), photograph_pixels["china"][:32, :32])


def test_crops_are_deterministic_and_unknown_photograph_is_named(tmp_path: Path) -> None:
    config = PhotographsConfig(held_out="china", size=32, train_samples=8)
    digests = [write_photographs(config, tmp_path / name)["train"].digests for name in ("a", "b")]
    assert digests[0] == digests[1]
    with pytest.raises(UserError, match=r"no photograph 'mona-lisa' among .*china"):
        write_photographs(PhotographsConfig(held_out="mona-lisa"), tmp_path / "c")


def _lies_in(crop: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> bool:
    places = np.argwhere((pixels[:-31, :-31] == crop[0, 0]).all(axis=-1))
    return any(np.array_equal(pixels[row : row + 32, column : column + 32], crop) for row, column in places)
