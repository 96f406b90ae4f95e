import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqd_scale.cli.base import ConfigOptions, Tool, location_from
from vqd_scale.cli.model_options import ModelOptions, SamplingOptions
from vqd_scale.cli.run import check_datasets, check_model
from vqd_scale.core.atomic_io import Location, publish_text, read_json
from vqd_scale.core.config import to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output, safe_name
from vqd_scale.core.s3 import SCHEME
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from vqd_scale.core.world import World
    from vqd_scale.evaluation.evaluate import Report
    from vqd_scale.models.generate import Pipeline

main = Tool()
"""Entry point of ``tools/eval_coco_fid.py``."""

Data = Annotated[
    Location | None,
    typer.Option(
        parser=location_from, metavar="SHARDS", help="shards of captions and real images, or s3://bucket/key"
    ),
]
Output = Annotated[
    Path | None, typer.Option(help="output folder, shared by all ranks (default: MODEL/evaluation/NAME)")
]


@main.command(
    "python tools/eval_coco_fid.py runs/demo/model --data runs/demo/shards/held_out "
    "--config configs/evaluation/embedded.yaml"
)
def evaluate_model(
    model: ModelOptions,
    options: ConfigOptions,
    sampling: SamplingOptions,
    data: Data = None,
    output: Output = None,
) -> None:
    """Evaluate a model under a protocol: FID, KID, precision and recall, CLIP score, attribute accuracy.

    The default protocol is COCO's 30,000 captions. The ranks that torchrun or srun starts divide the images.
    The same command resumes an interrupted evaluation.
    """
    config = options.load(EvaluationConfig, *data_override("data", data), *sampling.overrides("sampling."))
    check_model(model.model)
    folder = output_folder(model.model, output, config.name, "eval_coco_fid.py")
    check_datasets(*filter(None, [config.data]))

    from vqd_scale.core.world import join_world, leave_world
    from vqd_scale.models.generate import model_identity

    world, stop = join_world(), StopFlag()
    try:
        pipe = model.load()
        identity = model_identity(model.model, pipe)
        evaluate_and_publish(config, pipe, identity, folder, world, stop, repeat=True)
        if world.is_first:
            publish_text(folder / "config.yaml", to_yaml(config))
    finally:
        leave_world()
    if world.is_first:
        print(f"metrics: {folder / 'report.json'}; page: {folder / 'report.html'}")


def data_override(key: str, data: Location | None) -> list[str]:
    """Return the override that ``--data`` stands for, if it is given."""
    return [] if data is None else [f"{key}={json.dumps(str(data))}"]


def output_folder(model: str, output: Path | None, name: str, purpose: str) -> Path:
    """Return the output folder of the results, checked by `check_output`.

    Raises:
        UserError: The model is in S3 and ``--output`` is not given; or see `check_output`.
    """
    if output is None and model.startswith(SCHEME):
        raise UserError("the model is in S3: name a local folder for the results with --output.")
    folder = Path(model) / "evaluation" / safe_name(name) if output is None else output
    check_output(folder, purpose)
    return folder


def evaluate_and_publish(
    config: EvaluationConfig,
    pipe: "Pipeline",
    model: dict[str, Any],
    output: Path,
    world: "World",
    stop: StopFlag,
    *,
    repeat: bool = False,
) -> "Report":
    """Return the report of an evaluation; evaluate the model and write the report unless it exists.

    Args:
        config: Evaluation protocol.
        pipe: Model pipeline.
        model: Identity of the model.
        output: Output folder.
        world: Ranks that share the work.
        stop: Flag of the stop signals.
        repeat: Compute the metrics again even if the report exists.

    Raises:
        UserError: The report depends on other inputs, or see `evaluate`.
        SystemExit: With `REQUEUE_EXIT_CODE` after a signal.
    """
    from vqd_scale.core.provenance import provenance
    from vqd_scale.evaluation.evaluate import REPORT, evaluate, publish_result
    from vqd_scale.evaluation.resumable_chunks import EvaluationStopped

    path = output / "report.json"
    finished = None
    if not repeat and not world.any(not path.exists()):
        finished = read_json(path, "report of an evaluation", REPORT)
    try:
        result = evaluate(config, pipe, model, output, world, lambda: stop.requested, finished)
    except EvaluationStopped:
        raise SystemExit(REQUEUE_EXIT_CODE) from None
    if result is not None:
        result.report.update(provenance())
        publish_result(result, output)
    world.barrier()
    return read_json(path, "report of an evaluation", REPORT)
