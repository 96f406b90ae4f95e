import argparse
from collections.abc import Sequence

import torch

from vqd_scale.commands.entry import add_config_arguments, config_from, run_tool, tool_parser
from vqd_scale.inference.tokenize import TokenizeConfig, tokenize_shards


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/tokenize_shards.py``."""
    parser = tool_parser(
        "Turn image shards into token shards; finished shards are kept when it is started again.",
        "python tools/tokenize_shards.py configs/demo/tokenize.yaml",
    )
    add_config_arguments(parser, file_required=True)
    run_tool(parser, _tokenize, arguments)


def _tokenize(arguments: argparse.Namespace) -> None:
    config = config_from(TokenizeConfig, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = tokenize_shards(config, device)
    print(f"{shards.count:,} samples of tokens in {len(shards.shards)} shards: {config.out}")
