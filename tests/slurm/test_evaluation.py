"""Evaluation of a trained model by a job of two ranks, and by Submitit on one rank."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests.slurm.conftest import Launch, Submit
from tests.slurm.test_launch import jobs_of

pytestmark = pytest.mark.slurm
SMALL = (
    *("--config", "configs/evaluation/embedded.yaml"),
    *(
        "prompts.count=32",
        "sampling.sampler.steps=2",
        "sampling.batch_size=8",
        "kid.size=16",
        "kid.subsets=4",
    ),
)


def figures(out: Path) -> dict[str, float]:
    """Return all values of a report by dotted name."""
    values: dict[str, float] = {}
    pending: list[tuple[str, Any]] = [("", json.loads((out / "report.json").read_text())["figures"])]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in cast(dict[str, Any], value).items()]
        else:
            values[name] = value
    return values


def test_scripts_and_submitit_give_equal_figures(
    submit: Submit, launch: Launch, shapes_folder: Path, torchrun_runs: Path
) -> None:
    outs = [submit.folder / name for name in ("by-script", "by-submitit")]
    model, data = torchrun_runs / "pretrain", shapes_folder / "shards" / "held_out"
    submitted = submit("eval_coco.sh", *SMALL, f"--output={outs[0]}", RUN=str(model), DATA=str(data))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), submitted.log
    answer = launch(
        "eval", str(model), "--hours", "0.2", "--", "--data", str(data), *SMALL, f"--output={outs[1]}"
    )
    assert answer.code == 0, answer.errors
    (number,) = jobs_of(answer.output)
    assert submit.cluster.finished(number).state == "COMPLETED"
    script, submitit = (figures(out) for out in outs)
    assert len(script) > 5
    assert script == pytest.approx(submitit, rel=1e-6)
