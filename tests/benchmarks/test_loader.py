from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from benchmarks import tokens
from benchmarks.loader import (
    ImageProblem,
    alternative,
    compare_images,
    image_figures,
    package_reader,
)
from benchmarks.tokens import TokenProblem, check_tokens, token_figures
from benchmarks.webdataset_baseline import plain_token_batches

from vqd_scale.core.arrays import NDArray

SMALL_TOKENS = TokenProblem(shards=3, samples=10, length=6, codes=20, text_length=4, batch=4)

SMALL = ImageProblem(images=6, side=128, size=32, batch=3)


def test_both_readers_return_equal_images(tmp_path: Path) -> None:
    SMALL.write(tmp_path)
    differences = compare_images(
        {
            "ours": package_reader(SMALL),
            "alternative": alternative(SMALL),
            "dct": package_reader(SMALL, dct_scaled=True),
        },
        tmp_path,
    )
    assert differences["ours"]["max"] <= 2
    assert differences["dct"]["mean"] > differences["ours"]["mean"]


def test_differing_images_stop_the_benchmark(tmp_path: Path) -> None:
    SMALL.write(tmp_path)

    def brighter(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        for keys, images in package_reader(SMALL)(folder):
            yield keys, (images // 2 + 64).astype(np.uint8)

    def fewer(folder: Path) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
        yield next(iter(alternative(SMALL)(folder)))

    with pytest.raises(ValueError, match="differ by up to"):
        compare_images({"ours": brighter, "alternative": alternative(SMALL)}, tmp_path)
    with pytest.raises(ValueError, match="ours: 3 images, not the 6"):
        compare_images({"ours": fewer, "alternative": alternative(SMALL)}, tmp_path)


@pytest.mark.long
def test_image_figures(tmp_path: Path) -> None:
    figures = image_figures(1, SMALL)
    expected_figures = {"ours", "alternative", "ratio", "memory_ratio", "image_ratio", "dct_scaled_ratio"}
    assert expected_figures <= set(figures)
    assert figures["ratio"] == figures["alternative"] / figures["ours"] == figures["image_ratio"]


def test_token_samples_equal_written_and_webdataset_samples(tmp_path: Path) -> None:
    SMALL_TOKENS.write(tmp_path)
    check_tokens(SMALL_TOKENS, tmp_path, workers=0)
    for keys, codes, ids in plain_token_batches(sorted(tmp_path.glob("*.tar")), 4):
        for key, tokens_of, text in zip(keys, codes, ids, strict=True):
            expected = SMALL_TOKENS.arrays(int(key))
            assert np.array_equal(tokens_of, expected[0])
            assert np.array_equal(text, expected[1])


def test_differing_token_stops_the_benchmark(tmp_path: Path) -> None:
    SMALL_TOKENS.write(tmp_path)
    with pytest.raises(ValueError, match="is not what was written"):
        check_tokens(TokenProblem(3, 10, 6, 21, 4, 4), tmp_path, workers=0)


def test_token_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(problem: TokenProblem, folder: Path, workers: int) -> tuple[float, float]:
        return 7e4, 9e4

    monkeypatch.setattr(tokens, "_speed", speed)
    figures = token_figures(1, SMALL_TOKENS, workers=(0,))
    assert figures["token_samples_per_second"] == 7e4
    assert figures["token_samples_per_processor_second"] == 9e4
    assert figures["token_ratio"] > 0
