import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from vqd_scale.cli.base import run_tool, tool_parser
from vqd_scale.core.errors import UserError
from vqd_scale.reports.plots import Series, plot_curves
from vqd_scale.training.logging.metrics import read_metrics


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``tools/plot_run.py``."""
    parser = tool_parser(
        "Plot figures of one run or several over images seen, from their metrics.jsonl.",
        "python tools/plot_run.py runs/demo/model --figures loss bound",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--figures", nargs="+", metavar="NAME", help="which columns; all losses unless given")
    parser.add_argument("--out", type=Path, help="the PNG file; curves.png in the first run's folder")
    run_tool(parser, _plot, arguments)


def _plot(arguments: argparse.Namespace) -> None:
    runs: list[Path] = arguments.runs
    curves: list[Series] = []
    for run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        if not rows:
            raise UserError(f"{run}: there is no metrics.jsonl with rows here; give the folder of a run.")
        known = sorted({name for row in rows for name in row} - {"images"})
        names: list[str] = arguments.figures or [name for name in known if name in ("loss", "bound")]
        for name in names:
            if name not in known:
                raise UserError(f"{run}: has no figure '{name}'; it has {', '.join(known)}.")
            curves.append(_curve(rows, name, f"{run.name}: {name}" if len(runs) > 1 else name))
    out: Path = arguments.out or runs[0] / "curves.png"
    plot_curves(out, curves, title=runs[0].name, x_label="images seen", y_label="")
    print(out)


def _curve(rows: Sequence[Mapping[str, float]], name: str, title: str) -> Series:
    """Return the curve of a metric over images seen, from the rows that contain the metric."""
    having = [row for row in rows if name in row]
    return Series(title, [row["images"] for row in having], [row[name] for row in having])
