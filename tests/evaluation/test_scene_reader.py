from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.data.sources.shapes import Scene, all_scenes, render
from vqd_scale.evaluation.scene_reader import correct_attributes, read_scenes, shuffled_scenes


def some_scenes(objects: int, count: int) -> list[Scene]:
    scenes = [*all_scenes(objects, "train"), *all_scenes(objects, "held_out")]
    return [scenes[place] for place in permutation(5, Purpose.EVALUATION, 1, len(scenes))[:count].tolist()]


def rendered(scenes: Sequence[Scene], pixels: int) -> Tensor:
    return torch.from_numpy(np.stack([render(scene, pixels) for scene in scenes])).permute(0, 3, 1, 2)


def noisy(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * strength
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(("pixels", "every"), [(32, 1), (64, 4)])
def test_every_scene_is_recovered(pixels: int, every: int) -> None:
    scenes = [*all_scenes(1, "train"), *all_scenes(1, "held_out")][::every]
    assert correct_attributes(rendered(scenes, pixels), scenes).all(axis=1).mean() >= 0.995


@pytest.mark.parametrize("pixels", [32, 64])
def test_two_figures_are_recovered(pixels: int) -> None:
    scenes = some_scenes(2, 1_000)
    assert correct_attributes(rendered(scenes, pixels), scenes).all(axis=1).mean() >= 0.995


@pytest.mark.parametrize("objects", [1, 2])
def test_noise_and_blur_do_not_change_the_reading(objects: int) -> None:
    scenes = some_scenes(objects, 500)
    images = rendered(scenes, 64)
    blurred = avg_pool2d(images.float(), 3, stride=1, padding=1, count_include_pad=False)
    assert correct_attributes(noisy(images, 12), scenes).mean() >= 0.99
    assert correct_attributes(noisy(blurred, 4), scenes).mean() >= 0.99


def test_reader_is_the_nearest_scene_in_pixel_space() -> None:
    """Compare with the distances to all rendered scenes, on images far from every scene."""
    scenes = [*all_scenes(1, "train"), *all_scenes(1, "held_out")]
    candidates = rendered(scenes, 16).flatten(1).double()
    images = noisy(rendered(some_scenes(1, 60), 16), 90)
    distances = torch.cdist(images.flatten(1).double(), candidates)
    read_back_scenes = read_scenes(images, objects=1)
    for index, scene in enumerate(read_back_scenes):
        # Rendered scenes are rounded to integer levels, so two nearly equal distances may swap.
        assert distances[index, scenes.index(scene)] <= distances[index].min() * (1 + 1e-3)
    assert (
        sum(scene == scenes[int(d.argmin())] for scene, d in zip(read_back_scenes, distances, strict=True))
        >= 58
    )


def test_two_figures_are_the_nearest_scene_in_pixel_space() -> None:
    true_scenes = some_scenes(2, 400)
    candidates = rendered(true_scenes, 16).flatten(1).double()
    images = noisy(rendered(true_scenes[:40], 16), 70)
    for index, scene in enumerate(read_scenes(images, objects=2)):
        read_distance = torch.linalg.vector_norm(
            images[index].flatten().double() - rendered([scene], 16).flatten().double()
        )
        distances = torch.linalg.vector_norm(candidates - images[index].flatten().double(), dim=1)
        assert read_distance <= distances.min() * (1 + 1e-3)


def test_scores_count_attributes() -> None:
    scenes = some_scenes(1, 8)
    images = rendered(scenes, 64)
    wrong_scene = next(
        scene
        for scene in all_scenes(1, "train")
        if scene.figures == scenes[0].figures and scene.background != scenes[0].background
    )
    is_correct = correct_attributes(images, [wrong_scene, *scenes[1:]])
    assert is_correct.mean() == pytest.approx(39 / 40)
    assert is_correct.all(axis=1).mean() == pytest.approx(7 / 8)
    per_attribute = dict(zip(wrong_scene.attributes(), is_correct.mean(axis=0), strict=True))
    assert per_attribute["background"] == pytest.approx(7 / 8)
    assert per_attribute["shape"] == 1


def test_chance_level_is_low_and_fixed() -> None:
    scenes = some_scenes(1, 512)
    images = rendered(scenes, 32)
    chance = correct_attributes(images, shuffled_scenes(scenes))
    # One in 4, 8, 2, 9 and 8 on average.
    assert chance.mean() == pytest.approx((1 / 4 + 1 / 8 + 1 / 2 + 1 / 9 + 1 / 8) / 5, abs=0.03)
    assert np.array_equal(chance, correct_attributes(images, shuffled_scenes(scenes)))
    assert correct_attributes(images[:2], shuffled_scenes(scenes[:2])).all(axis=1).mean() == 0


def test_noise_matches_no_scene() -> None:
    scenes = some_scenes(1, 256)
    images = torch.randint(0, 256, (256, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    assert correct_attributes(images, scenes).mean() < 0.4


def test_invalid_use_raises_user_error() -> None:
    scenes = some_scenes(1, 2)
    with pytest.raises(ValueError, match="cannot be compared"):
        correct_attributes(rendered(scenes, 32)[:1], scenes)
    with pytest.raises(ValueError, match="not square"):
        correct_attributes(rendered(scenes, 32)[:, :, 1:], scenes)
    with pytest.raises(ValueError, match="two images"):
        shuffled_scenes(scenes[:1])
