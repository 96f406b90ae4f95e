"""``evaluate_tokenizer``: comparison of tokenizers by their reconstructions of unseen images."""

from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import Tool, location_from
from vqd_scale.cli.run import check_bundles, check_datasets
from vqd_scale.core.atomic_io import Location
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output
from vqd_scale.evaluation.config import Inception
from vqd_scale.tokenizers.config import LPIPSConfig

main = Tool()
"""Entry point of ``tools/evaluate_tokenizer.py``."""


@main.command(
    "python tools/evaluate_tokenizer.py runs/demo/tokenizer/export --data runs/demo/shards/held_out "
    "--image-size 64 --output runs/demo/tokenizer-report"
)
def evaluate_tokenizers(
    tokenizers: Annotated[list[Path], typer.Argument(metavar="BUNDLE", help="tokenizer bundles")],
    data: Annotated[
        Location,
        typer.Option(parser=location_from, metavar="SHARDS", help="image shards, or s3://bucket/key"),
    ],
    output: Annotated[Path, typer.Option(help="folder for report.json, report.html and image grids")],
    image_size: Annotated[
        int, typer.Option(min=1, max=1 << 14, help="side of the square images in pixels")
    ] = 256,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="number of images, the first of the dataset (default: all)")
    ] = None,
    vgg_weights: Annotated[
        Path | None, typer.Option(help="for LPIPS: torchvision's weights of VGG-16")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="for LPIPS: its linear weights (default: those of the package lpips)")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="for rFID: torch-fidelity's weights of Inception")
    ] = None,
) -> None:
    """Evaluate tokenizers on unseen images: PSNR, SSIM, codebook usage; with weights, LPIPS and rFID.

    On the embedded shapes dataset, also the attributes that its exact reader recognizes in the
    reconstructions: the upper bound for any model on these tokens.
    """
    if lpips_weights is not None and vgg_weights is None:
        raise UserError("--lpips-weights: needs --vgg-weights as well, the network whose features it weighs.")
    check_datasets(data)
    check_bundles(*tokenizers)
    check_output(output, "evaluate_tokenizer.py")

    import torch

    from vqd_scale.evaluation.tokenizer_eval import REPORT, report_tokenizers, summary_line

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = report_tokenizers(
        {str(folder): folder for folder in tokenizers},
        data,
        image_size,
        output,
        device,
        lpips=None if vgg_weights is None else LPIPSConfig(vgg=vgg_weights, linear=lpips_weights),
        inception=None if inception_weights is None else Inception(weights=inception_weights),
        max_images=num_samples,
    )
    for name, figures in metrics.items():
        print(f"{name}: {summary_line(figures)}")
    print(f"report: {output / REPORT}")
