from pathlib import Path
from typing import Annotated

import typer

from vqd_scale.cli.base import Tool
from vqd_scale.cli.model_options import ModelOptions, SamplingOptions
from vqd_scale.cli.run import check_model
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import check_output
from vqd_scale.data.shards.shard_index import ShardSet

_GRID_IMAGES = 40
_GRID_COLUMNS = 8
_MAX_INDEX = (1 << 32) - 1

main = Tool()
"""Entry point of ``tools/sample.py``."""


@main.command('python tools/sample.py runs/demo/model "a large red star on white" --steps 25')
def sample(
    model: ModelOptions,
    options: SamplingOptions,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="captions; class indices for a class-conditional model"),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="use the captions of these shards as prompts")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="number of captions used from --data")] = 256,
    index: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=_MAX_INDEX,
            help="generate only the image of this number among those of all prompts, or for a single prompt",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="output folder")] = Path("samples"),
) -> None:
    """Generate an image for each prompt, or for the captions of a dataset.

    The same command resumes an interrupted one.
    """
    sampling = options.config()
    if bool(prompts) == (data is not None):
        raise UserError("give either prompts, or shards with --data to take captions from.")
    shards = None if data is None else ShardSet.open(data)
    check_model(model.model)
    check_output(output, "sample.py")

    from vqd_scale.models.generate import (
        GRID,
        Prompt,
        generate,
        model_identity,
        prompts_of,
        read_generated,
    )
    from vqd_scale.reports.plots import image_grid, publish_image

    if shards is None:
        listed = [Prompt(f"{number:06d}", caption, number) for number, caption in enumerate(prompts or [])]
    else:
        listed = prompts_of(shards, num_samples)
    if index is not None:
        if len(listed) > 1 and index >= len(listed):
            raise UserError(f"--index: given {index}, allowed: 0 to {len(listed) - 1}, the images' numbers.")
        chosen = listed[index] if len(listed) > 1 else listed[0]
        key = chosen.key if data is not None else f"{index:06d}"
        listed = [Prompt(key, chosen.caption, index)]
    pipe = model.load()
    generate(pipe, model_identity(model.model, pipe), listed, sampling, output)
    generated, images = read_generated(output)
    captions = [prompt.caption for prompt in generated[:_GRID_IMAGES]]
    scale = max(1, 128 // images.shape[1])
    columns = min(_GRID_COLUMNS, len(images))
    publish_image(output / GRID, image_grid(images[:_GRID_IMAGES], captions, columns=columns, scale=scale))
    print(f"{len(generated)} images in {output}; the first of them in {output / GRID}")
