"""``convert_checkpoint``: checkpoint import, diffusers export, consolidation; one function per subcommand."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.cli.run import TOKEN_RUNS, token_task
from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.models.bundle import load_bundle
from vqd_scale.models.exchange.autoencoders import plan_taming
from vqd_scale.models.exchange.conversion import Plan
from vqd_scale.models.exchange.diffusers import COMPONENTS, plan_diffusers
from vqd_scale.models.exchange.export import export_diffusers
from vqd_scale.models.exchange.microsoft import MicrosoftOptions, plan_microsoft
from vqd_scale.models.s3_download import local_folder
from vqd_scale.training.checkpoint.manager import consolidated, newest_whole
from vqd_scale.training.engine import imported_weights

Tool = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]


WEIGHTS = {"average": "ema", "raw": "master"}
"""Name of each kind of weights in a checkpoint, by the value of ``--weights``."""
ALONE = World(0, 1, torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/convert_checkpoint.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tools = {
        "microsoft": _microsoft(),
        "taming": _taming(),
        "diffusers": _diffusers(),
        "export": _export(),
        "consolidate": _consolidate(),
        "deepspeed": _deepspeed(),
    }
    overview = tool_parser(
        "Turn the weights of others into a bundle, or a bundle into a folder for diffusers.",
        "python tools/convert_checkpoint.py microsoft --help",
    )
    overview.add_argument("kind", choices=list(tools), help="each has a --help of its own")
    kind = overview.parse_args(given[:1]).kind
    parser, command = tools[kind]
    parser.prog = f"{overview.prog} {kind}"
    run_tool(parser, command, given[1:])


def _microsoft() -> Tool:
    parser = tool_parser(
        "A .pth file of Microsoft's VQ-Diffusion: its averaged weights, its text tower, its tokenizer.",
        "python tools/convert_checkpoint.py microsoft coco_learnable.pth runs/coco "
        "--reduction taming_vqvae_2887.pt",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE.pth", help="the checkpoint; nothing in it is executed"
    )
    _add_out(parser)
    parser.add_argument("--reduction", type=Path, help="map of the tokenizer's codes to the network's fewer")
    parser.add_argument("--tokenizer", type=Path, help="bundle of a tokenizer, if the file holds none")
    parser.add_argument("--heads", type=int, default=16, help="attention heads; 16 in every published model")
    parser.add_argument(
        "--grid", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="tokens; else as the file says"
    )
    parser.add_argument(
        "--no-caption",
        choices=["learned", "empty"],
        help="what stands for no caption: the file's learned embedding (the models called learnable), or the "
        "empty caption; learned if the file has one",
    )

    def command(arguments: argparse.Namespace) -> None:
        options = MicrosoftOptions(
            heads=arguments.heads,
            grid=None if arguments.grid is None else (arguments.grid[0], arguments.grid[1]),
            no_caption=arguments.no_caption,
            reduction=arguments.reduction,
            tokenizer=arguments.tokenizer,
        )
        _carry_out(plan_microsoft(arguments.file, options), arguments)

    return parser, command


def _taming() -> Tool:
    parser = tool_parser(
        "A .ckpt file of taming-transformers and its YAML file: a VQ-GAN, also within a transformer.",
        "python tools/convert_checkpoint.py taming vqgan_imagenet_f16_16384.ckpt model.yaml runs/vqgan",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE.ckpt", help="the checkpoint; nothing in it is executed"
    )
    parser.add_argument("description", type=Path, metavar="CONFIG.yaml", help="what lies beside it")
    _add_out(parser)

    def command(arguments: argparse.Namespace) -> None:
        _carry_out(plan_taming(arguments.file, arguments.description), arguments)

    return parser, command


def _diffusers() -> Tool:
    parser = tool_parser(
        "A folder of diffusers' VQDiffusionPipeline; sample.py takes such a folder as it is, too.",
        "python tools/convert_checkpoint.py diffusers vq-diffusion-ithq runs/ithq",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder of model_index.json, or s3://bucket/key")
    _add_out(parser)

    def command(arguments: argparse.Namespace) -> None:
        with local_folder(arguments.folder, tuple(COMPONENTS)) as folder:
            _carry_out(plan_diffusers(folder), arguments)

    return parser, command


def _export() -> Tool:
    parser = tool_parser(
        "A bundle, or a run's, as a folder that diffusers' VQDiffusionPipeline loads and runs.",
        "python tools/convert_checkpoint.py export runs/coco/export vq-diffusion-coco",
    )
    parser.add_argument("model", type=Path, metavar="BUNDLE", help="the bundle, or the run's folder")
    parser.add_argument("out", type=Path, metavar="FOLDER", help="the folder to be written")

    def command(arguments: argparse.Namespace) -> None:
        export_diffusers(load_bundle(arguments.model), arguments.out)
        print(f"{arguments.out}: VQDiffusionPipeline.from_pretrained loads it")

    return parser, command


def _consolidate() -> Tool:
    parser = tool_parser(
        "A checkpoint of a run as a bundle, such as of a run that has not ended.",
        "python tools/convert_checkpoint.py consolidate runs/demo/model runs/demo/raw --weights raw",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle to be written")
    parser.add_argument(
        "--weights",
        choices=list(WEIGHTS),
        default="average",
        help="the moving average, which is what is sampled from, or the weights as the optimizer left them",
    )
    parser.add_argument(
        "--images", type=int, help="which checkpoint, by images seen; the newest unless given"
    )

    def command(arguments: argparse.Namespace) -> None:
        checkpoint = newest_whole(arguments.run / "checkpoints", arguments.images)
        task = token_task(load_config(TOKEN_RUNS, arguments.run / "config.yaml"), ALONE)
        task.export(consolidated(checkpoint, WEIGHTS[arguments.weights]), arguments.out)
        print(f"{arguments.out}: the {arguments.weights} weights at {int(checkpoint.name):,} images")

    return parser, command


def _deepspeed() -> Tool:
    parser = tool_parser(
        "A folder that DeepSpeed itself wrote (zero_pp_rank_*), of any stage and number of ranks, as a "
        "bundle.",
        "python tools/convert_checkpoint.py deepspeed their/checkpoints configs/demo/train.yaml out "
        "--trust-pickle",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the one with 'latest', or one tag's")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run that the weights are of")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle to be written")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="such files are pickles: reading them executes whatever code was put into them",
    )

    def command(arguments: argparse.Namespace) -> None:
        if not arguments.trust_pickle:
            raise UserError(
                f"{arguments.folder}: DeepSpeed's files are pickles, and reading them executes whatever code "
                "is in them; if you trust their author, give --trust-pickle."
            )
        task = token_task(load_config(TOKEN_RUNS, arguments.config), ALONE)
        weights = imported_weights(arguments.folder)
        wanted = {name: parameter.shape for name, parameter in task.module.named_parameters()}
        found = {name: tensor.shape for name, tensor in weights.items() if name in wanted}
        if found != wanted:
            differing = sorted(name for name in wanted if found.get(name) != wanted[name])
            raise UserError(
                f"{arguments.folder}: {len(differing)} weights of the run that {arguments.config} describes "
                f"are missing or of another shape, '{differing[0]}' for one."
            )
        task.export({name: weights[name] for name in wanted}, arguments.out)
        print(f"{arguments.out}: {len(wanted):,} weights from {arguments.folder}")

    return parser, command


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle to be written")
    parser.add_argument("--dry-run", action="store_true", help="print where every weight goes, write nothing")


def _carry_out(plan: Plan, arguments: argparse.Namespace) -> None:
    if arguments.dry_run:
        print("\n".join(plan.exchange.lines()))
        plan.exchange.check()
        return
    plan.save(arguments.out)
    print(f"{arguments.out}: {len(plan.exchange.target_weights):,} weights from {plan.exchange.source}")
