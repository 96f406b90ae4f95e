"""Sweep over sampling settings of one model: one evaluation per combination, summarized in one table."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from vqd_scale.core.atomic_io import publish_json
from vqd_scale.core.config import validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.nested import leaves, set_at
from vqd_scale.core.outputs import safe_name
from vqd_scale.evaluation.config import SEED, EvaluationConfig, SweepConfig
from vqd_scale.reports.html import ImageSection, Section, TableSection, TextSection, html_report
from vqd_scale.reports.plots import Series, plot_curves


@dataclass(frozen=True)
class Row:
    """One evaluation of a sweep.

    Attributes:
        settings: Settings by dotted name.
        seed: Sampling seed.
        figures: Metrics by dotted name.
    """

    settings: Mapping[str, float | str]
    seed: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Evaluations with equal settings and different seeds.

    Attributes:
        settings: Settings by dotted name.
        seeds: Number of evaluations.
        means: Mean of each metric.
        ranges: Minimum and maximum of each metric.
    """

    settings: Mapping[str, float | str]
    seeds: int
    means: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]


def points(config: SweepConfig, out: Path) -> list[tuple[str, dict[str, Any], EvaluationConfig]]:
    """Return name, settings and protocol of every combination, with the seed as the outermost loop.

    Raises:
        UserError: A key or a value is invalid.
    """
    if any(isinstance(value, str | dict) for value in config.axes.get(config.x_axis, ())):
        raise UserError(f"x_axis: the values of '{config.x_axis}' are not numbers.")
    keys = [SEED, *(key for key in config.axes if key != SEED)]
    values = [
        config.axes.get(SEED, (config.evaluation.sampling.seed,)),
        *(config.axes[key] for key in keys[1:]),
    ]
    combinations: list[tuple[str, dict[str, Any], EvaluationConfig]] = []
    for combination in itertools.product(*values):
        settings = dict(zip(keys, combination, strict=True))
        plain = config.evaluation.model_dump(mode="json")
        for key, value in settings.items():
            try:
                set_at(plain, key, value)
            except ValueError as error:
                raise UserError(f"axes.{key}: {error}.") from None
        # All evaluations share the reference statistics.
        plain["reference"]["file"] = plain["reference"]["file"] or str(out / "reference.safetensors")
        settings = {key: _named(value) for key, value in settings.items()}
        name = ",".join(f"{key.removeprefix('sampling.')}={value}" for key, value in settings.items())
        protocol = validated(EvaluationConfig, plain, source=f"axes: {name}")
        combinations.append((safe_name(name), settings, protocol))
    return combinations


