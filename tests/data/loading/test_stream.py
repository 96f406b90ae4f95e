import functools
import io
import itertools
import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.loading.sample_readers import ImageSamples, TokenSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.order.mixture import shares
from vqd_scale.data.order.plan import LaneOrder
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, read_shard, shard_name, write_shard_set
from vqd_scale.data.transforms import CenterCrop, fitted

COUNTS = (5, 1, 11, 8, 3)
LANES = 12
TOKENS = TokenSamples(length=6, codes=600, text_length=3)


def token_sample(number: int) -> Sample:
    return {
        KEY: f"{number:04d}",
        "tokens.npy": np.arange(number, number + 6, dtype=np.uint16),
        "text.npy": np.array([number, 7, 0], dtype=np.int32),
        "txt": f"number {number}",
    }


def token_samples(numbers: Sequence[int], spoilt: Mapping[int, Sample]) -> Iterator[Sample]:
    return (spoilt.get(number, token_sample(number)) for number in numbers)


def write_tokens(
    folder: Path, counts: tuple[int, ...] = COUNTS, spoilt: Mapping[int, Sample] | None = None
) -> Path:
    ends = np.cumsum(counts).tolist()
    recipes = [
        ShardRecipe(
            shard_name(shard), count, functools.partial(token_samples, range(end - count, end), spoilt or {})
        )
        for shard, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]
    write_shard_set(folder, {"content": "tokens"}, recipes, "test")
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def stream(
    folder: Path, *, rank: int = 0, ranks: int = 1, cursor: int = 0, seed: int = 3, **settings: int | float
) -> Stream[TokenBatch]:
    config = StreamConfig.model_validate(
        {"path": folder, "global_batch_size": LANES, "shuffle_window": 4, "max_bad_fraction": 0.1, **settings}
    )
    report = folder.parent / f"quarantine-{rank}.jsonl"
    return Stream(config, TOKENS, seed=seed, rank=rank, ranks=ranks, cursor=cursor, quarantine=report)


def first(batches: Stream[TokenBatch], count: int) -> list[TokenBatch]:
    with closing(iter(batches)) as iterator:
        return list(itertools.islice(iterator, count))


def keys_by_batch(folder: Path, count: int, *, ranks: int, cursor: int = 0, seed: int = 3) -> list[list[str]]:
    by_rank = [
        first(stream(folder, rank=rank, ranks=ranks, cursor=cursor, seed=seed), count)
        for rank in range(ranks)
    ]
    return [[key for batch in batches for key in batch.keys] for batches in zip(*by_rank, strict=True)]


def test_batches_follow_the_plan(tokens: Path) -> None:
    """Return the plan's samples by a slow reference that reads everything first."""
    shards = ShardSet.open(tokens)
    everything = [list(read_shard(shard)) for shard in shards.shards]
    (share,) = shares([1], LANES)
    order = LaneOrder([shard.count for shard in shards.shards], share, 4, 3)
    for number, batch in enumerate(first(stream(tokens), 7)):
        slots = np.arange(number * LANES, (number + 1) * LANES)
        _, numbers, members = order.locate(slots)
        rows = zip(numbers.tolist(), members.tolist(), strict=True)
        samples = [everything[shard][member] for shard, member in rows]
        assert batch.keys == [sample[KEY] for sample in samples]
        assert batch.slots.tolist() == slots.tolist()
        assert batch.valid.all()
        values = torch.tensor([int(key) for key in batch.keys])
        assert torch.equal(batch.tokens, values[:, None] + torch.arange(6))
        assert torch.equal(batch.text[:, 0], values)
        assert batch.tokens.dtype == batch.text.dtype == batch.slots.dtype == torch.int64


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9), st.integers(0, 5))
def test_batches_do_not_depend_on_ranks_or_cursor(tokens: Path, ranks: int, begin: int, seed: int) -> None:
    all_batches = keys_by_batch(tokens, 12, ranks=1, seed=seed)
    assert (
        keys_by_batch(tokens, 3, ranks=ranks, cursor=begin * LANES, seed=seed)
        == all_batches[begin : begin + 3]
    )


