from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vqd_scale.commands.benchmarks.loader import (
    PictureProblem,
    alternative,
    compared_pictures,
    ours,
    picture_figures,
)

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
