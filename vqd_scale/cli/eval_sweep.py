import argparse
from collections.abc import Sequence

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.cli.eval_coco_fid import (
    add_evaluation_arguments,
    evaluate_and_publish,
    model_identity,
    out_folder,
    settings_from,
)
from vqd_scale.cli.model_arguments import load_any_model
from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.config import load_config, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.provenance import provenance
from vqd_scale.core.signals import StopFlag
from vqd_scale.core.world import join_world, leave_world
from vqd_scale.evaluation.sweep import SEED, Row, SweepConfig, figures_of, points, publish_sweep

_NOTE = "Every row is an evaluation with a report of its own in the folder 'points'."


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/eval_sweep.py``."""
    parser = tool_parser(
        "Score one model drawn in many ways: samplers, steps, guidance, truncation, seeds. What is done is "
        "not done again.",
        "python tools/eval_sweep.py runs/demo/model --data runs/demo/shards/held_out "
        "--config configs/evaluation/embedded-sweep.yaml",
    )
    add_evaluation_arguments(parser)
    run_tool(parser, _sweep, arguments)


def _sweep(arguments: argparse.Namespace) -> None:
    config = load_config(SweepConfig, arguments.config, arguments.overrides)
    evaluation = config.evaluation.model_copy(update=settings_from(arguments))
    config = config.model_copy(update={"evaluation": evaluation})
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    if config.x_axis not in config.axes:
        raise UserError(f"x_axis: '{config.x_axis}' is none of the axes, {', '.join(config.axes)}.")
    out = out_folder(arguments, f"{evaluation.name}-sweep")
    every = points(config, out)
    world, stop = join_world(), StopFlag()
    try:
        pipe, model = load_any_model(arguments), model_identity(arguments.model)
        rows: list[Row] = []
        for name, settings, protocol in every:
            path = out / "points" / name / "report.json"
            if world.any(not path.exists()):
                evaluate_and_publish(protocol, pipe, model, path.parent, world, stop)
            if world.is_first:
                report = read_json(path, "report of an evaluation")
                if report["model"] != model or report["protocol"] != protocol.model_dump(mode="json"):
                    raise UserError(f"{path}: is of another model or protocol; give another --out.")
                seed = settings.pop(SEED)
                rows.append(Row(settings, seed, figures_of(report)))
        if world.is_first:
            more = {"model": model, "protocol": evaluation.model_dump(mode="json"), **provenance()}
            publish_sweep(
                f"{evaluation.name}: {model['name']}", rows, config.x_axis, config.metrics, out, _NOTE, more
            )
            print(f"table and plots: {out / 'report.html'}; figures: {out / 'sweep.json'}")
    finally:
        leave_world()
