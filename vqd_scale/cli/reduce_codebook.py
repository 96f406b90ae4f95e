"""``reduce_codebook``: code counts, removal of unused codes from a tokenizer, remapping of token shards."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from vqd_scale.cli.base import location_from, run_tool, tool_parser
from vqd_scale.core.atomic_io import publish_json, read_json
from vqd_scale.preparation.reduce_tokens import count_codes, reduce_by_map, reduce_tokenizer, remap_shards
from vqd_scale.tokenizers.codebook.reduction import read_map
from vqd_scale.tokenizers.codebook.usage import usage_of

Tool = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/reduce_codebook.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tools = {"count": _count(), "reduce": _reduce(), "remap": _remap()}
    overview = tool_parser(
        "Leave out codes that a data set does not use: count them, reduce the tokenizer, remap the shards.",
        "python tools/reduce_codebook.py count --help",
    )
    overview.add_argument("step", choices=list(tools), help="each has a --help of its own")
    step = overview.parse_args(given[:1]).step
    parser, command = tools[step]
    parser.prog = f"{overview.prog} {step}"
    run_tool(parser, command, given[1:])


def _count() -> Tool:
    parser = tool_parser(
        "Count how often each code occurs in token shards.",
        "python tools/reduce_codebook.py count runs/coco/tokens runs/coco/counts.json",
    )
    parser.add_argument("tokens", metavar="TOKENS", help="a folder of token shards, or s3://bucket/key")
    parser.add_argument("out", type=Path, metavar="COUNTS.json", help="the file to be written")

    def command(arguments: argparse.Namespace) -> None:
        counts = count_codes(location_from(arguments.tokens))
        usage = usage_of(counts)
        publish_json(arguments.out, {**asdict(usage), "counts": counts.tolist()})
        print(
            f"{arguments.out}: {usage.used:.1%} of {usage.codes:,} codes occur, {usage.used_often:.1%} ten "
            f"times and more; perplexity {usage.perplexity:.0f}"
        )

    return parser, command


def _reduce() -> Tool:
    parser = tool_parser(
        "Write the bundle of a tokenizer that has only the codes which occur.",
        "python tools/reduce_codebook.py reduce runs/tokenizers/f8-8192 runs/tokenizers/f8-coco --counts "
        "runs/coco/counts.json",
    )
    parser.add_argument("tokenizer", type=Path, metavar="BUNDLE", help="the tokenizer with all its codes")
    parser.add_argument("out", type=Path, metavar="OUT", help="the bundle to be written")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--counts", type=Path, help="what 'count' wrote")
    source.add_argument("--map", type=Path, help="a map of others: one tensor, .safetensors or .pt")
    parser.add_argument("--least", type=int, default=1, help="codes that occur less often are unused (1)")
    parser.add_argument(
        "--unused",
        choices=["bucket", "nearest"],
        default="bucket",
        help="what becomes of unused codes: id 0 for all of them, as with the published models, or the id of "
        "the nearest used one",
    )

    def command(arguments: argparse.Namespace) -> None:
        if arguments.map is not None:
            reduced = reduce_by_map(arguments.tokenizer, arguments.out, read_map(arguments.map))
        else:
            counts = torch.tensor(read_json(arguments.counts, "file of counts")["counts"])
            reduced = reduce_tokenizer(
                arguments.tokenizer, arguments.out, counts, arguments.least, arguments.unused
            )
        print(f"{arguments.out}: {reduced.codes:,} of {reduced.full.codes:,} codes")

    return parser, command


def _remap() -> Tool:
    parser = tool_parser(
        "Write token shards in a reduced tokenizer's codes; no picture is encoded again.",
        "python tools/reduce_codebook.py remap runs/coco/tokens runs/coco/tokens-reduced --tokenizer "
        "runs/tokenizers/f8-8192 --reduced runs/tokenizers/f8-coco",
    )
    parser.add_argument("tokens", metavar="TOKENS", help="a folder of token shards, or s3://bucket/key")
    parser.add_argument("out", metavar="OUT", help="the folder to be written, or s3://bucket/key")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="bundle of the tokenizer that made the shards"
    )
    parser.add_argument("--reduced", type=Path, required=True, help="what 'reduce' wrote")

    def command(arguments: argparse.Namespace) -> None:
        shards = remap_shards(
            location_from(arguments.tokens),
            location_from(arguments.out),
            arguments.tokenizer,
            arguments.reduced,
        )
        print(f"{arguments.out}: {shards.count:,} samples of tokens in {len(shards.shards)} shards")

    return parser, command
