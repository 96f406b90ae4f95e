import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.test_evaluate import change_model
from vqd_scale.cli import eval_sweep
from vqd_scale.core.config import to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes
from vqd_scale.evaluation.config import SweepConfig
from vqd_scale.evaluation.sweep import Row, grouped, points, publish_sweep, separated

SMALL: dict[str, Any] = {
    "name": "test",
    "prompts": {"kind": "captions", "count": 9},
    "sampling": {"sampler": {"kind": "strided", "steps": 2}, "batch_size": 9},
    "extractor": {"kind": "random", "features": 4},
    "kid": {"subsets": 2, "size": 5},
    "inception_splits": 1,
    "neighbors": 2,
    "report_images": 1,
}
AXES: dict[str, Any] = {"sampling.sampler.steps": (1, 2), "sampling.seed": (0, 1)}


def config_of(**changes: Any) -> SweepConfig:
    values = {"evaluation": SMALL, "axes": AXES, "metrics": ["alignment.mean"]} | changes
    return SweepConfig.model_validate(values)


def rows_of(values: dict[int, list[float]]) -> list[Row]:
    return [
        Row({"steps": steps, "scale": 1.0}, seed, {"fid": value})
        for steps, seed_values in values.items()
        for seed, value in enumerate(seed_values)
    ]


def test_all_combinations_are_evaluated_seed_by_seed(tmp_path: Path) -> None:
    every = points(config_of(), tmp_path)
    assert [(settings["sampling.seed"], settings["sampling.sampler.steps"]) for _, settings, _ in every] == [
        (0, 1),
        (0, 2),
        (1, 1),
        (1, 2),
    ]
    assert [protocol.sampling.seed for _, _, protocol in every] == [0, 0, 1, 1]
    assert {protocol.reference.file for _, _, protocol in every} == {tmp_path / "reference.safetensors"}


def test_samplers_are_an_axis(tmp_path: Path) -> None:
    samplers = ({"kind": "ancestral"}, {"kind": "strided", "steps": 4}, {"kind": "legacy_fast", "speed": 2})
    axes = {"sampling.sampler": samplers, "sampling.guidance.scale": (1.0, 2.0)}
    every = points(config_of(axes=axes, x_axis="sampling.guidance.scale"), tmp_path)
    assert [name for name, _, _ in every][::2] == [
        "seed=0,sampler=ancestral,guidance.scale=1.0",
        "seed=0,sampler=strided 4,guidance.scale=1.0",
        "seed=0,sampler=legacy_fast 2,guidance.scale=1.0",
    ]
    assert [protocol.sampling.sampler.kind for _, _, protocol in every][::2] == [
        "ancestral",
        "strided",
        "legacy_fast",
    ]
    rows = [Row({key: settings[key] for key in axes}, 0, {"fid": 1.0}) for _, settings, _ in every]
    assert len(grouped(rows)) == 6
    with pytest.raises(UserError, match=r"the values of 'sampling.sampler' are not numbers"):
        points(config_of(axes=axes, x_axis="sampling.sampler"), tmp_path)


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [
        ({"sampling.sampler.step": (1,)}, "sampling.sampler.step: unknown key"),
        ({"sampling.sampler.steps": (0,)}, "sampling.sampler.steps: "),
        ({"sampler.steps": (1,)}, "sampler: unknown key"),
    ],
)
def test_invalid_axis_raises_user_error(tmp_path: Path, axes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        points(config_of(axes=axes), tmp_path)


def test_seeds_are_grouped_and_only_disjoint_ranges_are_separated() -> None:
    low, high, between, single = grouped(
        rows_of({1: [1.0, 2.0, 3.0], 2: [4.0, 5.0, 6.0], 3: [2.5, 4.5, 5.0], 4: [9.0]})
    )
    assert (low.seeds, low.means["fid"], low.ranges["fid"]) == (3, 2.0, (1.0, 3.0))
    assert separated(low, high, "fid")
    assert separated(high, low, "fid")
    assert not separated(low, between, "fid")
    # One seed gives no spread.
    assert not separated(low, single, "fid")


def test_page_reports_only_separated_differences(tmp_path: Path) -> None:
    rows = rows_of({1: [1.0, 2.0], 2: [4.0, 5.0], 3: [1.5, 4.5]})
    publish_sweep("A sweep", rows, "steps", ["fid"], tmp_path, "a note", {"more": 1})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    claims = page.partition("Separated in every seed")[2].partition("</table>")[0]
    assert claims.count("<tr>") == 2
    assert "<td>1</td><td>2</td>" in claims
    sweep_report = json.loads((tmp_path / "sweep.json").read_text())
    assert len(sweep_report["rows"]) == 6
    assert sweep_report["more"] == 1
    with pytest.raises(UserError, match="'kid' is none of these evaluations' metrics: fid"):
        publish_sweep("A sweep", rows, "steps", ["kid"], tmp_path, "", {})


def test_restarted_sweep_repeats_no_evaluation(model: Path, shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(to_yaml(config_of()))
    arguments = [str(model), "--data", str(shards), "--config", str(path), "--output", str(tmp_path / "out")]
    eval_sweep.main(arguments)
    reports = sorted((tmp_path / "out" / "points").glob("*/report.json"))
    assert len(reports) == 4
    first = (tmp_path / "out" / "sweep.json").read_bytes()
    first_times = [report.stat().st_mtime_ns for report in reports]
    reports[2].unlink()
    eval_sweep.main(arguments)
    second_times = [report.stat().st_mtime_ns for report in reports]
    assert [old == new for old, new in zip(first_times, second_times, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    rows = [
        json.loads(content)["rows"] for content in (first, (tmp_path / "out" / "sweep.json").read_bytes())
    ]
    assert rows[0] == rows[1]
    with pytest.raises(SystemExit) as end:
        eval_sweep.main([*arguments, "evaluation.prompts.seed=1"])
    assert end.value.code == 2


@pytest.mark.parametrize("change", ["model", "captions", "shape"])
def test_sweep_reuses_no_evaluation_of_other_inputs(
    model: Path, shards: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, bundle, data = tmp_path / "sweep.yaml", tmp_path / "bundle", tmp_path / "data"
    path.write_text(to_yaml(config_of()))
    shutil.copytree(model, bundle)
    shutil.copytree(shards, data)
    arguments = [str(bundle), "--data", str(data), "--config", str(path), "--output", str(tmp_path / "out")]
    eval_sweep.main(arguments)
    if change == "model":
        change_model(bundle, "weights")
    elif change == "captions":
        shutil.rmtree(data)
        write_shapes(
            ShapesConfig(image_size=16, train_samples=1, held_out_samples=60, seed=1), tmp_path / "new"
        )
        (tmp_path / "new" / "held_out").rename(data)
    else:
        for report in (tmp_path / "out" / "points").glob("*/report.json"):
            report.write_text('{"figures": [], "model": 5}')
    with pytest.raises(SystemExit) as end:
        eval_sweep.main(arguments)
    assert end.value.code == 2
    words = {"model": "model.weights_sha256", "captions": "prompts", "shape": "cannot be read (figures"}
    assert words[change] in capsys.readouterr().err
