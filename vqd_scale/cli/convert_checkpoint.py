"""``convert_checkpoint``: checkpoint import, diffusers export, consolidation; one function per subcommand."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vqd_scale.cli.base import Tool
from vqd_scale.cli.run import check_datasets, check_model
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output
from vqd_scale.core.s3 import SCHEME
from vqd_scale.training.tasks.config import TOKEN_RUNS, TokenRun

if TYPE_CHECKING:
    from vqd_scale.models.exchange.conversion import Plan
    from vqd_scale.training.tasks.token_task import TokenTask

WEIGHTS = {"ema": "ema", "raw": "master"}
"""Name of each kind of weights in a checkpoint, by the value of ``--weights``."""

main = Tool(
    "Convert published weights to a model bundle, or a bundle to a folder for diffusers.",
    "python tools/convert_checkpoint.py microsoft --help",
)
"""Entry point of ``tools/convert_checkpoint.py``."""

Bundle = Annotated[Path, typer.Argument(metavar="OUTPUT", help="bundle to write")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="print the destination of every weight and write nothing")
]


@main.command(
    "python tools/convert_checkpoint.py microsoft coco_learnable.pth runs/coco "
    "--reduction taming_vqvae_2887.pt"
)
def microsoft(
    file: Annotated[Path, typer.Argument(metavar="FILE.pth", help="checkpoint; no code in it is executed")],
    output: Bundle,
    dry_run: DryRun = False,
    reduction: Annotated[
        Path | None, typer.Option(help="map from the tokenizer's codes to the network's fewer codes")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer bundle, for a file without a tokenizer")
    ] = None,
    heads: Annotated[
        int, typer.Option(min=1, max=1024, help="attention heads; 16 in every published model")
    ] = 16,
    grid: Annotated[
        tuple[int, int] | None,
        typer.Option(min=1, max=1024, metavar="ROWS COLUMNS", help="token grid (default: that of the file)"),
    ] = None,
    null_condition: Annotated[
        Literal["learned", "empty"] | None,
        typer.Option(
            help="the file's learned embedding (models with 'learnable' in their names), or the empty "
            "caption (default: learned, if the file has one)"
        ),
    ] = None,
) -> None:
    """Import a .pth file of Microsoft's VQ-Diffusion: EMA weights, text tower, tokenizer."""
    _check_file(file)
    purpose = _checked_purpose(output, "microsoft")

    from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft

    options = MicrosoftOptions(
        heads=heads, grid=grid, null_condition=null_condition, reduction=reduction, tokenizer=tokenizer
    )
    _carry_out(plan_microsoft(file, options), output, dry_run, purpose)


@main.command("python tools/convert_checkpoint.py taming vqgan_imagenet_f16_16384.ckpt model.yaml runs/vqgan")
def taming(
    file: Annotated[Path, typer.Argument(metavar="FILE.ckpt", help="checkpoint; no code in it is executed")],
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="published configuration")],
    output: Bundle,
    dry_run: DryRun = False,
) -> None:
    """Import a .ckpt file of taming-transformers: a VQ-GAN, also within a transformer."""
    _check_file(config)
    _check_file(file)
    purpose = _checked_purpose(output, "taming")

    from vqd_scale.models.exchange.autoencoders import plan_taming

    _carry_out(plan_taming(file, config), output, dry_run, purpose)


@main.command("python tools/convert_checkpoint.py diffusers vq-diffusion-ithq runs/ithq")
def diffusers(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="folder of model_index.json, or s3://bucket/key")
    ],
    output: Bundle,
    dry_run: DryRun = False,
) -> None:
    """Import a folder of diffusers' VQDiffusionPipeline; sample.py also takes such a folder unconverted."""
    if not folder.startswith(SCHEME) and not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{folder}: there is no diffusers pipeline here, as no model_index.json is.")
    purpose = _checked_purpose(output, "diffusers")

    from vqd_scale.models.exchange.diffusers import COMPONENTS, plan_diffusers
    from vqd_scale.models.s3_download import local_folder

    with local_folder(folder, tuple(COMPONENTS)) as local_folder:
        _carry_out(plan_diffusers(local_folder), output, dry_run, purpose)


