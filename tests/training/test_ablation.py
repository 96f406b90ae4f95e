import json
from pathlib import Path

import pytest
import yaml

from vqd_scale.cli import eval_ablation
from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes


@pytest.mark.long
def test_ablation_trains_and_evaluates_once(
    token_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shapes(ShapesConfig(image_size=16, train_samples=1, held_out_samples=20), tmp_path / "shards")
    evaluation = {
        "name": "test",
        "data": str(tmp_path / "shards" / "held_out"),
        "prompts": {"kind": "captions", "count": 12},
        "sampling": {"guidance": {"kind": "constant", "scale": 1.0}, "batch_size": 12},
        "extractor": {"kind": "random", "features": 4},
        "kid": {"subsets": 2, "size": 5},
        "inception_splits": 1,
        "neighbors": 2,
        "report_images": 1,
    }
    config = {
        "output": str(tmp_path / "out"),
        "train": str(token_world / "train.yaml"),
        "overrides": ["total_images=16", "checkpoint.every_images=16"],
        "mask_rates": {"mask only": 1.0, "both": 0.9},
        "trained_steps": [3, 6],
        "inference_steps": [2, 5],
        "seeds": [0, 1],
        "evaluation": evaluation,
        "metrics": ["alignment.mean"],
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(config))
    eval_ablation.main([str(path)])
    sweep_file = tmp_path / "out" / "sweep.json"
    rows = json.loads(sweep_file.read_text())["rows"]
    # A chain of three steps cannot be sampled in five.
    assert [row["settings"]["steps of inference"] for row in rows[:4]] == [2, 3, 2, 5]
    assert len(rows) == 2 * 2 * 2 * 2
    assert {row["seed"] for row in rows} == {0, 1}
    models = sorted((tmp_path / "out" / "models").iterdir())
    assert [model.name for model in models][:2] == ["mask=0.9,T=3,seed=0", "mask=0.9,T=3,seed=1"]
    export_times = [(model / "export" / "model.safetensors").stat().st_mtime_ns for model in models]
    (models[0] / "evaluation" / "steps=2" / "report.json").unlink()
    eval_ablation.main([str(path)])
    assert json.loads(sweep_file.read_text())["rows"] == rows
    assert export_times == [(model / "export" / "model.safetensors").stat().st_mtime_ns for model in models]
    # Models of another training run are refused.
    with pytest.raises(SystemExit) as end:
        eval_ablation.main([str(path), "overrides=[total_images=24,checkpoint.every_images=16]"])
    assert end.value.code == 2
    assert "was begun with train.total_images 16, not 24" in capsys.readouterr().err
