"""A trained model is scored by a job of two ranks, and by one that Submitit starts on one rank."""

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
    """All of a report, by dotted name."""
    found: dict[str, float] = {}
    pending: list[tuple[str, Any]] = [("", json.loads((out / "report.json").read_text())["figures"])]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}", inner) for key, inner in cast(dict[str, Any], value).items()]
        else:
            found[name] = value
    return found


def test_scripts_and_submitit_score_alike(
    submit: Submit, launch: Launch, embedded: Path, by_torchrun: Path
) -> None:
    outs = [submit.folder / name for name in ("by-script", "by-submitit")]
    model, data = by_torchrun / "pretrain", embedded / "shards" / "held_out"
    submitted = submit("eval_coco.sh", *SMALL, f"--out={outs[0]}", RUN=str(model), DATA=str(data))
    job = submitted.cluster.finished(submitted.number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), submitted.log
    done = launch("eval", str(model), "--hours", "0.2", "--", "--data", str(data), *SMALL, f"--out={outs[1]}")
    assert done.code == 0, done.complained
    (number,) = jobs_of(done.said)
    assert submit.cluster.finished(number).state == "COMPLETED"
    script, submitit = (figures(out) for out in outs)
    assert len(script) > 5
    assert script == pytest.approx(submitit, rel=1e-6)
