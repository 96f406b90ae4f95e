"""A dataset with one sample of each known defect."""

import io
import itertools
import json
import tarfile
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqd_scale.cli.make_shards import main
from vqd_scale.core.errors import UserError
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import ImageBatch
from vqd_scale.data.loading.sample_readers import ImageSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.transforms import NearCenterCrop

VALID_SAMPLES = 24
"""Sound samples in each of two tars."""


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG")
        return file.getvalue()


def png_bomb() -> bytes:
    """Return a kilobyte whose header declares 40,000 x 40,000 pixels, nearly five gigabytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    header = (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def sample(key: str, number: int) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", jpeg(number)),
        (f"{key}.json", json.dumps({"number": number}).encode()),
        (f"{key}.txt", b"noise"),
    ]


POISON: dict[str, list[tuple[str, bytes]]] = {
    "cut": [("cut.jpg", jpeg(0)[:-300]), ("cut.txt", b"a cut picture")],
    "zero": [("zero.jpg", b""), ("zero.txt", b"nothing")],
    "garbage": [("garbage.jpg", jpeg(1)), ("garbage.json", b"\x00{no json"), ("garbage.txt", b"words")],
    "silent": [("silent.jpg", jpeg(2))],
    "bomb": [("bomb.png", png_bomb()), ("bomb.txt", b"a bomb")],
    "../../outside": [("../../outside.jpg", jpeg(3)), ("../../outside.txt", b"up and away")],
    "/absolute": [("/absolute.jpg", jpeg(4)), ("/absolute.txt", b"at the root")],
    "0-0": sample("0-0", 5),
    "twice": [("twice.jpg", jpeg(6)), ("twice.jpg", jpeg(7)), ("twice.txt", b"one of two")],
}
IN_THE_INDEX = {
    "garbage": "has a member that is not JSON",
    "../../outside": "has a name that leads out of its folder",
    "/absolute": "has a name that leads out of its folder",
    "0-0": "has the key of an earlier sample",
    "twice": "has two members 'jpg'",
}
IN_THE_STREAM = {
    "cut": "is not a readable image",
    "zero": "is not a readable image",
    "silent": "has no 'txt'",
    "bomb": "is not a readable image (Image size (1600000000 pixels) exceeds",
}


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    folder = tmp_path / "work" / "set"
    folder.mkdir(parents=True)
    poison = [member for members in POISON.values() for member in members]
    valid_members = [
        [m for n in range(VALID_SAMPLES) for m in sample(f"{tar}-{n}", 100 * tar + n)] for tar in range(3)
    ]
    write_tar(folder / "00000.tar", valid_members[0] + poison)
    write_tar(folder / "00001.tar", valid_members[1])
    write_tar(folder / "00002.tar", valid_members[2])
    cut = folder / "00002.tar"
    # In the image of the ninth sample.
    with tarfile.open(cut) as archive:
        place = archive.getmember("2-8.jpg").offset_data
    cut.write_bytes(cut.read_bytes()[: place + 100])
    return folder


def test_invalid_samples_are_counted_by_reason(
    poisoned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(poisoned.parent)
    with pytest.raises(SystemExit):
        main(["img2dataset", "set", "--output", "index"])
    assert "more than max_bad_fraction=0.01" in capsys.readouterr().err
    main(["img2dataset", "set", "--output", "index", "max_bad_fraction=0.5"])
    assert "7 bad, listed in index/quarantine.jsonl" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("index/quarantine.jsonl").read_text().splitlines()]
    index_reasons = {line["key"]: line["reason"] for line in lines if line["shard"] == "00000.tar"}
    assert index_reasons == IN_THE_INDEX
    assert [(line["key"], line["reason"]) for line in lines if line["shard"] != "00000.tar"] == [
        ("2-8", "has a member 'jpg' that is cut off"),
        ("", "the tar ends within '2-8.jpg'; 9 samples were found, up to 1 are lost"),
    ]

    shards = ShardSet.open(Path("index"))
    assert shards.counts == (VALID_SAMPLES + len(IN_THE_STREAM), VALID_SAMPLES, 8)
    batches = epoch(Path("index"), max_bad_fraction=0.2)
    assert Counter(key for batch in batches for key in batch.keys) == Counter(
        [f"0-{n}" for n in range(VALID_SAMPLES)]
        + list(IN_THE_STREAM)
        + [f"1-{n}" for n in range(VALID_SAMPLES)]
        + [f"2-{n}" for n in range(8)]
    )
    quarantined = {
        key
        for batch in batches
        for key, valid in zip(batch.keys, batch.valid.tolist(), strict=True)
        if not valid
    }
    assert quarantined == set(IN_THE_STREAM)
    for batch in batches:
        assert not batch.images[~batch.valid].any()
    lines = [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == set(IN_THE_STREAM)
    for line in lines:
        assert line["reason"].startswith(IN_THE_STREAM[line["key"]])
        assert line["shard"] == "00000.tar"
    with pytest.raises(UserError, match=r"more than max_bad_fraction=0\.01"):
        epoch(Path("index"), max_bad_fraction=0.01)

    # Nothing was written outside the dataset's folder, nor where the members' names point to.
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
    assert sorted(path.name for path in poisoned.parent.iterdir()) == ["bad.jsonl", "index", "set"]
    assert not Path("/absolute.jpg").exists()


def epoch(folder: Path, max_bad_fraction: float) -> list[ImageBatch]:
    count = ShardSet.open(folder).count
    config = StreamConfig(path=folder, global_batch_size=1, max_bad_fraction=max_bad_fraction)
    image_stream: Stream[ImageBatch] = Stream(
        config,
        ImageSamples(NearCenterCrop(size=32)),
        seed=0,
        rank=0,
        ranks=1,
        cursor=0,
        quarantine=Path("bad.jsonl"),
    )
    with closing(iter(image_stream)) as batches:
        return list(itertools.islice(batches, count))
