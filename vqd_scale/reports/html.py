"""Self-contained HTML reports of text, tables and images."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vqd_scale.core.atomic_io import publish_text


@dataclass(frozen=True)
class TextSection:
    """Section of text; blank lines separate paragraphs."""

    heading: str
    text: str


@dataclass(frozen=True)
class FiguresSection:
    """Section with a table of named values; floats are shown with four significant digits."""

    heading: str
    rows: Mapping[str, float | str]
    note: str = ""


@dataclass(frozen=True)
class TableSection:
    """Section with a table of several columns; number format as in `FiguresSection`."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float | str]]
    note: str = ""


@dataclass(frozen=True)
class ImageSection:
    """Section with one PNG file and a caption."""

    heading: str
    path: Path
    note: str = ""


Section = TextSection | FiguresSection | TableSection | ImageSection


def html_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a self-contained HTML page: images are embedded, and all text is escaped.

    Raises:
        UserError: The file cannot be written.
    """
    body = "\n".join(_section_html(section) for section in sections)
    publish_text(path, _PAGE.format(title=escape(title), style=_STYLE, body=body))


def _section_html(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    if isinstance(section, TextSection):
        parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text.split("\n\n")]
        return "\n".join(parts)
    if isinstance(section, FiguresSection):
        rows = [
            f"<tr><th>{escape(name)}</th><td>{_figure(value)}</td></tr>"
            for name, value in section.rows.items()
        ]
        parts.append(f"<table>{''.join(rows)}</table>")
    elif isinstance(section, TableSection):
        head = "".join(f"<th>{escape(name)}</th>" for name in section.columns)
        body = "".join(
            f"<tr>{''.join(f'<td>{_figure(value)}</td>' for value in row)}</tr>" for row in section.rows
        )
        parts.append(f'<table class="columns"><tr>{head}</tr>{body}</table>')
    else:
        data = base64.b64encode(section.path.read_bytes()).decode("ascii")
        parts.append(f'<img alt="{escape(section.heading)}" src="data:image/png;base64,{data}">')
    if section.note:
        parts.append(f'<p class="note">{escape(section.note)}</p>')
    return "\n".join(parts)


def _figure(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(str(value))


_STYLE = """
body { margin: 3rem auto; max-width: 60rem; padding: 0 1.5rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
img { max-width: 100%; height: auto; border: 1px solid #e5e5e5; border-radius: 6px; }
table { border-collapse: collapse; } tr { border-bottom: 1px solid #e5e5e5; }
th, td { padding: .3rem 2.5rem .3rem 0; text-align: left; font-weight: normal; }
td { text-align: right; padding-right: 0; font-variant-numeric: tabular-nums; }
.columns :is(th, td) { text-align: right; padding: .3rem 0 .3rem 1.5rem; }
.columns :is(th, td):first-child { text-align: left; padding-left: 0; }
.note { color: #666; font-size: .9rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
