"""Global batches on any ranks and workers: mixtures, chosen captions, balanced classes, bad samples."""

import functools
import io
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import vqd_scale.data.loading.stream
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import ImageBatch, TokenBatch
from vqd_scale.data.loading.sample_readers import ImageSamples, TokenSamples
from vqd_scale.data.loading.stream import Stream
from vqd_scale.data.order.balance import BalancedOrder
from vqd_scale.data.order.mixture import shares
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, shard_name, write_shard_set
from vqd_scale.data.transforms import CenterCrop

LANES = 24
UNEVEN, ONE_SHARD = (5, 1, 0, 11, 8, 3), (40,)
TOKENS = TokenSamples(length=4, codes=600, text_length=3)
BAD_MEMBERS = {7: {"tokens.npy": np.full(4, 600, np.uint16)}, 112: {"tokens.npy": b"cut"}}
"""What is wrong with some samples, by number: those of the second set count from 100."""

Row = tuple[str, tuple[int, ...], bool, int]
"""Key, caption ids, whether it is valid, slot."""


def captions_of(number: int) -> list[str]:
    return [f"{number} called {name}" for name in range(number % 3 + 1)]


def class_of(number: int) -> int:
    return 0 if number % 5 else 3 + number % 2


def token_samples(numbers: range) -> Iterator[Sample]:
    for number in numbers:
        captions = captions_of(number)
        yield {
            KEY: f"{number:03d}",
            "tokens.npy": np.arange(number, number + 4, dtype=np.uint16),
            "text.npy": np.array([[number, caption, 1] for caption in range(len(captions))], np.int32),
            "txt": captions[0],
            "json": {"captions": captions, "class": class_of(number)},
            **BAD_MEMBERS.get(number, {}),
        }


def write_set(
    folder: Path, counts: Sequence[int], first: int, samples: Callable[[range], Iterator[Sample]]
) -> Path:
    ends = (np.cumsum(counts) + first).tolist()
    recipes = [
        ShardRecipe(shard_name(shard), count, functools.partial(samples, range(end - count, end)))
        for shard, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]
    write_shard_set(folder, {"content": "test"}, recipes, "test")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    return (
        write_set(root / "uneven", UNEVEN, 0, token_samples),
        write_set(root / "one", ONE_SHARD, 100, token_samples),
    )


MODES = ("uneven", "one_shard", "mixed", "random", "each", "balanced")


def config_of(mode: str, folders: tuple[Path, Path], workers: int = 0) -> StreamConfig:
    uneven, one = ({"path": folder} for folder in folders)
    mixed = {"sources": [uneven | {"weight": 0.7}, one | {"weight": 0.3}]}
    stream_settings: dict[str, Any] = {
        "uneven": uneven,
        "one_shard": one,
        "mixed": mixed,
        "random": mixed | {"captions": "random"},
        "each": mixed | {"captions": "each"},
        "balanced": uneven | {"class_balanced": True},
    }[mode]
    return StreamConfig.model_validate(
        {
            "global_batch_size": LANES,
            "shuffle_window": 4,
            "max_bad_fraction": 0.5,
            "num_workers": workers,
            **stream_settings,
        }
    )


def rows_of(config: StreamConfig, ranks: int, batches: int, begin: int, seed: int) -> list[list[Row]]:
    """Return the global batches, concatenated from all ranks' parts."""
    parts: list[list[TokenBatch]] = []
    for rank in range(ranks):
        stream = Stream(
            config,
            TOKENS,
            seed=seed,
            rank=rank,
            ranks=ranks,
            cursor=begin * LANES,
            quarantine=config.mixed[0].path.parent / "bad.jsonl",  # pyright: ignore[reportArgumentType]
        )
        with closing(iter(stream)) as iterator:
            parts.append(list(itertools.islice(iterator, batches)))
    return [
        [
            (key, tuple(text), valid, slot)
            for part in of_batch
            for key, text, valid, slot in zip(
                part.keys, part.text.tolist(), part.valid.tolist(), part.slots.tolist(), strict=True
            )
        ]
        for of_batch in zip(*parts, strict=True)
    ]


def in_this_process(
    producers: Sequence[Callable[[], Generator[Any]]], depth: int, is_closed: object
) -> Generator[Any]:
    """Return the parts of `in_processes` in the same order, without processes."""
    del depth, is_closed
    generators = [producer() for producer in producers]
    for generator in itertools.cycle(generators):
        yield next(generator)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(MODES),
    st.sampled_from([(1, 8), (2, 1), (2, 2), (3, 3), (4, 2), (12, 4)]),
    st.sampled_from([(1, 0), (1, 3), (4, 0), (6, 4)]),
    st.integers(1, 9),
    st.integers(0, 2),
)
def test_batches_do_not_depend_on_ranks_workers_or_cursor(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    before: tuple[int, int],
    after: tuple[int, int],
    stop: int,
    seed: int,
) -> None:
    """Resume at any batch with other ranks and workers, and compare with an uninterrupted run."""
    monkeypatch.setattr(vqd_scale.data.loading.stream, "in_processes", in_this_process)
    all_rows = rows_of(config_of(mode, folders), 1, 12, 0, seed)
    first = rows_of(config_of(mode, folders, before[1]), before[0], stop, 0, seed)
    remaining_rows = rows_of(config_of(mode, folders, after[1]), after[0], 12 - stop, stop, seed)
    assert first + remaining_rows == all_rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ranks", "workers", "batch_size"), [(2, 0, 48), (4, 3, 8), (1, 0, 6), (5, 2, 20)])
