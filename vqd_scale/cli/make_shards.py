"""``make_shards``: conversion of an image source to indexed WebDataset shards."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vqd_scale.cli.base import (
    add_override_arguments,
    config_from,
    location_from,
    run_tool,
    tool_parser,
)
from vqd_scale.core.atomic_io import Location
from vqd_scale.core.config import Config
from vqd_scale.data.shards.index_builder import build_index
from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE
from vqd_scale.data.shards.shard_index import ShardSet, read_index
from vqd_scale.data.sources.coco import CocoConfig, write_coco
from vqd_scale.data.sources.cub200 import CubConfig, write_cub200
from vqd_scale.data.sources.ffhq import FFHQConfig, write_ffhq
from vqd_scale.data.sources.imagefolder import ImageFolderConfig, write_imagefolder
from vqd_scale.data.sources.imagenet import ImageNetConfig, write_imagenet
from vqd_scale.data.sources.img2dataset import Img2datasetConfig, index_img2dataset
from vqd_scale.data.sources.oxford102 import OxfordConfig, write_oxford102
from vqd_scale.data.sources.photographs import PhotographsConfig, write_photographs
from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes

Tool = tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], None]]
ConfigType = TypeVar("ConfigType", bound=Config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/make_shards.py``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    tools = {
        "shapes": _shapes(),
        "photographs": _photographs(),
        "coco": _pictures(
            CocoConfig,
            write_coco,
            "Pack one part of MSCOCO: the folder of annotations/ and of the pictures' folders.",
            "make_shards.py coco /data/coco runs/coco/val year=2014 split=val",
        ),
        "cub200": _pictures(
            CubConfig,
            write_cub200,
            "Pack one part of CUB-200-2011 with its captions: the folder of CUB_200_2011/ and text/.",
            "make_shards.py cub200 /data/birds runs/birds/train split=train",
        ),
        "oxford102": _pictures(
            OxfordConfig,
            write_oxford102,
            "Pack one part of Oxford-102 with its captions: the folder of jpg/, setid.mat and text_c10/.",
            "make_shards.py oxford102 /data/flowers runs/flowers/train split=train",
        ),
        "imagenet": _pictures(
            ImageNetConfig,
            write_imagenet,
            "Pack ImageNet, or any folder with a folder of pictures for each class.",
            "make_shards.py imagenet /data/imagenet/train runs/imagenet classes=LOC_synset_mapping.txt",
        ),
        "ffhq": _pictures(
            FFHQConfig,
            write_ffhq,
            "Pack FFHQ, or any folder of pictures without captions.",
            "make_shards.py ffhq /data/ffhq/images1024x1024 runs/ffhq encoding.kind=png image_size=256",
        ),
        "imagefolder": _pictures(
            ImageFolderConfig,
            write_imagefolder,
            "Pack a folder of pictures, each with its caption in a .txt file of the same name.",
            "make_shards.py imagefolder my_pictures runs/mine image_size=128",
        ),
        "img2dataset": _img2dataset(),
        "index": _index(),
    }
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


def _photographs() -> Tool:
    parser = tool_parser(
        "Cut the photographs that scikit-learn and scikit-image bring along: OUT/train and OUT/held_out.",
        "make_shards.py photographs runs/photographs held_out=coffee",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the two sets")
    add_override_arguments(parser)

    def command(arguments: argparse.Namespace) -> None:
        config = config_from(PhotographsConfig, arguments)
        for shards in write_photographs(config, arguments.out).values():
            _report(shards)

    return parser, command


def _pictures(
    kind: type[ConfigType],
    write: Callable[[ConfigType, Path, Location], ShardSet],
    description: str,
    example: str,
) -> Tool:
    """Return the subcommand for a source that is a local folder of image files."""
    parser = tool_parser(description, example)
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of the source")
    parser.add_argument("out", metavar="OUT", help="folder for the set, or s3://bucket/key")
    _add_configuration(parser)

    def command(arguments: argparse.Namespace) -> None:
        config = config_from(kind, arguments)
        _report(write(config, arguments.source, location_from(arguments.out)))

    return parser, command


def _img2dataset() -> Tool:
    parser = tool_parser(
        "Index what img2dataset downloaded, as it is, or what is wanted of it.",
        "make_shards.py img2dataset s3://bucket/laion --out s3://bucket/laion-art --config "
        "configs/shards/laion-art.yaml num_workers=32",
    )
    _add_tars(parser)
    _add_configuration(parser)

    def command(arguments: argparse.Namespace) -> None:
        config = config_from(Img2datasetConfig, arguments)
        tars = location_from(arguments.tars)
        _report(
            index_img2dataset(config, tars, tars if arguments.out is None else location_from(arguments.out))
        )

    return parser, command


def _index() -> Tool:
    parser = tool_parser(
        "Index a folder of tars that webdataset or others wrote.",
        "make_shards.py index /data/cc12m",
    )
    _add_tars(parser)

    def command(arguments: argparse.Namespace) -> None:
        out = None if arguments.out is None else location_from(arguments.out)
        _report(build_index(location_from(arguments.tars), out))

    return parser, command


def _add_tars(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tars", metavar="DIR", help="folder of the tars, or s3://bucket/key")
    parser.add_argument(
        "--out", metavar="OUT", help="folder for the index, if it is not to lie beside the tars"
    )


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML file: differences from the defaults")
    add_override_arguments(parser)


def _report(shards: ShardSet) -> None:
    print(f"{shards.folder}: {shards.count:,} samples in {len(shards.shards):,} shards")
    index: Any = read_index(shards.folder)
    reports = {"bad": QUARANTINE, "near_duplicates": DUPLICATES, "filtered": None}
    for name, report in reports.items():
        if count := index["left_out"][name]:
            where = "" if report is None else f", listed in {shards.folder / report}"
            print(f"  left out: {count:,} {name.replace('_', ' ')}{where}")
