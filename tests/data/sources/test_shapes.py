import io
import json
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from open_clip import SimpleTokenizer
from PIL import Image

from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import read_shard
from vqd_scale.data.sources.shapes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    ShapesConfig,
    all_scenes,
    coverage,
    make_sample,
    render,
    scene_at,
    write_shapes,
)

SMALL = ShapesConfig(train_samples=50, held_out_samples=20, samples_per_shard=16)


def combination(scene: Scene) -> set[tuple[str, str, str]]:
    return {(figure.shape, figure.color, scene.background) for figure in scene.figures}


def test_splits_share_no_combination() -> None:
    train, held_out = all_scenes(1, "train"), all_scenes(1, "held_out")
    assert len(train) + len(held_out) == 4 * 8 * 2 * 9 * 8 == len({*train, *held_out})
    trained = set[tuple[str, str, str]]().union(*map(combination, train))
    held_out_combinations = set[tuple[str, str, str]]().union(*map(combination, held_out))
    assert not trained & held_out_combinations
    assert 0.12 < len(held_out_combinations) / (len(held_out_combinations) + len(trained)) < 0.17
    assert all(not combination(scene) & held_out_combinations for scene in all_scenes(2, "train"))
    assert all(combination(scene) & held_out_combinations for scene in all_scenes(2, "held_out"))


def test_training_has_every_pair_of_attributes() -> None:
    tables = {
        "shape": list(SHAPES),
        "color": list(COLORS),
        "size": list(SIZES),
        "position": list(POSITIONS),
        "background": list(BACKGROUNDS),
    }
    pair_counts = Counter(
        ((first, values[first]), (second, values[second]))
        for values in (scene.attributes() for scene in all_scenes(1, "train"))
        for first, second in combinations(tables, 2)
    )
    for first, second in combinations(tables, 2):
        for pair in product(tables[first], tables[second]):
            assert pair_counts[(first, pair[0]), (second, pair[1])] > 0


def test_each_round_has_every_scene_once() -> None:
    scenes = all_scenes(1, "held_out")
    for turn in range(2):
        indices = range(turn * len(scenes), (turn + 1) * len(scenes))
        round_scenes = [scene_at(SMALL, "held_out", index) for index in indices]
        assert set(round_scenes) == set(scenes)
        assert round_scenes != list(scenes)


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_describe_all_attributes_within_length(objects: int) -> None:
    config = ShapesConfig.model_validate({"objects": objects})
    tokenizer = SimpleTokenizer()
    samples = [make_sample(config, "train", index) for index in range(400)]
    captions = [sample["txt"] for sample in samples]
    for sample in samples:
        caption, scene = sample["txt"], Scene.from_json(sample["json"])
        assert caption == caption.lower()
        assert "a orange" not in caption
        assert len(tokenizer.encode(caption)) + 2 <= 24
        for figure in scene.figures:
            assert figure.color in caption
            size_words = {"small": ("small", "little"), "large": ("large", "big")}
            assert any(word in caption for word in size_words[figure.size])
            assert figure.shape in caption
        assert scene.background in caption
    assert len(set(captions)) > 380


def test_positions_and_relations_are_unambiguous() -> None:
    """A caption without its other words names one position only."""
    meaning: dict[str, set[str]] = {}
    for index in range(6_000):
        sample = make_sample(SMALL, "train", index)
        figure = Scene.from_json(sample["json"]).figures[0]
        words = sample["txt"].replace(",", "").split()
        places = {"upper": "top", "lower": "bottom", "middle": "center"}
        caption_words = [places.get(word, word) for word in words]
        place_words = " ".join(sorted({"top", "bottom", "center", "left", "right"} & set(caption_words)))
        meaning.setdefault(place_words, set()).add(figure.position)
    ambiguous = {place_words: positions for place_words, positions in meaning.items() if len(positions) > 1}
    assert not ambiguous
    assert set[str]().union(*meaning.values()) == set(POSITIONS)


def test_relation_words_match_the_image() -> None:
    config = ShapesConfig(objects=2)
    backward = ("right of", "below", "under")
    for index in range(300):
        sample = make_sample(config, "train", index)
        scene = Scene.from_json(sample["json"])
        is_reversed = any(word in sample["txt"] for word in backward)
        first = scene.figures[1] if is_reversed else scene.figures[0]
        start = min(sample["txt"].index(color) for color in COLORS if color in sample["txt"].split())
        assert sample["txt"][start:].startswith(first.color)
        across = any(word in sample["txt"] for word in ("left of", "right of"))
        assert scene.relation == ("left of" if across else "above")


def test_figures_are_visible_and_inside() -> None:
    for shape, size, position in product(SHAPES, SIZES, POSITIONS):
        cover = coverage(shape, size, position, 64)
        # The figure is not clipped at the border: its area equals that in the middle.
        assert cover.sum() == pytest.approx(coverage(shape, size, "middle center", 64).sum(), rel=1e-6)
        rows, columns = np.mgrid[0:64, 0:64] + 0.5
        x, y = (cover * columns).sum() / cover.sum() / 64, (cover * rows).sum() / cover.sum() / 64
        assert abs(x - POSITIONS[position][0]) < 0.02
        assert abs(y - POSITIONS[position][1]) < 0.03
        assert np.logical_and(cover > 0, cover < 1).any()
    for color, background in product(COLORS.values(), BACKGROUNDS.values()):
        assert np.abs(np.subtract(color, background)).max() > 60
    for first_color, second_color in [
        *combinations(COLORS.values(), 2),
        *combinations(BACKGROUNDS.values(), 2),
    ]:
        assert np.linalg.norm(np.subtract(first_color, second_color)) > 40


def test_render_equals_formula() -> None:
    scene = all_scenes(1, "train")[1_234]
    figure = scene.figures[0]
    cover = coverage(figure.shape, figure.size, figure.position, 32)
    image = render(scene, 32)
    for row, column in [(0, 0), (8, 8), (16, 16), (7, 25)]:
        for channel in range(3):
            back, front = BACKGROUNDS[scene.background][channel], COLORS[figure.color][channel]
            expected = back + float(cover[row, column]) * (front - back)
            assert abs(float(image[row, column, channel]) - expected) <= 0.5 + 1e-3


def test_written_datasets(tmp_path: Path) -> None:
    written_sets = write_shapes(SMALL, tmp_path / "one")
    assert {split: shards.count for split, shards in written_sets.items()} == {"train": 50, "held_out": 20}
    opened = ShardSet.open(tmp_path / "one" / "train")
    samples = [sample for shard in opened.shards for sample in read_shard(shard)]
    assert [shard.count for shard in opened.shards] == [16, 16, 16, 2]
    for index, sample in enumerate(samples):
        scene = Scene.from_json(json.loads(sample["json"]))
        assert scene == scene_at(SMALL, "train", index)
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        np.testing.assert_array_equal(image, render(scene, 64))
    write_shapes(SMALL, tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_seeds_differ() -> None:
    other_seed = ShapesConfig(seed=1)
    assert [scene_at(SMALL, "train", index) for index in range(20)] != [
        scene_at(other_seed, "train", index) for index in range(20)
    ]
