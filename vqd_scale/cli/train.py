import argparse
from collections.abc import Sequence

from vqd_scale.cli.base import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.cli.run import TOKEN_RUNS, run_task, token_task
from vqd_scale.training.tasks.denoising import TrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/train.py``."""
    parser = tool_parser(
        "Train a denoiser on token shards, or its autoregressive peer (kind: autoregression), on one "
        "process or as many as torchrun or srun start; started again, it goes on from the newest whole "
        "checkpoint.",
        "torchrun --nproc-per-node 2 tools/train.py configs/demo/train.yaml optim.lr=2e-3",
    )
    add_config_arguments(parser, file_required=True)
    # DeepSpeed's launcher passes --local_rank. It is ignored: LOCAL_RANK, which all launchers set, is used.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    run_tool(parser, _train, arguments)


def _train(arguments: argparse.Namespace) -> None:
    config = config_from(TOKEN_RUNS, arguments)
    title = "train denoiser" if isinstance(config, TrainConfig) else "train VQ-AR"
    run_task(lambda world: token_task(config, world), config, title)