@main.command("python tools/convert_checkpoint.py export runs/coco/export vq-diffusion-coco")
def export(
    model: Annotated[Path, typer.Argument(metavar="BUNDLE", help="bundle, or run folder")],
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder to write")],
) -> None:
    """Export a bundle to a folder that diffusers' VQDiffusionPipeline loads."""
    check_model(str(model))
    purpose = _checked_purpose(output, "export")

    from vqd_scale.models.bundle import load_bundle
    from vqd_scale.models.exchange.export import export_diffusers

    export_diffusers(load_bundle(model), output, purpose)
    print(f"{output}: VQDiffusionPipeline.from_pretrained loads it")


@main.command("python tools/convert_checkpoint.py consolidate runs/demo/model runs/demo/raw --weights raw")
def consolidate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    output: Bundle,
    weights: Annotated[
        Literal["ema", "raw"], typer.Option(help="the EMA, or the weights of the optimizer")
    ] = "ema",
    images: Annotated[
        int | None, typer.Option(min=0, help="checkpoint, by images seen (default: the newest)")
    ] = None,
) -> None:
    """Convert a checkpoint of a run, also of an unfinished one, to a bundle."""
    config = load_config(TOKEN_RUNS, run / "config.yaml")
    purpose = _checked_purpose(output, "consolidate")

    from vqd_scale.training.checkpoint.manager import newest_consolidated

    checkpoint_images, parameters = newest_consolidated(run / "checkpoints", WEIGHTS[weights], images)
    _task_of(config).export(parameters, output, purpose)
    print(f"{output}: the {weights} weights at {checkpoint_images:,} images")


@main.command(
    "python tools/convert_checkpoint.py deepspeed checkpoints configs/demo/train.yaml out --trust-pickle"
)
def deepspeed(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="folder that contains 'latest', or that of one tag")
    ],
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="configuration of the run that wrote the weights")
    ],
    output: Bundle,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="read the files: pickles, whose code is executed")
    ] = False,
) -> None:
    """Convert a folder that DeepSpeed itself wrote (zero_pp_rank_*) to a bundle, for any stage and ranks."""
    if not trust_pickle:
        raise UserError(
            f"{folder}: DeepSpeed's files are pickles, and reading them executes whatever code is in them; "
            f"if you trust their author, give --trust-pickle."
        )
    purpose = _checked_purpose(output, "deepspeed")
    task = _task_of(load_config(TOKEN_RUNS, config))

    from vqd_scale.training.engine import imported_weights

    imported = imported_weights(folder)
    expected_shapes = {name: parameter.shape for name, parameter in task.module.named_parameters()}
    shapes = {name: tensor.shape for name, tensor in imported.items() if name in expected_shapes}
    if shapes != expected_shapes:
        differing = sorted(name for name in expected_shapes if shapes.get(name) != expected_shapes[name])
        raise UserError(
            f"{folder}: {len(differing)} weights of the run that {config} describes are missing or of "
            f"another shape, '{differing[0]}' for one."
        )
    task.export({name: imported[name] for name in expected_shapes}, output, purpose)
    print(f"{output}: {len(expected_shapes):,} weights from {folder}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: cannot be read (there is no such file).")


def _checked_purpose(output: Path, command: str) -> str:
    """Check the output folder before the conversion; return the purpose for its marker."""
    purpose = f"convert_checkpoint.py {command}"
    check_output(output, purpose)
    return purpose


def _task_of(config: TokenRun) -> "TokenTask":
    """Build the task of a run in this process alone."""
    check_datasets(*(source.path for source in config.data.mixed))

    import torch

    from vqd_scale.core.world import World

    return config.build(World(0, 1, torch.device("cpu")))


def _carry_out(plan: "Plan", output: Path, dry_run: bool, purpose: str) -> None:
    if dry_run:
        print("\n".join(plan.exchange.lines()))
        plan.exchange.check()
        return
    plan.save(output, purpose)
    print(f"{output}: {len(plan.exchange.target_weights):,} weights from {plan.exchange.source}")
