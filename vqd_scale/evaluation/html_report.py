"""Self-contained HTML report of an evaluation."""

from pathlib import Path
from typing import Any

from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.nested import leaves
from vqd_scale.evaluation.evaluate import Result
from vqd_scale.reports.html import FiguresSection, ImageSection, Section, TextSection, html_report
from vqd_scale.reports.plots import Series, image_grid, plot_curves, publish_image

_COLUMNS = 8


def publish_result(result: Result, out: Path) -> None:
    """Write ``report.json`` and ``report.html``.

    Raises:
        UserError: The folder cannot be written.
    """
    pictures: list[Section] = []
    for number, shown in enumerate(result.shown):
        scale = max(1, 128 // shown.images.shape[1])
        path = out / f"shown-{number}.png"
        publish_image(path, image_grid(shown.images, shown.captions, columns=_COLUMNS, scale=scale))
        pictures.append(ImageSection(shown.heading, path))
    for number, curve in enumerate(result.curves):
        path = out / f"curve-{number}.png"
        series = Series(curve.y, curve.positions, curve.values)
        plot_curves(path, [series], title=curve.heading, x_label=curve.x, y_label=curve.y)
        pictures.append(ImageSection(curve.heading, path, curve.note))
    report = result.report
    figures = _rows(report["figures"])
    html_report(
        out / "report.html",
        f"{report['protocol']['name']}: {report['model']['name']}",
        [
            FiguresSection("Figures", figures, f"Of {report['count']} pictures, each counted once."),
            *pictures,
            FiguresSection("Drawn by", _rows(report["sampling"] | {"dtype": report["dtype"]})),
            FiguresSection(
                "Beside", _rows({**report["reference"], "prompts (SHA-256)": report["prompts"]}), _NOTE
            ),
            FiguresSection("Model", _rows(report["model"])),
            TextSection("How to read this", _READ),
        ],
    )
    # Written last: its existence marks a complete report.
    publish_json(out / "report.json", report)


def _rows(values: dict[str, Any]) -> dict[str, float | str]:
    """Flatten nested plain values to dotted names; ``None`` values are omitted."""
    return {
        name: value if isinstance(value, float) else str(value)
        for name, value in leaves(values)
        if value is not None
    }


_NOTE = "A figure taken with any other of these is another figure."
_READ = """Fréchet distance, FID where the features are Inception's: lower is better; so is KID. Precision \
and density say how many drawn pictures lie among real ones, recall and coverage how much of the real ones \
is covered. CLIP's score is the mean cosine of a picture and its caption. Alignment is decided by an exact \
reader of the embedded set's pixels.

Captions, their order and the pictures' random numbers are functions of the seeds that are named here: the \
same command gives the same pictures on any number of ranks."""
