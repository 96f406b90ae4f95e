import argparse
import logging
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from pydantic import Field

from vqd_scale.cli.base import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.cli.eval_coco_fid import evaluate_and_publish, model_identity
from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.config import Config, load_config
from vqd_scale.core.provenance import provenance
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.core.world import World, join_world, leave_world
from vqd_scale.diffusion.samplers import Strided
from vqd_scale.evaluation.protocol import EvaluationConfig
from vqd_scale.evaluation.resumable_chunks import reserve_folder
from vqd_scale.evaluation.sweep import Row, figures_of, publish_sweep
from vqd_scale.models.pipeline import TextToImage
from vqd_scale.training.loop import train
from vqd_scale.training.tasks.denoising import DenoisingTask, TrainConfig

_X = "steps of inference"
_NOTE = (
    "A model was trained for every kind of noise, every T and every seed; models of one seed begin with the "
    "same weights and see the same data in the same order. Each was drawn by the exact strided posterior. "
    "Seeds differ in weights, order of the data, noise and pictures. Nothing is claimed where they overlap."
)


class AblationConfig(Config):
    """Configuration of the paper's ablation over noise type, training steps and inference steps.

    Attributes:
        output: Output folder of all models and results.
        train: Training configuration file; noise schedule, seed and run folder are overridden per model.
        overrides: Further ``a.b=value`` overrides of the training configuration.
        mask_rates: Fraction of masked tokens in x_T, by noise name; the other tokens are replaced.
        trained_steps: Values of T, the number of steps of the trained chain.
        inference_steps: Numbers of sampling steps; values above T are reduced to T.
        seeds: Seeds of training and sampling.
        evaluation: Evaluation protocol of every model.
        metrics: Metrics in the table and plots.
    """

    output: Path
    train: Path
    overrides: tuple[str, ...] = ()
    mask_rates: dict[str, float] = Field(
        default={"mask only": 1.0, "replace only": 0.0, "both": 0.9}, min_length=1
    )
    trained_steps: tuple[int, ...] = Field(default=(10, 25, 50, 100, 200), min_length=1)
    inference_steps: tuple[int, ...] = Field(default=(25, 50, 100), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    evaluation: EvaluationConfig
    metrics: tuple[str, ...] = ("alignment.mean", "frechet_distance")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/eval_ablation.py``."""
    parser = tool_parser(
        "Train and score the paper's ablation: mask only, replace only, both, in any number of steps. Killed "
        "at any moment, the same command goes on.",
        "python tools/eval_ablation.py configs/evaluation/paper_ablation.yaml trained_steps=[10,100]",
    )
    add_config_arguments(parser, file_required=True)
    run_tool(parser, _ablate, arguments)


def _ablate(arguments: argparse.Namespace) -> None:
    config = config_from(AblationConfig, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    world = join_world()
    try:
        _begin(config, world)
        rows = list(_rows(config, world))
        if world.is_first:
            more = {"config": config.model_dump(mode="json"), **provenance()}
            publish_sweep("The paper's ablation", rows, _X, config.metrics, config.output, _NOTE, more)
            print(f"table and plots: {config.output / 'report.html'}")
    finally:
        leave_world()


def _begin(config: AblationConfig, world: World) -> None:
    """Write the settings shared by all models, or check that an existing folder has the same settings.

    Models may be added to an existing folder.

    Raises:
        UserError: The folder's models were trained or scored with other settings.
    """
    path = config.output / "shared.json"
    train = load_config(TrainConfig, config.train, config.overrides)
    shared = {
        "train": train.model_dump(mode="json", exclude={"diffusion", "seed", "run"}),
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    reserve_folder(path, shared, world, option="output")


def _rows(config: AblationConfig, world: World) -> Iterator[Row]:
    """Train and evaluate all models; yield the results, all models of the first seed first."""
    for seed, (noise, mask_rate), trained in product(
        config.seeds, config.mask_rates.items(), config.trained_steps
    ):
        folder = config.output / "models" / f"mask={mask_rate},T={trained},seed={seed}"
        if world.any(not (folder / "export").is_dir()):
            _train(config, folder, mask_rate, trained, seed, world)
        for steps in sorted({min(steps, trained) for steps in config.inference_steps}):
            report = _score(config, folder, steps, seed, world)
            yield Row({"noise": noise, "T": trained, _X: steps}, seed, figures_of(report))


def _train(
    config: AblationConfig, folder: Path, mask_rate: float, trained: int, seed: int, world: World
) -> None:
    schedule = ("diffusion.kind=paper", f"diffusion.mask_rate={mask_rate}", f"diffusion.steps={trained}")
    overrides = [*config.overrides, *schedule, f"seed={seed}", f"run={folder}"]
    run = load_config(TrainConfig, config.train, overrides)
    if train(DenoisingTask(run, world), run, world, folder.name).stopped:
        raise SystemExit(REQUEUE_EXIT_CODE)


def _score(
    config: AblationConfig, folder: Path, steps: int, seed: int, world: World
) -> dict[str, dict[str, float]]:
    out = folder / "evaluation" / f"steps={steps}"
    if world.any(not (out / "report.json").exists()):
        drawing = config.evaluation.sampling.model_copy(
            update={"sampler": Strided(steps=steps), "seed": seed}
        )
        reference = config.evaluation.reference.model_copy(
            update={"file": config.evaluation.reference.file or config.output / "reference.safetensors"}
        )
        protocol = config.evaluation.model_copy(update={"sampling": drawing, "reference": reference})
        pipe = TextToImage.load(folder, device=world.device)
        evaluate_and_publish(protocol, pipe, model_identity(str(folder)), out, world, StopFlag())
    world.barrier()
    return read_json(out / "report.json", "report of an evaluation")
