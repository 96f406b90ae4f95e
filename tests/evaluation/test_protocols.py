"""The published protocols are configurations that load, and every one is in the documentation."""

from pathlib import Path

import pytest

from vqd_scale.cli.eval_ablation import AblationConfig
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.config import PUBLISHED_INCEPTION, EvaluationConfig, Inception, SweepConfig
from vqd_scale.evaluation.sweep import points
from vqd_scale.training.tasks.config import TrainConfig

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "evaluation").glob("*.yaml"))
OTHER_KINDS = {
    "embedded-sweep": SweepConfig,
    "paper_ablation": AblationConfig,
    "paper_ablation-train": TrainConfig,
}
PROTOCOLS = [path for path in FILES if path.stem not in OTHER_KINDS]


def test_extractor_file_can_be_given_alone() -> None:
    config = load_config(EvaluationConfig, overrides=["extractor.weights=inception.pth"])
    assert config.extractor == Inception(weights=Path("inception.pth"))


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_protocol_is_named_after_its_file(path: Path) -> None:
    config = load_config(EvaluationConfig, path)
    assert config.name == path.stem
    if config.name != "embedded":
        assert config.prompts.count in (30_000, 50_000)
        assert config.extractor == Inception(sha256=PUBLISHED_INCEPTION, layer="2048")
    assert f"`{path.stem}`" in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_other_configurations_load(tmp_path: Path) -> None:
    for stem, kind in OTHER_KINDS.items():
        config = load_config(kind, ROOT / "configs" / "evaluation" / f"{stem}.yaml")
        if isinstance(config, SweepConfig):
            every = points(config, tmp_path)
            assert len(every) == len({name for name, _, _ in every}) == 4 * 3 * 3


def test_images_without_captions_are_compared_with_all_images() -> None:
    steps = ROOT / "configs" / "vq-ddm" / "steps.yaml"
    assert load_config(SweepConfig, steps.with_name("shapes-steps.yaml")).evaluation.name == "shapes-steps"
    assert load_config(SweepConfig, steps).evaluation.reference.images == "all"
    with pytest.raises(UserError, match=r"prompts have no images; set reference\.images to all"):
        load_config(SweepConfig, steps, ["evaluation.reference.images=prompted"])


def test_protocol_files_have_published_values() -> None:
    def of(stem: str) -> EvaluationConfig:
        return load_config(EvaluationConfig, ROOT / "configs" / "evaluation" / f"{stem}.yaml")

    assert of("coco30k").sampling == EvaluationConfig().sampling.model_copy(
        update={"sampler": of("coco30k").sampling.sampler}
    )
    assert of("cub200-authors").reference.repeat_to == 30_000
    assert of("cub200").reference.repeat_to is None
    rates = {
        "coco30k-vqdiffusion": 0.86,
        "cub200": 0.86,
        "imagenet50k-vqdiffusion": 0.869,
        "imagenet50k": 0.94,
    }
    for stem, rate in rates.items():
        truncation = of(stem).sampling.truncation
        assert truncation is not None
        assert truncation.model_dump() == {"kind": "top_p", "p": rate}