def test_another_batch_size_loses_and_repeats_no_sample(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    ranks: int,
    workers: int,
    batch_size: int,
) -> None:
    """Resume with another batch size and the lanes of the first: the order of the slots stays the same."""
    monkeypatch.setattr(vqd_scale.data.loading.stream, "in_processes", in_this_process)
    expected = [row for rows in rows_of(config_of(mode, folders), 1, 14, 0, seed=1) for row in rows]
    resumed = {"global_batch_size": batch_size, "order_lanes": LANES}
    config = config_of(mode, folders, workers).model_copy(update=resumed)
    rows = [row for rows in rows_of(config, ranks, 240 // batch_size, 3, seed=1) for row in rows]
    assert rows == expected[3 * LANES :][: len(rows)]
    assert len(rows) == 240


@pytest.mark.parametrize(
    ("mode", "ranks", "workers"),
    [
        ("random", 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("mixed", 1, 2),
                ("each", 2, 1),
                ("mixed", 4, 2),
                ("random", 3, 3),
                ("one_shard", 1, 8),
                ("balanced", 2, 2),
            ]
        ),
    ],
)
def test_batches_of_real_processes_equal_one_process(
    folders: tuple[Path, Path], mode: str, ranks: int, workers: int
) -> None:
    expected = rows_of(config_of(mode, folders), 1, 3, 5, seed=1)
    assert rows_of(config_of(mode, folders, workers), ranks, 3, 5, seed=1) == expected


def sequence(mode: str, folders: tuple[Path, Path], batches: int = 30) -> list[Row]:
    return [row for batch in rows_of(config_of(mode, folders), 2, batches, 0, seed=3) for row in batch]


@pytest.mark.parametrize("mode", ["uneven", "one_shard", "mixed"])
def test_every_sample_once_per_epoch_of_its_dataset(folders: tuple[Path, Path], mode: str) -> None:
    rows = sequence(mode, folders)
    assert [slot for _, _, _, slot in rows] == list(range(len(rows)))
    for counts, first in ((UNEVEN, 0), (ONE_SHARD, 100)):
        keys = [key for key, _, _, _ in rows if (int(key) >= 100) == (first == 100)]
        expected = [f"{first + number:03d}" for number in range(sum(counts))]
        epochs = [keys[start : start + len(expected)] for start in range(0, len(keys), len(expected))]
        assert all(sorted(epoch) == expected for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1]) if epochs else mode != "mixed"
    for key, text, valid, _ in rows:
        assert valid == (int(key) not in BAD_MEMBERS)
        assert text == ((int(key), 0, 1) if valid else (0, 0, 0))


def test_mixture_proportions_hold_after_every_batch(folders: tuple[Path, Path]) -> None:
    first_set_samples = 0
    for number, batch in enumerate(rows_of(config_of("mixed", folders), 1, 40, 0, seed=0), start=1):
        first_set_samples += sum(int(key) < 100 for key, _, _, _ in batch)
        assert abs(first_set_samples - 0.7 * number * LANES) < 1


def test_each_caption_once_per_epoch(folders: tuple[Path, Path]) -> None:
    rows = sequence("each", folders)
    for counts, first in ((UNEVEN, 0), (ONE_SHARD, 100)):
        numbers = range(first, first + sum(counts))
        expected = Counter(number for number in numbers for _ in captions_of(number))
        dataset_rows = [row for row in rows if int(row[0]) in numbers]
        for start in range(0, len(dataset_rows) - expected.total() + 1, expected.total()):
            epoch = dataset_rows[start : start + expected.total()]
            assert Counter(int(key) for key, _, _, _ in epoch) == expected
            texts = Counter(text for _, text, valid, _ in epoch if valid)
            assert texts == Counter(
                (number, caption, 1)
                for number in numbers
                if number not in BAD_MEMBERS
                for caption in range(len(captions_of(number)))
            )


def test_random_caption_covers_all_captions(folders: tuple[Path, Path]) -> None:
    """Samples equal those of ``first``; captions are uniform and depend on slot and seed only."""
    rows, first = sequence("random", folders, 100), sequence("mixed", folders, 100)
    assert [(key, valid) for key, _, valid, _ in rows] == [(key, valid) for key, _, valid, _ in first]
    caption_counts = Counter(text[1] for key, text, valid, _ in rows if valid and int(key) % 3 == 2)
    assert set(caption_counts) == {0, 1, 2}
    assert min(caption_counts.values()) > 0.2 * caption_counts.total()
    for key, text, valid, _ in rows:
        assert not valid or text[1] <= int(key) % 3


