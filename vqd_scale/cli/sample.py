import argparse
from collections.abc import Sequence
from pathlib import Path

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.cli.model_arguments import add_model_arguments, load_any_model
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.models.generate import Prompt, Settings, generate, prompts_of, read_generated
from vqd_scale.reports.plots import image_grid, publish_image

_GRID = 40
_GRID_COLUMNS = 8


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/sample.py``."""
    parser = tool_parser(
        "Draw a picture for each prompt, or for the captions of a set of shards.",
        'python tools/sample.py runs/demo/model "a large red star on white" --steps 25 --guidance 2',
    )
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="*", help="captions; labels of a class-conditional model")
    parser.add_argument("--data", type=Path, help="take captions from these shards instead")
    parser.add_argument("--count", type=int, default=256, help="how many of them")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=25, help="network evaluations for a picture")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of guidance, 1 is none")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="probability kept by truncation, 1 keeps all"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at once")
    run_tool(parser, _sample, arguments)


def _sample(arguments: argparse.Namespace) -> None:
    if bool(arguments.prompts) == (arguments.data is not None):
        raise UserError("give either prompts, or shards with --data to take captions from.")
    if arguments.batch < 1 or not 0 < arguments.top_p <= 1:
        raise UserError("--batch must be at least 1 and --top-p lie between 0 and 1.")
    if arguments.data is None:
        prompts = [Prompt(f"{number:06d}", caption) for number, caption in enumerate(arguments.prompts)]
    else:
        prompts = prompts_of(ShardSet.open(arguments.data), arguments.count)
    settings = Settings(arguments.steps, arguments.guidance, arguments.top_p, arguments.seed, arguments.batch)
    generate(load_any_model(arguments), arguments.model, prompts, settings, arguments.out)
    drawn, images = read_generated(arguments.out)
    shown = images[:_GRID]
    captions = [prompt.caption for prompt in drawn[:_GRID]]
    scale = max(1, 128 // shown.shape[1])
    grid = image_grid(shown, captions, columns=min(_GRID_COLUMNS, len(shown)), scale=scale)
    publish_image(arguments.out / "grid.png", grid)
    print(f"{len(drawn)} pictures in {arguments.out}; the first of them in {arguments.out / 'grid.png'}")
