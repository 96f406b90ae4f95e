from pathlib import Path

import pytest

from vqd_scale.cli.cost import main
from vqd_scale.core.atomic_io import read_json

ROOT = Path(__file__).parents[2]


def test_vq_ddm_unet_cost_equals_published_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """117M parameters; its table's 1.06 G are multiply-adds of one evaluation."""
    out = tmp_path / "cost.json"
    config = str(ROOT / "configs" / "vq-ddm" / "celeba.yaml")
    main([config, "--steps", "25", "--steps", "100", "--output", str(out)])
    cost_report = read_json(out, "cost")
    assert cost_report["parameters"] == pytest.approx(117e6, rel=0.01)
    assert cost_report["multiply_adds_per_evaluation"] == pytest.approx(1.06e9, rel=0.05)
    assert cost_report["flops_per_evaluation"] == 2 * cost_report["multiply_adds_per_evaluation"]
    assert [row["flops"] for row in cost_report["images"]] == [
        steps * cost_report["flops_per_evaluation"] for steps in (25, 100)
    ]
    assert "117" in capsys.readouterr().out


def test_hours_follow_from_measured_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    config = str(ROOT / "configs" / "vq-ddm" / "shapes.yaml")
    sizes = ["--codebook-size", "16", "--grid", "4", "4", "--steps", "2", "--steps", "4"]
    main([config, *sizes, "--batch-size", "2", "--output", str(out)])
    cost_report = read_json(out, "cost")
    first, second = (row["hours_per_50k"] for row in cost_report["images"])
    assert second == pytest.approx(2 * first)
    assert first == pytest.approx(2 * cost_report["seconds_per_evaluation"] * 50_000 / 3600)
