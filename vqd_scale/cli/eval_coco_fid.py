import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqd_scale.cli.base import ConfigOptions, Tool, location_from
from vqd_scale.cli.model_options import ModelOptions
from vqd_scale.cli.run import check_datasets, check_model
from vqd_scale.core.atomic_io import Location, publish_text, sha256_of
from vqd_scale.core.config import to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output, safe_name
from vqd_scale.core.s3 import SCHEME
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.evaluation.config import EvaluationConfig

if TYPE_CHECKING:
    from vqd_scale.core.world import World
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
    model: ModelOptions, options: ConfigOptions, data: Data = None, output: Output = None
) -> None:
    """Evaluate a model under a protocol: FID, KID, precision and recall, CLIP score, attribute accuracy.

    The default protocol is COCO's 30,000 captions. The ranks that torchrun or srun starts divide the images.
    The same command resumes an interrupted evaluation.
    """
    config = options.load(EvaluationConfig, *data_override("data", data))
    check_model(model.model)
    folder = output_folder(model.model, output, config.name, "eval_coco_fid.py")
    check_datasets(*filter(None, [config.data]))

    from vqd_scale.core.world import join_world, leave_world

    world, stop = join_world(), StopFlag()
    try:
        evaluate_and_publish(config, model.load(), model_identity(model.model), folder, world, stop)
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


def model_identity(name: str) -> dict[str, Any]:
    """Return a model's name and, for a local model, the SHA-256 digests of model and tokenizer weights."""
    from vqd_scale.models.bundle import tokenizer_folder, weights_file
    from vqd_scale.models.exchange.diffusers import COMPONENTS, INDEX

    folder = Path(name)
    if name.startswith(SCHEME):
        return {"name": name}
    if (folder / INDEX).is_file():
        files = {
            f"{part}_sha256": file for part in COMPONENTS for file in (folder / part).glob("*.safetensors")
        }
    else:
        files = {
            "weights_sha256": weights_file(folder),
            "tokenizer_sha256": weights_file(tokenizer_folder(folder)),
        }
    return {"name": name} | {key: sha256_of(file) for key, file in files.items() if file.is_file()}


def evaluate_and_publish(
    config: EvaluationConfig,
    pipe: "Pipeline",
    model: dict[str, Any],
    output: Path,
    world: "World",
    stop: StopFlag,
) -> None:
    """Evaluate a model and write the report on rank 0.

    Raises:
        UserError: See `evaluate`.
        SystemExit: With `REQUEUE_EXIT_CODE` after a signal.
    """
    from vqd_scale.core.provenance import provenance
    from vqd_scale.evaluation.evaluate import evaluate, publish_result
    from vqd_scale.evaluation.resumable_chunks import EvaluationStopped

    try:
        result = evaluate(config, pipe, model, output, world, lambda: stop.requested)
    except EvaluationStopped:
        raise SystemExit(REQUEUE_EXIT_CODE) from None
    if result is not None:
        result.report.update(provenance())
        publish_result(result, output)
