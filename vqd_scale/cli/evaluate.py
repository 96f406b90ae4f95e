import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.core.atomic_io import publish_json
from vqd_scale.evaluation.sample_folder import evaluate_samples
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.reports.plots import comparison_grid, publish_image

_SHOWN = 16


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/evaluate.py``."""
    parser = tool_parser(
        "Score generated pictures against the shards their captions came from.",
        "python tools/evaluate.py runs/demo/samples --data runs/demo/shards/held_out "
        "--tokenizer runs/demo/tokenizer/export --out runs/demo/evaluation",
    )
    parser.add_argument("samples", type=Path, help="a folder that sample.py --data filled")
    parser.add_argument("--data", type=Path, required=True, help="the shards its captions came from")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's tokenizer bundle")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for evaluation.json and reconstructions.png"
    )
    run_tool(parser, _evaluate, arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer, torch.device("cpu"))
    evaluation = evaluate_samples(arguments.samples, arguments.data, tokenizer)
    real, reconstructed = (
        images[:_SHOWN].permute(0, 2, 3, 1).numpy() for images in (evaluation.real, evaluation.reconstructed)
    )
    grid = comparison_grid(real, reconstructed, columns=_SHOWN // 2, scale=max(1, 128 // real.shape[1]))
    publish_image(arguments.out / "reconstructions.png", grid)
    publish_json(arguments.out / "evaluation.json", evaluation.figures)
    print(f"scores of {evaluation.figures['count']} pictures: {arguments.out / 'evaluation.json'}")
