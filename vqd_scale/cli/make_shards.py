"""``make_shards``: conversion of an image source to indexed WebDataset shards; one command per source."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vqd_scale.cli.base import ConfigOptions, Tool, location_from
from vqd_scale.core.atomic_io import Location
from vqd_scale.data.sources.base import ImageSource
from vqd_scale.data.sources.registry import IMAGE_SOURCES

if TYPE_CHECKING:
    from vqd_scale.data.shards.shard_index import ShardSet

main = Tool(
    "Convert a source of images and captions to a dataset of WebDataset shards.",
    "python tools/make_shards.py shapes --help",
)
"""Entry point of ``tools/make_shards.py``."""

Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="folder of the source")]
Output = Annotated[
    Location, typer.Argument(parser=location_from, metavar="OUTPUT", help="output folder, or s3://bucket/key")
]
Splits = Annotated[Path, typer.Argument(metavar="OUTPUT", help="output folder of both datasets")]
Tars = Annotated[
    Location,
    typer.Argument(
        parser=location_from,
        metavar="TARS",
        help="folder of tars, local or s3://bucket/key; or DIR/*.tar, DIR/{000..012}.tar, a.tar::b.tar",
    ),
]
IndexFolder = Annotated[
    Location | None,
    typer.Option(
        "--output", parser=location_from, metavar="FOLDER", help="folder of the index (default: the tars')"
    ),
]


@main.command("python tools/make_shards.py shapes runs/shapes train_samples=16384 seed=1")
def shapes(output: Splits, options: ConfigOptions) -> None:
    """Render the embedded shapes dataset: OUTPUT/train and OUTPUT/held_out."""
    from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes

    _report(*write_shapes(options.load(ShapesConfig), output).values())


@main.command("python tools/make_shards.py photographs runs/photographs held_out=coffee")
def photographs(output: Splits, options: ConfigOptions) -> None:
    """Crop the photographs of scikit-learn and scikit-image: OUTPUT/train and OUTPUT/held_out."""
    from vqd_scale.data.sources.photographs import PhotographsConfig, write_photographs

    _report(*write_photographs(options.load(PhotographsConfig), output).values())


def _add_command(kind: type[ImageSource]) -> None:
    """Add the command of a source that is a folder of image files; the class's docstring is its help."""

    def pack(source: Source, output: Output, options: ConfigOptions) -> None:
        _report(options.load(kind).pack(source, output))

    pack.__doc__ = (kind.__doc__ or "").partition("\n")[0]
    main.command(f"python tools/make_shards.py {kind.name} {kind.example}", name=kind.name)(pack)


for _kind in IMAGE_SOURCES:
    _add_command(_kind)


@main.command(
    "python tools/make_shards.py img2dataset s3://bucket/laion --output s3://bucket/laion-art "
    "--config configs/shards/laion-art.yaml num_workers=32"
)
def img2dataset(tars: Tars, options: ConfigOptions, output: IndexFolder = None) -> None:
    """Index the tars of img2dataset, or the samples of them that pass filters."""
    from vqd_scale.data.sources.img2dataset import Img2datasetConfig, index_img2dataset

    _report(index_img2dataset(options.load(Img2datasetConfig), tars, output))


@main.command("python tools/make_shards.py index /data/cc12m num_workers=8")
def index(tars: Tars, options: ConfigOptions, output: IndexFolder = None) -> None:
    """Index existing WebDataset tars."""
    from vqd_scale.data.shards.index_builder import build_index
    from vqd_scale.data.sources.img2dataset import IndexConfig

    config = options.load(IndexConfig)
    _report(build_index(tars, output, max_bad_fraction=config.max_bad_fraction, workers=config.num_workers))


def _report(*datasets: "ShardSet") -> None:
    """Print the size of each dataset, and the number of skipped samples by reason."""
    from vqd_scale.data.shards.manifest import read_index
    from vqd_scale.data.shards.quarantine import DUPLICATES, QUARANTINE

    lists = {"bad": QUARANTINE, "near_duplicates": DUPLICATES, "filtered": None}
    for shards in datasets:
        print(f"{shards.folder}: {shards.count:,} samples in {len(shards.shards):,} shards")
        manifest: Any = read_index(shards.folder)
        for reason, name in lists.items():
            if count := manifest.left_out[reason]:
                listing = "" if name is None else f", listed in {shards.folder / name}"
                print(f"  left out: {count:,} {reason.replace('_', ' ')}{listing}")
