import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.shards.shard_table import read_table
from vqd_scale.data.sources.cub200 import CubConfig
from vqd_scale.data.sources.oxford102 import OxfordConfig

Place = Callable[..., Path]

BIRDS = [
    ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", 1, 0),
    ("001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg", 1, 1),
    ("002.Laysan_Albatross/Laysan_Albatross_0002_1027.jpg", 2, 1),
    ("003.Sooty_Albatross/Sooty_Albatross_0078_796372.jpg", 3, 0),
]
LABELS = (2, 1, 2, 3)
"""Classes of the flowers."""


@pytest.fixture(params=["text/text", "text", "text_c10"])
def birds(request: pytest.FixtureRequest, tmp_path: Path, image_writer: Place) -> Path:
    """Write the folder as unpacked from the archives of the dataset and the captions."""
    folder = tmp_path / "birds"
    data = folder / "CUB_200_2011"
    tables = {
        "images.txt": [name for name, _, _ in BIRDS],
        "image_class_labels.txt": [label for _, label, _ in BIRDS],
        "train_test_split.txt": [training for _, _, training in BIRDS],
        "classes.txt": ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"],
    }
    for number, (name, _, _) in enumerate(BIRDS):
        image_writer(data / "images" / name, number)
        captions = folder / request.param / Path(name).with_suffix(".txt")
        captions.parent.mkdir(parents=True, exist_ok=True)
        captions.write_text("".join(f" a bird, {number} in words {turn} \n" for turn in range(10)) + "\n")
    for name, values in tables.items():
        lines = [f"{number} {value}\n" for number, value in enumerate(values, start=1)]
        (data / name).write_text("".join(lines))
    (folder / "trainvalclasses.txt").write_text("001.Black_footed_Albatross\n003.Sooty_Albatross\n")
    (folder / "testclasses.txt").write_text("002.Laysan_Albatross\n")
    # A pickle that would write a file if it were loaded.
    (folder / "train").mkdir()
    (folder / "train" / "filenames.pickle").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(tmp_path).encode() + b"/run'\ntR."
    )
    return folder


@pytest.mark.parametrize(
    ("protocol", "split", "split_numbers"),
    [
        ("classes", "train", [0, 1, 3]),
        ("classes", "test", [2]),
        ("images", "train", [1, 2]),
        ("images", "test", [0, 3]),
    ],
)
def test_birds(birds: Path, tmp_path: Path, protocol: str, split: str, split_numbers: list[int]) -> None:
    config = CubConfig.model_validate({"protocol": protocol, "split": split})
    (shard,) = config.pack(birds, tmp_path / "out").shards
    samples = list(read_shard(shard))
    described = [json.loads(sample["json"]) for sample in samples]
    assert [entry["source"] for entry in described] == [BIRDS[number][0] for number in split_numbers]
    for sample, entry, number in zip(samples, described, split_numbers, strict=True):
        assert entry["captions"] == [f"a bird, {number} in words {turn}" for turn in range(10)]
        assert sample["txt"].decode() == entry["captions"][0]
        assert entry["class"] == BIRDS[number][1] - 1
        assert sample["cls"].decode() == str(entry["class"])
        assert sample["jpg"] == (birds / "CUB_200_2011" / "images" / BIRDS[number][0]).read_bytes()
    assert read_table(shard).columns["class"].tolist() == [BIRDS[number][1] - 1 for number in split_numbers]
    assert not (tmp_path / "run").exists()


def test_birds_from_inner_folder(birds: Path, tmp_path: Path) -> None:
    for name in ("text", "text_c10"):
        if (birds / name).exists():
            (birds / name).rename(birds / "CUB_200_2011" / name)
    (birds / "trainvalclasses.txt").rename(birds / "CUB_200_2011" / "trainvalclasses.txt")
    assert CubConfig().pack(birds / "CUB_200_2011", tmp_path / "out").count == 3


@pytest.fixture
def flowers(tmp_path: Path, image_writer: Place) -> Path:
    folder = tmp_path / "flowers"
    for number, label in enumerate(LABELS, start=1):
        image_writer(folder / "jpg" / f"image_{number:05d}.jpg", number)
        captions = folder / "text_c10" / f"class_{label:05d}" / f"image_{number:05d}.txt"
        captions.parent.mkdir(parents=True, exist_ok=True)
        captions.write_text(f"a flower {number}\nanother word for {number}\n")
    savemat(folder / "imagelabels.mat", {"labels": np.array([LABELS], np.uint8)})
    parts = {"trnid": [[4, 1]], "valid": [[3]], "tstid": [[2]]}
    savemat(folder / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in parts.items()})
    (folder / "trainvalclasses.txt").write_text("class_00002\n")
    (folder / "testclasses.txt").write_text("class_00001\nclass_00003\n")
    return folder


@pytest.mark.parametrize(
    ("protocol", "split", "split_numbers"),
    [
        ("classes", "train", [1, 3]),
        ("classes", "test", [2, 4]),
        ("images", "train", [1, 4]),
        ("images", "val", [3]),
        ("images", "test", [2]),
        ("classes", "all", [1, 2, 3, 4]),
    ],
)
def test_flowers(flowers: Path, tmp_path: Path, protocol: str, split: str, split_numbers: list[int]) -> None:
    config = OxfordConfig.model_validate({"protocol": protocol, "split": split})
    (shard,) = config.pack(flowers, tmp_path / "out").shards
    described = [json.loads(sample["json"]) for sample in read_shard(shard)]
    assert [entry["source"] for entry in described] == [
        f"jpg/image_{number:05d}.jpg" for number in split_numbers
    ]
    assert [entry["class"] for entry in described] == [LABELS[number - 1] - 1 for number in split_numbers]
    assert described[0]["captions"] == [
        f"a flower {split_numbers[0]}",
        f"another word for {split_numbers[0]}",
    ]


def test_invalid_use_of_flowers_raises_user_error(flowers: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split: given 'val', allowed with protocol=classes: train, test"):
        OxfordConfig(split="val").pack(flowers, tmp_path / "out")
    (flowers / "trainvalclasses.txt").unlink()
    with pytest.raises(UserError, match=r"trainvalclasses\.txt: the list .* set protocol=images"):
        OxfordConfig().pack(flowers, tmp_path / "out")
    (flowers / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(UserError, match=r"image_00004\.jpg: missing, as 1 files are"):
        OxfordConfig(protocol="images").pack(flowers, tmp_path / "out")
    (flowers / "setid.mat").write_bytes(b"no matrix at all")
    with pytest.raises(UserError, match=r"setid\.mat: not a table of Oxford-102"):
        OxfordConfig(protocol="images").pack(flowers, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_invalid_use_of_birds_raises_user_error(birds: Path, tmp_path: Path) -> None:
    (birds / "CUB_200_2011" / "classes.txt").write_text("no table\n")
    with pytest.raises(UserError, match=r"classes\.txt: not a table of CUB-200-2011"):
        CubConfig().pack(birds, tmp_path / "out")
    with pytest.raises(UserError, match=r"images\.txt is not here"):
        CubConfig().pack(tmp_path, tmp_path / "out")
