import argparse
from collections.abc import Sequence

from vqd_scale.commands.entry import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.commands.run import run_task
from vqd_scale.training.autoencoding import AutoencodingTask, TokenizerTrainConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/train_tokenizer.py``."""
    parser = tool_parser(
        "Train a VQ tokenizer on image shards; started again, it goes on.",
        "python tools/train_tokenizer.py configs/demo/tokenizer.yaml optim.lr=1e-3",
    )
    add_config_arguments(parser, file_required=True)
    # DeepSpeed's launcher adds it; every launcher sets LOCAL_RANK, which is what counts.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    run_tool(parser, _train, arguments)


def _train(arguments: argparse.Namespace) -> None:
    config = config_from(TokenizerTrainConfig, arguments)
    run_task(lambda world: AutoencodingTask(config, world), config, "train tokenizer")
