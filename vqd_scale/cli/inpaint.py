import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.cli.model_arguments import add_model_arguments, load_model
from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import BadSample, decode_image
from vqd_scale.reports.plots import publish_image


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/inpaint.py``."""
    parser = tool_parser(
        "Draw anew what a mask covers, in a picture that is otherwise kept.",
        'python tools/inpaint.py runs/coco street.png mask.png "a red bus in the rain" --count 4',
    )
    add_model_arguments(parser)
    parser.add_argument("image", type=Path, help="the picture; its centre is fitted to the model's size")
    parser.add_argument("mask", type=Path, help="of the same size: white is drawn, black is kept")
    parser.add_argument("prompt", help="what the whole picture shows")
    parser.add_argument("--out", type=Path, default=Path("inpainted"), help="folder for the pictures")
    parser.add_argument("--count", type=int, default=1, help="how many pictures")
    parser.add_argument("--steps", type=int, default=25, help="network evaluations for a picture")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of guidance, 1 is none")
    parser.add_argument("--seed", type=int, default=0)
    run_tool(parser, _inpaint, arguments)


def _inpaint(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise UserError("--count must be at least 1.")
    image, mask = _opened(arguments.image), _opened(arguments.mask)
    pictures = load_model(arguments).inpaint(
        image,
        mask,
        [arguments.prompt] * arguments.count,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
    )
    for number, picture in enumerate(pictures):
        publish_image(arguments.out / f"{number:06d}.png", picture)
    print(f"{arguments.count} pictures in {arguments.out}")


def _opened(path: Path) -> Image.Image:
    try:
        return Image.fromarray(decode_image(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    except BadSample as error:
        raise UserError(f"{path}: {error}.") from None
