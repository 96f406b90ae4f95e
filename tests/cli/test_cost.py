from pathlib import Path

import pytest

from vqd_scale.cli.cost import main
from vqd_scale.core.atomic_io import read_json

ROOT = Path(__file__).parents[2]


def test_vq_ddms_network_is_counted_as_its_table_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """117M parameters; its table's 1.06 G are multiply-adds of one evaluation."""
    out = tmp_path / "cost.json"
    config = str(ROOT / "configs" / "vq-ddm" / "celeba.yaml")
    main([config, "--steps", "25", "100", "--json", str(out)])
    found = read_json(out, "cost")
    assert found["parameters"] == pytest.approx(117e6, rel=0.01)
    assert found["multiply_adds_per_evaluation"] == pytest.approx(1.06e9, rel=0.05)
    assert found["flops_per_evaluation"] == 2 * found["multiply_adds_per_evaluation"]
    assert [row["flops"] for row in found["pictures"]] == [
        steps * found["flops_per_evaluation"] for steps in (25, 100)
    ]
    assert "117" in capsys.readouterr().out


def test_hours_follow_from_a_measured_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    config = str(ROOT / "configs" / "vq-ddm" / "shapes.yaml")
    main(
        [
            config,
            "--codes",
            "16",
            "--grid",
            "4",
            "4",
            "--steps",
            "2",
            "4",
            "--measure",
            "2",
            "--json",
            str(out),
        ]
    )
    found = read_json(out, "cost")
    first, second = (row["hours_per_50k"] for row in found["pictures"])
    assert second == pytest.approx(2 * first)
    assert first == pytest.approx(2 * found["seconds_per_evaluation"] * 50_000 / 3600)