def test_every_sample_once_per_epoch(tokens: Path) -> None:
    epochs = 3
    samples = sum(COUNTS)
    batches = keys_by_batch(tokens, -(-epochs * samples // LANES), ranks=2)
    keys = [key for batch in batches for key in batch]
    for epoch in range(epochs):
        epoch_keys = sorted(keys[epoch * samples : (epoch + 1) * samples])
        assert epoch_keys == [f"{number:04d}" for number in range(samples)]


@pytest.mark.parametrize("counts", [(1,), (2, 0, 1)])
def test_fewer_samples_than_lanes(tmp_path: Path, counts: tuple[int, ...]) -> None:
    folder = write_tokens(tmp_path / "set", counts)
    keys = [key for batch in keys_by_batch(folder, 4, ranks=3) for key in batch]
    samples = sum(counts)
    for epoch in range(len(keys) // samples):
        epoch_keys = sorted(keys[epoch * samples : (epoch + 1) * samples])
        assert epoch_keys == [f"{number:04d}" for number in range(samples)]


def test_reader_processes_give_equal_batches(tokens: Path) -> None:
    expected = first(stream(tokens, rank=1, ranks=2, cursor=24), 5)
    worker_batches = first(stream(tokens, rank=1, ranks=2, cursor=24, num_workers=2), 5)
    for batch, expected_batch in zip(worker_batches, expected, strict=True):
        assert batch.keys == expected_batch.keys
        assert torch.equal(batch.tokens, expected_batch.tokens)
        assert torch.equal(batch.slots, expected_batch.slots)


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 4), (3, 3), (12, 2)])
def test_batches_do_not_depend_on_ranks_and_workers(tokens: Path, ranks: int, workers: int) -> None:
    parts = [first(stream(tokens, rank=rank, ranks=ranks, num_workers=workers), 4) for rank in range(ranks)]
    together = [[key for batch in batches for key in batch.keys] for batches in zip(*parts, strict=True)]
    assert together == keys_by_batch(tokens, 4, ranks=1)


def test_thread_ends_with_iterator(tokens: Path) -> None:
    before = threading.active_count()
    with closing(iter(stream(tokens))) as iterator:
        next(iterator)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


