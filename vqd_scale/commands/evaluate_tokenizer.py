"""``evaluate_tokenizer``: what tokenizers make of pictures that they never saw, side by side."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqd_scale.commands.entry import location_from, run_tool, tool_parser
from vqd_scale.core.errors import UserError
from vqd_scale.core.report import Figures, Picture, Section, comparison_grid, html_report, publish_image
from vqd_scale.core.store import Location, publish_json
from vqd_scale.evaluation.extractors import Inception
from vqd_scale.evaluation.tokenization import TokenizerEvaluation, evaluate_tokenizer
from vqd_scale.inference.bundle import load_tokenizer
from vqd_scale.tokenizers.perceptual import LPIPS, LPIPSConfig, build_perceptual

REPORT = "report.json"
_COLUMNS = 8
_SHOWN_SIDE = 128
_WITHOUT = "not given: no weights were named"


@dataclass(frozen=True)
class Judges:
    """Networks that figures are taken with, where there are weights of them.

    Attributes:
        lpips: The learned distance.
        inception: rFID's network.
    """

    lpips: LPIPS | None = None
    inception: Inception | None = None

    @classmethod
    def of(cls, lpips: LPIPSConfig | None, inception: Inception | None, device: torch.device) -> "Judges":
        """Those of which weights are named.

        Raises:
            UserError: The weights cannot be read.
        """
        network = None if lpips is None else build_perceptual(lpips)
        return cls(network.to(device) if isinstance(network, LPIPS) else None, inception)


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
    parser.add_argument("--count", type=int, help="only the first so many pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json, .html and pictures")
    parser.add_argument("--vgg", type=Path, help="for LPIPS: torchvision's weights of VGG-16")
    parser.add_argument("--lpips", type=Path, help="for LPIPS: its own weights; those of the package lpips")
    parser.add_argument("--inception", type=Path, help="for rFID: torch-fidelity's weights of Inception")
    run_tool(parser, _evaluate, arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.lpips is not None and arguments.vgg is None:
        raise UserError("--lpips: needs --vgg as well, the network whose features it weighs.")
    judges = Judges.of(
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


def report_tokenizers(
    tokenizers: Mapping[str, Path],
    pictures: Location,
    size: int,
    out: Path,
    judges: Judges,
    device: torch.device,
    *,
    more: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Judge tokenizers and write report.json, report.html and a sheet of reconstructions for each.

    Args:
        tokenizers: Bundles by the names that the report has for them.
        pictures: Image shards.
        size: Side of the squares.
        out: Folder of the report.
        judges: Networks that figures are taken with.
        device: Where to compute.
        more: What else report.json says.
        most: Only the first so many pictures.

    Returns:
        The figures of each tokenizer.
    """
    found: dict[str, dict[str, Any]] = {}
    sections: list[Section] = []
    for number, (name, folder) in enumerate(tokenizers.items()):
        evaluation = evaluate_tokenizer(
            load_tokenizer(folder, device),
            pictures,
            size,
            device=device,
            most=most,
            lpips=judges.lpips,
            inception=judges.inception,
        )
        found[name] = evaluation.figures
        path = out / ("reconstructions.png" if number == 0 else f"reconstructions-{number}.png")
        _draw(evaluation, path)
        rows = {
            key: value for key, value in evaluation.figures.items() if isinstance(value, int | float | str)
        }
        missing = {key: _WITHOUT for key in ("lpips", "rfid") if key not in rows}
        sections += [
            Figures(name, rows | missing),
            Picture(
                f"{name}: reconstructions", path, "Pictures above, what the tokenizer makes of them below."
            ),
        ]
    publish_json(out / REPORT, {**found, **(more or {})})
    html_report(out / "report.html", "Tokenizers", sections)
    return found


def in_a_line(figures: Mapping[str, Any]) -> str:
    """The figures that matter most."""
    parts = [
        f"{figures['psnr']:.2f} dB",
        *(f"{name} {figures[name]:.3f}" for name in ("ssim", "lpips", "rfid") if name in figures),
        f"{figures['used']:.1%} of {figures['codes']:,} codes used ({figures['used_often']:.1%} ten times)",
        f"perplexity {figures['perplexity']:.0f}",
    ]
    return ", ".join(parts)


def _draw(evaluation: TokenizerEvaluation, path: Path) -> None:
    originals, made = (
        images.permute(0, 2, 3, 1).numpy() for images in (evaluation.originals, evaluation.reconstructions)
    )
    scale = max(1, _SHOWN_SIDE // originals.shape[1])
    publish_image(path, comparison_grid(originals, made, columns=_COLUMNS, scale=scale))
