from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from benchmarks import tokens
from benchmarks.loader import (
    PictureProblem,
    alternative,
    compared_pictures,
    ours,
    picture_figures,
)
from benchmarks.tokens import TokenProblem, check_tokens, token_figures
from benchmarks.webdataset_baseline import plain_token_batches

from vqd_scale.core.arrays import NDArray

FEW = TokenProblem(shards=3, samples=10, length=6, codes=20, text_length=4, batch=4)

SMALL = PictureProblem(pictures=6, side=128, size=32, batch=3)


def test_both_sides_give_the_same_pictures(tmp_path: Path) -> None:
    SMALL.write(tmp_path)
    found = compared_pictures(
        {"ours": ours(SMALL), "alternative": alternative(SMALL), "dct": ours(SMALL, dct_scaled=True)},
        tmp_path,
    )
    assert found["ours"]["max"] <= 2
    assert found["dct"]["mean"] > found["ours"]["mean"]


def test_nothing_is_measured_where_the_pictures_differ(tmp_path: Path) -> None:
    SMALL.write(tmp_path)

    def brighter(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        for keys, pictures in ours(SMALL)(folder):
            yield keys, (pictures // 2 + 64).astype(np.uint8)

    def fewer(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        yield next(iter(alternative(SMALL)(folder)))

    with pytest.raises(ValueError, match="differ by up to"):
        compared_pictures({"ours": brighter, "alternative": alternative(SMALL)}, tmp_path)
    with pytest.raises(ValueError, match="ours: 3 pictures, not the 6"):
        compared_pictures({"ours": fewer, "alternative": alternative(SMALL)}, tmp_path)


@pytest.mark.long
def test_the_figures(tmp_path: Path) -> None:
    figures = picture_figures(1, SMALL)
    wanted = {"ours", "alternative", "ratio", "memory_ratio", "image_ratio", "dct_scaled_ratio"}
    assert wanted <= set(figures)
    assert figures["ratio"] == figures["alternative"] / figures["ours"] == figures["image_ratio"]


def test_token_samples_are_what_was_written_and_what_webdataset_reads(tmp_path: Path) -> None:
    FEW.write(tmp_path)
    check_tokens(FEW, tmp_path, workers=0)
    for keys, codes, ids in plain_token_batches(sorted(tmp_path.glob("*.tar")), 4):
        for key, tokens_of, text in zip(keys, codes, ids, strict=True):
            expected = FEW.arrays(int(key))
            assert np.array_equal(tokens_of, expected[0])
            assert np.array_equal(text, expected[1])


def test_nothing_is_measured_where_a_token_differs(tmp_path: Path) -> None:
    FEW.write(tmp_path)
    with pytest.raises(ValueError, match="is not what was written"):
        check_tokens(TokenProblem(3, 10, 6, 21, 4, 4), tmp_path, workers=0)


def test_the_token_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(problem: TokenProblem, folder: Path, workers: int) -> tuple[float, float]:
        return 7e4, 9e4

    monkeypatch.setattr(tokens, "_speed", speed)
    figures = token_figures(1, FEW, workers=(0,))
    assert figures["token_samples_per_second"] == 7e4
    assert figures["token_samples_per_processor_second"] == 9e4
    assert figures["token_ratio"] > 0
