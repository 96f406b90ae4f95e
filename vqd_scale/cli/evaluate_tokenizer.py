"""``evaluate_tokenizer``: comparison of tokenizers by their reconstructions of unseen images."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from vqd_scale.cli.base import location_from, run_tool, tool_parser
from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.extractors import Inception
from vqd_scale.evaluation.tokenizer_eval import REPORT, MetricNetworks, in_a_line, report_tokenizers
from vqd_scale.tokenizers.perceptual import LPIPSConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/evaluate_tokenizer.py``."""
    parser = tool_parser(
        "Judge tokenizers by pictures that they never saw: PSNR, SSIM, use of the codebook and, with weights "
        "of others, LPIPS and rFID.",
        "python tools/evaluate_tokenizer.py runs/demo/tokenizer/export --data runs/demo/shards/held_out "
        "--size 64 --out runs/demo/tokenizer-report",
    )
    parser.add_argument("tokenizers", nargs="+", type=Path, metavar="BUNDLE", help="one or several")
    parser.add_argument("--data", required=True, help="image shards, or s3://bucket/key")
    parser.add_argument("--size", type=int, default=256, help="side of the squares in pixels (256)")
    parser.add_argument("--count", type=int, help="number of images, the first of the set")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json, .html and pictures")
    parser.add_argument("--vgg", type=Path, help="for LPIPS: torchvision's weights of VGG-16")
    parser.add_argument("--lpips", type=Path, help="for LPIPS: its own weights; those of the package lpips")
    parser.add_argument("--inception", type=Path, help="for rFID: torch-fidelity's weights of Inception")
    run_tool(parser, _evaluate, arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.lpips is not None and arguments.vgg is None:
        raise UserError("--lpips: needs --vgg as well, the network whose features it weighs.")
    judges = MetricNetworks.of(
        None if arguments.vgg is None else LPIPSConfig(vgg=arguments.vgg, linear=arguments.lpips),
        None if arguments.inception is None else Inception(weights=arguments.inception),
        device,
    )
    figures = report_tokenizers(
        {str(folder): folder for folder in arguments.tokenizers},
        location_from(arguments.data),
        arguments.size,
        arguments.out,
        judges,
        device,
        most=arguments.count,
    )
    for name, found in figures.items():
        print(f"{name}: {in_a_line(found)}")
    print(f"report: {arguments.out / REPORT}")
