import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from vqd_scale.cli.base import RunConfigOptions, Tool
from vqd_scale.cli.eval_coco_fid import evaluate_and_publish
from vqd_scale.cli.run import check_bundles, check_datasets
from vqd_scale.core.config import Config, load_config
from vqd_scale.core.outputs import check_output, reserve
from vqd_scale.core.signals import REQUEUE_EXIT_CODE, StopFlag
from vqd_scale.diffusion.config import Strided
from vqd_scale.evaluation.config import EvaluationConfig
from vqd_scale.training.tasks.config import TrainConfig

if TYPE_CHECKING:
    from vqd_scale.core.world import World
    from vqd_scale.evaluation.sweep import Row

_X = "steps of inference"
_NOTE = (
    "A model was trained for every kind of noise, every T and every seed; models of one seed start from the "
    "same weights and see the same data in the same order. All were sampled with the exact strided "
    "posterior. Seeds differ in weights, data order, noise and samples. Nothing is claimed where their "
    "ranges overlap."
)


class AblationConfig(Config):
    """Configuration of the paper's ablation over noise type, training steps and inference steps."""

    output: Path
    """Output folder of all models and results."""
    train: Path
    """Training configuration file; noise schedule, seed and run folder are overridden per model."""
    overrides: tuple[str, ...] = ()
    """Further ``a.b=value`` overrides of the training configuration."""
    mask_rates: dict[str, float] = Field(
        default={"mask only": 1.0, "replace only": 0.0, "both": 0.9}, min_length=1
    )
    """Fraction of masked tokens in x_T, by noise name; the other tokens are replaced."""
    trained_steps: tuple[int, ...] = Field(default=(10, 25, 50, 100, 200), min_length=1)
    """Values of T, the number of steps of the trained chain."""
    inference_steps: tuple[int, ...] = Field(default=(25, 50, 100), min_length=1)
    """Numbers of sampling steps; values above T are reduced to T."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Seeds of training and sampling."""
    evaluation: EvaluationConfig
    """Evaluation protocol of every model."""
    metrics: tuple[str, ...] = ("alignment.mean", "frechet_distance_tokenizer")
    """Metrics in the table and plots."""


main = Tool()
"""Entry point of ``tools/eval_ablation.py``."""


@main.command("python tools/eval_ablation.py configs/evaluation/paper_ablation.yaml trained_steps=[10,100]")
def ablate(options: RunConfigOptions) -> None:
    """Train and evaluate the paper's ablation: mask only, replace only, both, for several numbers of steps.

    The same command resumes an interrupted ablation.
    """
    config = options.load(AblationConfig)
    train = load_config(TrainConfig, config.train, config.overrides)
    check_datasets(*(source.path for source in train.data.mixed))
    check_bundles(train.tokenizer)
    check_output(config.output, "eval_ablation.py")

    from vqd_scale.core.provenance import provenance
    from vqd_scale.core.world import join_world, leave_world
    from vqd_scale.evaluation.sweep import publish_sweep

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    world = join_world()
    try:
        _reserve_folder(config, train, world)
        rows = list(_rows(config, world))
        if world.is_first:
            details = {"config": config.model_dump(mode="json"), **provenance()}
            publish_sweep("The paper's ablation", rows, _X, config.metrics, config.output, _NOTE, details)
            print(f"table and plots: {config.output / 'report.html'}")
    finally:
        leave_world()


def _reserve_folder(config: AblationConfig, train: TrainConfig, world: "World") -> None:
    """Write the settings shared by all models, or check that an existing folder has the same settings.

    Models may be added to an existing folder.

    Raises:
        UserError: The folder's models were trained or evaluated with other settings.
    """
    from vqd_scale.evaluation.resumable_chunks import reserve_folder
    from vqd_scale.evaluation.sweep import sweep_files

    names = ["shared.json", *sweep_files(config.metrics)]
    world.on_first_rank(lambda: reserve(config.output, "eval_ablation.py", names))
    path = config.output / "shared.json"
    shared = {
        "train": train.model_dump(mode="json", exclude={"diffusion", "seed", "run"}),
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    reserve_folder(path, shared, world, option="output")


def _rows(config: AblationConfig, world: "World") -> "Iterator[Row]":
    """Train and evaluate all models; yield the results, all models of the first seed first."""
    from vqd_scale.core.progress import progress
    from vqd_scale.evaluation.sweep import Row, figures_of
    from vqd_scale.models.generate import model_identity
    from vqd_scale.models.pipeline import TextToImage

    models = list(product(config.seeds, config.mask_rates.items(), config.trained_steps))
    for seed, (noise, mask_rate), timesteps in progress(
        models, "ablation", len(models), unit="model", quiet=not world.is_first
    ):
        folder = config.output / "models" / f"mask={mask_rate},T={timesteps},seed={seed}"
        if world.any(not (folder / "export").is_dir()):
            _train(config, folder, mask_rate, timesteps, seed, world)
        pipe = TextToImage.load(folder, device=world.device)
        identity = model_identity(str(folder), pipe)
        for steps in sorted({min(steps, timesteps) for steps in config.inference_steps}):
            protocol, output = _protocol(config, steps, seed), folder / "evaluation" / f"steps={steps}"
            report = evaluate_and_publish(protocol, pipe, identity, output, world, StopFlag())
            yield Row({"noise": noise, "T": timesteps, _X: steps}, seed, figures_of(report))


def _train(
    config: AblationConfig, folder: Path, mask_rate: float, timesteps: int, seed: int, world: "World"
) -> None:
    from vqd_scale.training.loop import train

    schedule = ("diffusion.kind=paper", f"diffusion.mask_rate={mask_rate}", f"diffusion.steps={timesteps}")
    overrides = [*config.overrides, *schedule, f"seed={seed}", f"run={folder}"]
    run = load_config(TrainConfig, config.train, overrides)
    if train(run.build(world), run, world, folder.name).stopped:
        raise SystemExit(REQUEUE_EXIT_CODE)


def _protocol(config: AblationConfig, steps: int, seed: int) -> EvaluationConfig:
    evaluation = config.evaluation
    file = evaluation.reference.file or config.output / "reference.safetensors"
    return evaluation.model_copy(
        update={
            "sampling": evaluation.sampling.model_copy(
                update={"sampler": Strided(steps=steps), "seed": seed}
            ),
            "reference": evaluation.reference.model_copy(update={"file": file}),
        }
    )
