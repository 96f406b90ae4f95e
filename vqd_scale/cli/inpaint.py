from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import Tool
from vqd_scale.cli.model_options import ModelOptions, SamplingOptions
from vqd_scale.cli.run import check_model
from vqd_scale.core.outputs import check_output, reserve

main = Tool()
"""Entry point of ``tools/inpaint.py``."""


@main.command('python tools/inpaint.py runs/coco street.png mask.png "a red bus in the rain" --num-samples 4')
def inpaint(
    model: ModelOptions,
    options: SamplingOptions,
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="image; center-cropped and resized to the model's size")
    ],
    mask: Annotated[
        Path,
        typer.Argument(
            metavar="MASK",
            help="mask of the same size: what is white is generated, or what is opaque in a mask "
            "with transparent pixels; the rest is kept",
        ),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="caption of the full image")],
    num_samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="number of images to generate")] = 1,
    output: Annotated[Path, typer.Option(help="output folder")] = Path("inpainted"),
) -> None:
    """Generate the masked part of an image and keep the rest."""
    sampling = options.config()
    check_model(model.model)
    names = [f"{number:06d}.png" for number in range(num_samples)]
    check_output(output, "inpaint.py", names)

    from vqd_scale.models.images import read_image

    original, mask_image = read_image(image, "IMAGE"), read_image(mask, "MASK")

    from vqd_scale.reports.plots import publish_image

    images = model.load_denoiser().inpaint(
        original,
        mask_image,
        [prompt] * num_samples,
        sampler=sampling.sampler,
        guidance=sampling.guidance,
        truncation=sampling.truncation,
        negative=sampling.negative,
        seed=sampling.seed,
        batch=sampling.batch_size,
    )
    reserve(output, "inpaint.py", names)
    for name, inpainted in zip(names, images, strict=True):
        publish_image(output / name, inpainted)
    print(f"{num_samples} images in {output}")
