"""``make_shards``: a source becomes a set of WebDataset shards with an index."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vqd_scale.commands.entry import add_override_arguments, config_from, run_tool, tool_parser
from vqd_scale.data.index import ShardSet, build_index
from vqd_scale.data.sources.imagefolder import QUARANTINE, ImageFolderConfig, write_imagefolder
from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes

Tool = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; ``arguments`` default to the command line's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tools = {"shapes": _shapes(), "imagefolder": _imagefolder(), "index": _index()}
    overview = tool_parser(
        "Turn a source of pictures and captions into a set of WebDataset shards.",
        "make_shards.py shapes --help",
    )
    overview.add_argument("source", choices=list(tools), help="each has a --help of its own")
    source = overview.parse_args(given[:1]).source
    parser, command = tools[source]
    parser.prog = f"{overview.prog} {source}"
    run_tool(parser, command, given[1:])


def _shapes() -> Tool:
    parser = tool_parser(
        "Draw the embedded data set: OUT/train and OUT/held_out.",
        "make_shards.py shapes runs/shapes train_samples=16384 seed=1",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the two sets")
    add_override_arguments(parser)

    def command(arguments: argparse.Namespace) -> None:
        for shards in write_shapes(config_from(ShapesConfig, arguments), arguments.out).values():
            _report(shards)

    return parser, command


def _imagefolder() -> Tool:
    parser = tool_parser(
        "Pack a folder of pictures, each with its caption in a .txt file of the same name.",
        "make_shards.py imagefolder my_pictures runs/mine image_size=128",
    )
    parser.add_argument(
        "pictures", type=Path, metavar="DIR", help="folder of the pictures, searched to any depth"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the set")
    add_override_arguments(parser)

    def command(arguments: argparse.Namespace) -> None:
        config = config_from(ImageFolderConfig, arguments)
        _report(write_imagefolder(config, arguments.pictures, arguments.out))
        if (arguments.out / QUARANTINE).exists():
            print(f"some pictures were left out: {arguments.out / QUARANTINE}")

    return parser, command


def _index() -> Tool:
    parser = tool_parser(
        "Index a folder of tars that webdataset, img2dataset or others wrote.",
        "make_shards.py index /data/coco",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the tars")
    return parser, lambda arguments: _report(build_index(arguments.folder))


def _report(shards: ShardSet) -> None:
    print(f"{shards.folder}: {shards.count:,} samples in {len(shards.shards):,} shards")
