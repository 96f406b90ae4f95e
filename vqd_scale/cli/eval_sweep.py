from vqd_scale.cli.base import ConfigOptions, Tool
from vqd_scale.cli.eval_coco_fid import (
    Data,
    Output,
    data_override,
    evaluate_and_publish,
    output_folder,
)
from vqd_scale.cli.model_options import ModelOptions, SamplingOptions
from vqd_scale.cli.run import check_datasets, check_model
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import reserve
from vqd_scale.core.signals import StopFlag
from vqd_scale.evaluation.config import SEED, SweepConfig

_NOTE = "Every row is an evaluation with a report of its own in the folder 'points'."

main = Tool()
"""Entry point of ``tools/eval_sweep.py``."""


@main.command(
    "python tools/eval_sweep.py runs/demo/model --data runs/demo/shards/held_out "
    "--config configs/evaluation/embedded-sweep.yaml"
)
def sweep(
    model: ModelOptions,
    options: ConfigOptions,
    sampling: SamplingOptions,
    data: Data = None,
    output: Output = None,
) -> None:
    """Evaluate one model under many sampling settings: samplers, steps, guidance, truncation, seeds.

    Finished evaluations are not repeated.
    """
    overrides = [*data_override("evaluation.data", data), *sampling.overrides("evaluation.sampling.")]
    config = options.load(SweepConfig, *overrides)
    if config.x_axis not in config.axes:
        raise UserError(f"x_axis: '{config.x_axis}' is none of the axes, {', '.join(config.axes)}.")
    check_model(model.model)
    evaluation = config.evaluation
    folder = output_folder(model.model, output, f"{evaluation.name}-sweep", "eval_sweep.py")
    check_datasets(*filter(None, [evaluation.data]))

    from vqd_scale.core.progress import progress
    from vqd_scale.core.provenance import provenance
    from vqd_scale.core.world import join_world, leave_world
    from vqd_scale.evaluation.sweep import Row, figures_of, points, publish_sweep, sweep_files
    from vqd_scale.models.generate import model_identity

    combinations = points(config, folder)
    world, stop = join_world(), StopFlag()
    try:
        world.on_first_rank(lambda: reserve(folder, "eval_sweep.py", sweep_files(config.metrics)))
        pipe = model.load()
        identity = model_identity(model.model, pipe)
        rows: list[Row] = []
        evaluations = progress(
            combinations, "sweep", len(combinations), unit="evaluation", quiet=not world.is_first
        )
        for name, settings, protocol in evaluations:
            report = evaluate_and_publish(protocol, pipe, identity, folder / "points" / name, world, stop)
            seed = settings.pop(SEED)
            rows.append(Row(settings, seed, figures_of(report)))
        if world.is_first:
            details = {"model": identity, "protocol": evaluation.model_dump(mode="json"), **provenance()}
            title = f"{evaluation.name}: {identity['name']}"
            publish_sweep(title, rows, config.x_axis, config.metrics, folder, _NOTE, details)
            print(f"table and plots: {folder / 'report.html'}; metrics: {folder / 'sweep.json'}")
    finally:
        leave_world()
