import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqd_scale.cli.base import add_override_arguments, location_from, run_tool, tool_parser
from vqd_scale.cli.model_arguments import add_model_arguments, load_any_model
from vqd_scale.core.atomic_io import publish_text, sha256_of
from vqd_scale.core.config import load_config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.provenance import provenance
from vqd_scale.core.s3 import SCHEME
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.evaluation.evaluate import evaluate
from vqd_scale.evaluation.html_report import publish_result
from vqd_scale.evaluation.protocol import EvaluationConfig
from vqd_scale.evaluation.resumable_chunks import EvaluationStopped
from vqd_scale.models.bundle import tokenizer_folder, weights_file
from vqd_scale.models.exchange.diffusers import COMPONENTS, INDEX
from vqd_scale.models.generate import Pipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/eval_coco_fid.py``."""
    parser = tool_parser(
        "Score a model by a protocol: FID, KID, precision and recall, CLIP score, with all they depend on. "
        "Under torchrun or srun all ranks draw; killed at any moment, the same command goes on.",
        "python tools/eval_coco_fid.py runs/demo/model --data runs/demo/shards/held_out "
        "--config configs/evaluation/embedded.yaml",
    )
    add_evaluation_arguments(parser)
    run_tool(parser, _evaluate, arguments)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the model, data, evaluation protocol, output folder and overrides."""
    add_model_arguments(parser)
    parser.add_argument("--data", help="shards of captions and real pictures; a folder or s3://bucket/key")
    parser.add_argument("--config", type=Path, help="a protocol's YAML; COCO's 30,000 captions if not given")
    parser.add_argument("--out", type=Path, help="folder that all ranks see (MODEL/evaluation/NAME)")
    add_override_arguments(parser)


def settings_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration values set by ``--data``.

    Raises:
        UserError: ``--data`` is neither a path nor an S3 address.
    """
    if arguments.data is not None:
        return {"data": location_from(arguments.data)}
    return {}


def out_folder(arguments: argparse.Namespace, name: str) -> Path:
    """Return the output folder of the results.

    Raises:
        UserError: The model is in S3 and ``--out`` is not given.
    """
    if arguments.out is not None:
        return arguments.out
    if str(arguments.model).startswith(SCHEME):
        raise UserError("the model lies in S3: say with --out where the results go.")
    return Path(arguments.model) / "evaluation" / name


def model_identity(name: str) -> dict[str, Any]:
    """Return a model's name and, for a local model, the SHA-256 digests of model and tokenizer weights."""
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
    return {"name": name} | {what: sha256_of(file) for what, file in files.items() if file.is_file()}


def evaluate_and_publish(
    config: EvaluationConfig, pipe: Pipeline, model: dict[str, Any], out: Path, world: World, stop: StopFlag
) -> None:
    """Evaluate a model and write the report on rank 0.

    Raises:
        UserError: See `evaluate`.
        SystemExit: With `REQUEUE_EXIT_CODE` after a signal.
    """
    try:
        result = evaluate(config, pipe, model, out, world, lambda: stop.requested)
    except EvaluationStopped:
        raise SystemExit(REQUEUE_EXIT_CODE) from None
    if result is not None:
        result.report.update(provenance())
        publish_result(result, out)


def _evaluate(arguments: argparse.Namespace) -> None:
    config = load_config(EvaluationConfig, arguments.config, arguments.overrides)
    config = config.model_copy(update=settings_from(arguments))
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    out = out_folder(arguments, config.name)
    world, stop = join_world(), StopFlag()
    try:
        pipe = load_any_model(arguments)
        evaluate_and_publish(config, pipe, model_identity(arguments.model), out, world, stop)
        if world.is_first:
            publish_text(out / "config.yaml", to_yaml(config))
    finally:
        leave_world()
    if world.is_first:
        print(f"figures: {out / 'report.json'}; page: {out / 'report.html'}")
