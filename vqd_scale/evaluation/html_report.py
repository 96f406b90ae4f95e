"""Self-contained HTML report of an evaluation."""

from pathlib import Path
from typing import Any

from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.nested import leaves
from vqd_scale.evaluation.evaluate import Result
from vqd_scale.evaluation.registry import METRICS
from vqd_scale.reports.html import FiguresSection, TextSection, html_report


def publish_result(result: Result, out: Path) -> None:
    """Write ``report.json`` and ``report.html``.

    Raises:
        UserError: The folder cannot be written.
    """
    report = result.report
    html_report(
        out / "report.html",
        f"{report['protocol']['name']}: {report['model']['name']}",
        [
            FiguresSection("Metrics", _rows(report["figures"]), f"Over {report['count']} samples."),
            *result.sections,
            FiguresSection("Sampling", _rows(report["sampling"] | {"dtype": report["dtype"]})),
            FiguresSection(
                "Reference", _rows({**report["reference"], "prompts (SHA-256)": report["prompts"]}), _NOTE
            ),
            FiguresSection("Model", _rows(report["model"])),
            TextSection(
                "Metric definitions", " ".join(kind.definition for kind in METRICS) + "\n\n" + _SEEDS
            ),
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


_NOTE = "Metrics are comparable only if all of these values are equal."
_SEEDS = (
    "Captions, their order and the random numbers are functions of the seeds above: the same command "
    "generates the same samples on any number of ranks."
)
