"""Self-contained HTML reports of text, tables and images, and the templates that produce them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vqd_scale.core.atomic_io import publish_text

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class TextSection:
    """Section of text; blank lines separate paragraphs."""

    heading: str
    text: str
    note: str = ""
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class FiguresSection:
    """Section with a table of named values; floats are shown with four significant digits."""

    heading: str
    rows: Mapping[str, float | str]
    note: str = ""
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class TableSection:
    """Section with a table of several columns; number format as in `FiguresSection`."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float | str]]
    note: str = ""
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class ImageSection:
    """Section with one PNG file and a caption."""

    heading: str
    path: Path
    note: str = ""
    kind: ClassVar[str] = "image"

    @property
    def base64(self) -> str:
        """Content of the file, for a data URL."""
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


Section = TextSection | FiguresSection | TableSection | ImageSection


def html_report(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a self-contained HTML page: images are embedded, and all text is escaped."""
    publish_text(path, render("report.html.j2", title=title, sections=sections))


def render(template: str, **values: object) -> str:
    """Render a template of ``templates/``; HTML is escaped, and a missing value is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=PackageLoader("vqd_scale.reports"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
