from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vqd_scale.cli.base import Tool
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import reserve

if TYPE_CHECKING:
    from vqd_scale.reports.plots import Series

_DEFAULT_METRICS = ("loss", "bound")

main = Tool()
"""Entry point of ``tools/plot_run.py``."""


@main.command("python tools/plot_run.py runs/demo/model --metric loss --metric bound")
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="run folders")],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="metric to plot; repeatable (default: the losses)"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="PNG file (default: curves.png in the first run folder)")
    ] = None,
) -> None:
    """Plot metrics of one or several runs over images seen, from their metrics.jsonl."""
    from vqd_scale.reports.plots import plot_curves
    from vqd_scale.training.logging.metrics import read_metrics

    curves: list[Series] = []
    for run in runs:
        rows = read_metrics(run / "metrics.jsonl")
        if not rows:
            raise UserError(f"{run}: there is no metrics.jsonl with rows here; give the folder of a run.")
        available = sorted({name for row in rows for name in row} - {"images"})
        for name in metric or [name for name in available if name in _DEFAULT_METRICS]:
            if name not in available:
                raise UserError(f"{run}: has no metric '{name}'; it has {', '.join(available)}.")
            curves.append(_curve(rows, name, f"{run.name}: {name}" if len(runs) > 1 else name))
    path = output or runs[0] / "curves.png"
    if output is None:
        reserve(runs[0].resolve(), "plot_run.py", [path.name], siblings=None)
    plot_curves(path, curves, title=runs[0].name, x_label="images seen", y_label="")
    print(path)


def _curve(rows: Sequence[Mapping[str, float]], name: str, title: str) -> "Series":
    """Return the curve of a metric over images seen, from the rows that contain the metric."""
    from vqd_scale.reports.plots import Series

    points = [(row["images"], row[name]) for row in rows if name in row]
    return Series(title, [images for images, _ in points], [value for _, value in points])