SPOILT: dict[str, tuple[Sample, str]] = {
    "no tokens": ({"text.npy": np.zeros(3, np.int32)}, "has no 'tokens.npy'"),
    "other length": (
        {"tokens.npy": np.zeros(5, np.uint16), "text.npy": np.zeros(3, np.int32)},
        "has an array of type uint16 and shape (5,), not 6 integers",
    ),
    "floats": (
        {"tokens.npy": np.zeros(6, np.float32), "text.npy": np.zeros(3, np.int32)},
        "has an array of type float32 and shape (6,), not 6 integers",
    ),
    "beyond the codebook": (
        {"tokens.npy": np.full(6, 600, np.uint16), "text.npy": np.zeros(3, np.int32)},
        "has tokens outside 0 to 599",
    ),
    "below zero": (
        {"tokens.npy": np.full(6, -1, np.int32), "text.npy": np.zeros(3, np.int32)},
        "has tokens outside 0 to 599",
    ),
    "cut": (
        {"tokens.npy": b"\x93NUMPY\x01\x00v\x00{'descr'", "text.npy": b""},
        "has an array that cannot be read",
    ),
    "empty": ({"tokens.npy": b"", "text.npy": b""}, "has an array that cannot be read"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_bad_sample_keeps_its_slot(tokens: Path, tmp_path: Path, fault: str) -> None:
    members, reason = SPOILT[fault]
    folder = write_tokens(tmp_path / "set", spoilt={7: {KEY: "0007", **members}})
    batches = first(stream(folder), 7)
    assert [batch.keys for batch in batches] == keys_by_batch(tokens, 7, ranks=1)
    for batch in batches:
        for row, key in enumerate(batch.keys):
            assert bool(batch.valid[row]) == (key != "0007")
            if key == "0007":
                assert not batch.tokens[row].any()
                assert not batch.text[row].any()
    (line,) = (tmp_path / "quarantine-0.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert (report["shard"], report["key"]) == ("000002.tar", "0007")
    assert report["reason"].startswith(reason)


@pytest.mark.parametrize("label", [b"9", b"-1", b"three", b""])
def test_classes_are_read_for_class_conditional_models(tmp_path: Path, label: bytes) -> None:
    """Labels without captions; a sample with an invalid label keeps its slot."""
    codes = np.arange(6, dtype=np.uint16)
    labeled = {n: {KEY: f"{n:04d}", "tokens.npy": codes, "cls": n % 9} for n in range(sum(COUNTS))}
    folder = write_tokens(tmp_path / "set", spoilt=labeled | {7: labeled[7] | {"cls": label}})
    config = StreamConfig(path=folder, global_batch_size=LANES, max_bad_fraction=0.1)
    batches = Stream(
        config,
        TokenSamples(length=6, codes=600, classes=9),
        seed=0,
        rank=0,
        ranks=1,
        cursor=0,
        quarantine=tmp_path / "bad.jsonl",
    )
    for batch in first(batches, 7):
        assert batch.text.shape == (LANES, 0)
        assert batch.labels is not None
        expected = [0 if key == "0007" else int(key) % 9 for key in batch.keys]
        assert batch.labels.tolist() == expected
        assert batch.valid.tolist() == [key != "0007" for key in batch.keys]
    assert "has a class that is none of 0 to 8" in (tmp_path / "bad.jsonl").read_text()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_too_many_bad_samples_stop_the_stream(tmp_path: Path, workers: int) -> None:
    spoilt: dict[int, Sample] = {number: {KEY: f"{number:04d}", "txt": "alone"} for number in (1, 5, 9)}
    folder = write_tokens(tmp_path / "set", spoilt=spoilt)
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.1.*quarantine-0"):
        first(stream(folder, num_workers=workers), 20)
    assert len(first(stream(folder, max_bad_fraction=0.2), 20)) == 20


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_damaged_shard_raises_user_error(tmp_path: Path, workers: int) -> None:
    folder = write_tokens(tmp_path / "set")
    shutil.copy(folder / "000000.npz", folder / "000002.npz")
    with pytest.raises(
        UserError, match=r"^[^\n]*000002\.npz: changed or damaged since the set was made[^\n]*$"
    ):
        first(stream(folder, num_workers=workers), 5)


@pytest.mark.long
def test_killed_reader_process_raises_error(tokens: Path) -> None:
    with closing(iter(stream(tokens, num_workers=2))) as iterator:
        next(iterator)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(RuntimeError, match="reading process died"):
            for _ in range(10_000):
                next(iterator)
    assert not multiprocessing.active_children()


def test_invalid_use_raises_user_error(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of the ranks"):
        stream(tokens, ranks=5)
    with pytest.raises(UserError, match="no set of shards"):
        stream(tmp_path / "nowhere")
    with pytest.raises(UserError, match="global_batch_size"):
        load_config(StreamConfig, overrides=["path=x", "global_batch_size=0"])


def image_of(number: int) -> Image.Image:
    image = Image.new("RGB", (20 + number, 20), (number, 2 * number, 255 - number))
    image.paste("white", (0, 0, 20 + number, 8))
    return image


def image_samples(count: int) -> Iterator[Sample]:
    for number in range(count):
        file = io.BytesIO()
        image_of(number).save(file, format=("PNG", "BMP")[number % 2])
        content = file.getvalue() if number != 4 else file.getvalue()[:60]
        yield {KEY: f"{number:02d}", ("png", "bmp")[number % 2]: content, "txt": f" picture {number}\n"}


def test_image_batches(tmp_path: Path) -> None:
    recipe = ShardRecipe(shard_name(0), 10, functools.partial(image_samples, 10))
    write_shard_set(tmp_path / "set", {"content": "images"}, [recipe], "test")
    config = StreamConfig(path=tmp_path / "set", global_batch_size=5, max_bad_fraction=0.5)
    kind = ImageSamples(CenterCrop(size=16))
    image_shards: Stream[ImageBatch] = Stream(
        config, kind, seed=0, rank=0, ranks=1, cursor=0, quarantine=tmp_path / "bad.jsonl"
    )
    with closing(iter(image_shards)) as iterator:
        batches = list(itertools.islice(iterator, 2))
    assert sorted(key for batch in batches for key in batch.keys) == [f"{number:02d}" for number in range(10)]
    for batch in batches:
        assert batch.images.shape == (5, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        for row, key in enumerate(batch.keys):
            number = int(key)
            is_bad = number == 4
            assert bool(batch.valid[row]) != is_bad
            expected = np.zeros((16, 16, 3), np.uint8) if is_bad else fitted(np.array(image_of(number)), 16)
            assert batch.captions[row] == ("" if is_bad else f"picture {number}")
            assert np.array_equal(batch.images[row].permute(1, 2, 0).numpy(), expected)