def sweep_files(figures: Sequence[str]) -> list[str]:
    """Return the names of the files that `publish_sweep` and the evaluations' common reference need."""
    plots = [f"plot-{number}.png" for number in range(len(figures))]
    return ["sweep.json", "report.html", "reference.safetensors", *plots]


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Group rows that differ only in their seed, in order of first occurrence."""
    by_settings: dict[tuple[tuple[str, float | str], ...], list[Row]] = {}
    for row in rows:
        by_settings.setdefault(tuple(row.settings.items()), []).append(row)
    groups: list[Group] = []
    for settings, group_rows in by_settings.items():
        columns = {name: [row.figures[name] for row in group_rows] for name in group_rows[0].figures}
        means = {name: math.fsum(values) / len(values) for name, values in columns.items()}
        ranges = {name: (min(values), max(values)) for name, values in columns.items()}
        groups.append(Group(dict(settings), len(group_rows), means, ranges))
    return groups


def separated(first: Group, second: Group, figure: str) -> bool:
    """Return ``True`` if the ranges of two groups over several seeds do not overlap."""
    (low, high), (other_low, other_high) = first.ranges[figure], second.ranges[figure]
    return min(first.seeds, second.seeds) > 1 and (high < other_low or other_high < low)


def publish_sweep(
    title: str,
    rows: Sequence[Row],
    x: str,
    figures: Sequence[str],
    out: Path,
    note: str,
    extra: dict[str, Any],
) -> None:
    """Write ``sweep.json`` and ``report.html``: a table with the spread over seeds, and a plot per figure.

    Args:
        title: Title of the report.
        rows: All evaluations.
        x: Setting on the plots' horizontal axis.
        figures: Dotted names of the metrics to show.
        out: Output folder.
        note: Text of the report's section on how it was made.
        extra: Additional content of the JSON file.

    Raises:
        UserError: A metric is missing in the evaluations, or the folder cannot be written.
    """
    missing = [name for name in figures if any(name not in row.figures for row in rows)]
    if missing:
        available = ", ".join(rows[0].figures)
        raise UserError(f"metrics: '{missing[0]}' is none of these evaluations' metrics: {available}.")
    groups = grouped(rows)
    names = list(groups[0].settings)
    sections: list[Section] = []
    for number, figure in enumerate(figures):
        path = out / f"plot-{number}.png"
        plot_curves(path, _curves(groups, x, figure), title="", x_label=_short(x), y_label=figure)
        sections.append(
            ImageSection(figure, path, "Lines are means over seeds, bands go from lowest to highest.")
        )
    columns = [*(_short(name) for name in names), "seeds", *figures]
    table = [
        [*map(str, (*group.settings.values(), group.seeds)), *(_with_range(group, name) for name in figures)]
        for group in groups
    ]
    html_report(
        out / "report.html",
        title,
        [
            TableSection("All", columns, table, "Means over seeds; in brackets the lowest and the highest."),
            *sections,
            _separations(groups, figures),
            TextSection("Method", note),
        ],
    )
    publish_json(out / "sweep.json", {"rows": [asdict(row) for row in rows], **extra})


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Return a report's metrics by dotted name."""
    return {name: value for name, value in leaves(report["figures"]) if isinstance(value, float)}


def _separations(groups: Sequence[Group], figures: Sequence[str]) -> TableSection:
    """Build the table of separated pairs of groups that differ in exactly one setting."""
    rows: list[list[float | str]] = []
    for first, second in itertools.combinations(groups, 2):
        differing = [name for name in first.settings if first.settings[name] != second.settings[name]]
        if len(differing) != 1:
            continue
        name = differing[0]
        fixed = ", ".join(f"{_short(key)} {value}" for key, value in first.settings.items() if key != name)
        for figure in figures:
            if separated(first, second, figure):
                low, high = sorted((first, second), key=lambda group: group.means[figure])
                rows.append([figure, fixed, _short(name), str(low.settings[name]), str(high.settings[name])])
    note = "Pairs that are not listed overlap in some seeds, or have only one."
    return TableSection("Separated in every seed", ["figure", "at", "of", "lower", "higher"], rows, note)


def _short(name: str) -> str:
    """Return the last two components of a dotted name."""
    return " ".join(name.split(".")[-2:])


def _with_range(group: Group, figure: str) -> str:
    low, high = group.ranges[figure]
    return f"{group.means[figure]:.4g} ({low:.4g} to {high:.4g})"


def _curves(groups: Sequence[Group], x: str, figure: str) -> list[Series]:
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        label = ", ".join(f"{_short(name)} {value}" for name, value in group.settings.items() if name != x)
        by_label.setdefault(label or figure, []).append(group)
    curves: list[Series] = []
    for label, points in by_label.items():
        points = sorted(points, key=lambda group: float(group.settings[x]))
        positions = [float(group.settings[x]) for group in points]
        low, high = zip(*(group.ranges[figure] for group in points), strict=True)
        curves.append(Series(label, positions, [group.means[figure] for group in points], (low, high)))
    return curves


def _named(value: Any) -> Any:  # noqa: ANN401 - a configuration's value
    """Return a group of keys as one string for tables and folder names; other values unchanged."""
    return " ".join(map(str, cast(dict[str, Any], value).values())) if isinstance(value, dict) else value
