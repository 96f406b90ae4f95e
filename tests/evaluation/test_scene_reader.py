from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.sources.shapes import Scene, all_scenes, render
from vqd_scale.evaluation.scene_reader import attribute_accuracy, chance_accuracy, read_scenes


def some_scenes(objects: int, count: int) -> list[Scene]:
    scenes = [*all_scenes(objects, "train"), *all_scenes(objects, "held_out")]
    return [scenes[place] for place in permutation(5, Purpose.EVALUATION, 1, len(scenes))[:count].tolist()]


def drawn(scenes: Sequence[Scene], pixels: int) -> Tensor:
    return torch.from_numpy(np.stack([render(scene, pixels) for scene in scenes])).permute(0, 3, 1, 2)


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * strength
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(("pixels", "every"), [(32, 1), (64, 4)])
def test_every_scene_is_read_back(pixels: int, every: int) -> None:
    scenes = [*all_scenes(1, "train"), *all_scenes(1, "held_out")][::every]
    assert attribute_accuracy(drawn(scenes, pixels), scenes).all >= 0.995


@pytest.mark.parametrize("pixels", [32, 64])
def test_two_figures_are_read_back(pixels: int) -> None:
    scenes = some_scenes(2, 1_000)
    assert attribute_accuracy(drawn(scenes, pixels), scenes).all >= 0.995


@pytest.mark.parametrize("objects", [1, 2])
def test_noise_and_blur_do_not_matter(objects: int) -> None:
    scenes = some_scenes(objects, 500)
    images = drawn(scenes, 64)
    blurred = avg_pool2d(images.float(), 3, stride=1, padding=1, count_include_pad=False)
    assert attribute_accuracy(noisy(images, 12), scenes).mean >= 0.99
    assert attribute_accuracy(noisy(blurred, 4), scenes).mean >= 0.99


def test_reader_is_the_nearest_scene_in_pixel_space() -> None:
    """The slow twin: every scene drawn, every distance computed; the pictures are far from any of them."""
    scenes = [*all_scenes(1, "train"), *all_scenes(1, "held_out")]
    candidates = drawn(scenes, 16).flatten(1).double()
    images = noisy(drawn(some_scenes(1, 60), 16), 90)
    distances = torch.cdist(images.flatten(1).double(), candidates)
    found = read_scenes(images, objects=1)
    for picture, scene in enumerate(found):
        # Drawn scenes are rounded to whole levels, so two nearly equal distances may change places.
        assert distances[picture, scenes.index(scene)] <= distances[picture].min() * (1 + 1e-3)
    assert sum(scene == scenes[int(d.argmin())] for scene, d in zip(found, distances, strict=True)) >= 58


def test_two_figures_are_the_nearest_scene_in_pixel_space() -> None:
    wanted = some_scenes(2, 400)
    candidates = drawn(wanted, 16).flatten(1).double()
    images = noisy(drawn(wanted[:40], 16), 70)
    for picture, scene in enumerate(read_scenes(images, objects=2)):
        own = torch.linalg.vector_norm(
            images[picture].flatten().double() - drawn([scene], 16).flatten().double()
        )
        distances = torch.linalg.vector_norm(candidates - images[picture].flatten().double(), dim=1)
        assert own <= distances.min() * (1 + 1e-3)


def test_scores_count_attributes() -> None:
    scenes = some_scenes(1, 8)
    images = drawn(scenes, 64)
    other = next(
        scene
        for scene in all_scenes(1, "train")
        if scene.figures == scenes[0].figures and scene.background != scenes[0].background
    )
    score = attribute_accuracy(images, [other, *scenes[1:]])
    assert score.mean == pytest.approx(39 / 40)
    assert score.all == pytest.approx(7 / 8)
    assert score.per_attribute["background"] == pytest.approx(7 / 8)
    assert score.per_attribute["shape"] == 1


def test_chance_is_low_and_fixed() -> None:
    scenes = some_scenes(1, 512)
    images = drawn(scenes, 32)
    chance = chance_accuracy(images, scenes)
    # One in 4, 8, 2, 9 and 8 on average.
    assert chance.mean == pytest.approx((1 / 4 + 1 / 8 + 1 / 2 + 1 / 9 + 1 / 8) / 5, abs=0.03)
    assert chance == chance_accuracy(images, scenes)
    assert chance_accuracy(images[:2], scenes[:2]).all == 0


def test_noise_is_no_scene_of_anyone() -> None:
    scenes = some_scenes(1, 256)
    images = torch.randint(0, 256, (256, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    assert attribute_accuracy(images, scenes).mean < 0.4


def test_wrong_uses() -> None:
    scenes = some_scenes(1, 2)
    with pytest.raises(ValueError, match="cannot be compared"):
        attribute_accuracy(drawn(scenes, 32)[:1], scenes)
    with pytest.raises(ValueError, match="not square"):
        attribute_accuracy(drawn(scenes, 32)[:, :, 1:], scenes)
    with pytest.raises(ValueError, match="two pictures"):
        chance_accuracy(drawn(scenes[:1], 32), scenes[:1])
