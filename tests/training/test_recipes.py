"""Every configuration in `configs/` loads in its tool and has its recipe's values."""

from pathlib import Path

import pytest
import yaml

from vqd_scale.core.config import load_config
from vqd_scale.training.config import Plateau
from vqd_scale.training.optim import LearningRate
from vqd_scale.training.tasks.config import AutoregressionConfig, TrainConfig

ROOT = Path(__file__).parents[2] / "configs"
RECIPES = [
    path
    for path in sorted(ROOT.rglob("*.yaml"))
    if path.parent.name != "tokenizer"
    if "tokenizer" in yaml.safe_load(path.read_text()) and "total_images" in yaml.safe_load(path.read_text())
    if isinstance(yaml.safe_load(path.read_text())["total_images"], int)
]
PUBLISHED = sorted((ROOT / "published").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_loads_as_a_run(path: Path) -> None:
    config = load_config((TrainConfig, AutoregressionConfig), path)
    assert config.total_images > config.optim.warmup_images
    rate = LearningRate(config.optim, config.data.global_batch_size, config.total_images)
    assert 0 < rate.at(config.total_images // 2) < 5e-3


def test_recipes_exist() -> None:
    assert len(RECIPES) >= 9
    assert len(PUBLISHED) == 4


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_recipes_equal_reference_settings(path: Path) -> None:
    optim = load_config(TrainConfig, path).optim
    assert (optim.betas, optim.weight_decay, optim.weight_decay_on, optim.gradient_clipping) == (
        (0.9, 0.96),
        0.045,
        "everything",
        0.5,
    )
    assert optim.warmup_start_lr == 3e-6
    assert isinstance(optim.schedule, Plateau)
    assert (optim.schedule.factor, optim.schedule.threshold, optim.schedule.minimum) == (0.5, 0.1, 1e-6)


def test_batch_sizes_follow_the_lr_rule() -> None:
    config = load_config(TrainConfig, ROOT / "f" / "pretrain.yaml", ["data.global_batch_size=128"])
    assert LearningRate(config.optim, 128, config.total_images).peak == pytest.approx(2 * 4.5e-4)