def slow_balance(numbers: Sequence[int], seed: int, slots: int) -> list[int]:
    """Return the order of balanced classes by lists: rounds of classes, each with its own sample order."""
    by_class = defaultdict[int, list[int]](list)
    for number in numbers:
        by_class[class_of(number)].append(number)
    classes = sorted(by_class)
    slot_samples: list[int] = []
    for round_number in itertools.count():
        for class_index in permutation(seed, Purpose.CLASS_ORDER, round_number, len(classes)).tolist():
            class_samples = by_class[classes[class_index]]
            epoch, place = divmod(round_number, len(class_samples))
            name = epoch * len(classes) + class_index
            slot_samples.append(
                class_samples[permutation(seed, Purpose.CLASS_MEMBERS, name, len(class_samples))[place]]
            )
            if len(slot_samples) == slots:
                return slot_samples
    raise AssertionError


def test_balanced_classes_are_equally_frequent(folders: tuple[Path, Path]) -> None:
    numbers = [int(key) for key, _, _, _ in sequence("balanced", folders)]
    assert numbers == slow_balance(range(sum(UNEVEN)), 3, len(numbers))
    counts = Counter[int]()
    for number in numbers:
        counts[class_of(number)] += 1
        assert max(counts.values()) - min(counts[of] for of in (0, 3, 4)) <= 1
    for of in (0, 3, 4):
        class_numbers = [number for number in numbers if class_of(number) == of]
        members = [number for number in range(sum(UNEVEN)) if class_of(number) == of]
        for start in range(0, len(class_numbers) - len(members) + 1, len(members)):
            assert sorted(class_numbers[start : start + len(members)]) == members


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_balanced_order_is_random_access(slots: list[int]) -> None:
    classes = np.array([class_of(number) for number in range(sum(UNEVEN))], np.int32)
    (share,) = shares([1], LANES)
    order = BalancedOrder(classes, UNEVEN, share, seed=3)
    _, shards, members = order.locate(np.array(slots))
    begins = np.cumsum(UNEVEN) - np.array(UNEVEN)
    expected = slow_balance(range(sum(UNEVEN)), 3, 301)
    assert (begins[shards] + members).tolist() == [expected[slot] for slot in slots]


def test_missing_captions_or_classes_raise_user_error(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    def plain(numbers: range) -> Iterator[Sample]:
        for number in numbers:
            yield {
                KEY: f"{number}",
                "tokens.npy": np.zeros(4, np.uint16),
                "text.npy": np.zeros(3, np.int32),
                "json": {"captions": ["one", "two"]},
            }

    folder = write_set(tmp_path / "set", (4,), 0, plain)
    config = StreamConfig(path=folder, global_batch_size=4, captions="each", max_bad_fraction=0.1)
    with pytest.raises(UserError, match="has the ids of 1 captions, not of all that it has"):
        rows_of_four(config)
    assert all(all(batch.valid) for batch in rows_of_four(config.model_copy(update={"captions": "first"})))
    with pytest.raises(UserError, match=r"000000\.tar: holds samples without a class"):
        rows_of_four(config.model_copy(update={"captions": "first", "class_balanced": True}))


def rows_of_four(config: StreamConfig) -> list[TokenBatch]:
    stream = Stream(
        config, TOKENS, seed=0, rank=0, ranks=1, cursor=0, quarantine=Path(str(config.path)) / "bad.jsonl"
    )
    with closing(iter(stream)) as iterator:
        return list(itertools.islice(iterator, 4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give either path, one set of shards, or sources, several that are mixed"),
        (["path=a", "sources=[{path: b}]"], "give either path"),
        (["sources=[]"], "sources"),
        (["sources=[{path: a, weight: 0}]"], r"sources\.0\.weight"),
        (
            ["sources=[{path: a, weight: 0.01}, {path: b}]", "global_batch_size=24"],
            "a weight of 0.01 is less than one sample in a batch of 24; raise it, or data.global_batch_size",
        ),
        (["path=a", "captions=each", "class_balanced=true"], "define an epoch differently"),
    ],
)
def test_invalid_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(StreamConfig, overrides=overrides)


def image_samples(numbers: range) -> Iterator[Sample]:
    for number in numbers:
        with io.BytesIO() as file:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
            content = file.getvalue()
        captions = captions_of(number)
        yield {KEY: f"{number}", "png": content, "txt": captions[0], "json": {"captions": captions}}


def test_each_caption_of_images(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", (4, 3), 0, image_samples)
    items = [caption for number in range(7) for caption in captions_of(number)]
    config = StreamConfig(path=folder, global_batch_size=1, captions="each")
    stream: Stream[ImageBatch] = Stream(
        config,
        ImageSamples(CenterCrop(size=8)),
        seed=0,
        rank=0,
        ranks=1,
        cursor=0,
        quarantine=tmp_path / "bad.jsonl",
    )
    assert stream.items == len(items)
    with closing(iter(stream)) as batches:
        batch_list = list(itertools.islice(batches, len(items)))
    assert sorted(batch.captions[0] for batch in batch_list) == sorted(items)
    for batch in batch_list:
        assert batch.captions[0].startswith(f"{batch.keys[0]} called")
        assert int(batch.images[0, 0, 0, 0]) == int(batch.keys[0])
