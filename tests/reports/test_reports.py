import base64
import io
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from PIL import Image

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.reports.html import (
    FiguresSection,
    ImageSection,
    TableSection,
    TextSection,
    html_report,
    render,
)
from vqd_scale.reports.plots import Series, comparison_grid, image_grid, plot_curves, publish_image

WHITE = np.array([255, 255, 255], dtype=np.uint8)


def random_images(count: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    """Return noise without near-white pixels, to distinguish images from the page."""
    return np.random.default_rng(count).integers(0, 200, (count, height, width, 3), dtype=np.uint8)


def occurrences(canvas: NDArray[np.uint8], image: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Return every (row, column) at which the canvas contains the image exactly."""
    height, width, _ = image.shape
    candidates = zip(*np.nonzero((canvas == image[0, 0]).all(axis=-1)), strict=True)
    return [
        (int(row), int(column))
        for row, column in candidates
        if np.array_equal(canvas[row : row + height, column : column + width], image)
    ]


@given(count=st.integers(1, 9), columns=st.integers(1, 5), scale=st.integers(1, 3))
def test_every_image_occurs_once_in_reading_order(count: int, columns: int, scale: int) -> None:
    images = random_images(count)
    canvas = np.asarray(image_grid(images, columns=columns, scale=scale))
    enlarged = [np.kron(image, np.ones((scale, scale, 1), dtype=np.uint8)) for image in images]
    places = [occurrences(canvas, image) for image in enlarged]
    assert all(len(matches) == 1 for matches in places)
    assert [matches[0] for matches in places] == sorted(matches[0] for matches in places)
    assert len({row for [(row, _)] in places}) == -(-count // columns)
    inked = (canvas != WHITE).any(axis=-1).sum()
    assert inked == count * 64 * scale**2


def test_grid_has_a_white_margin_on_every_side() -> None:
    canvas = np.asarray(image_grid(random_images(3), ["a caption"] * 3, columns=2, scale=10))
    for edge in (canvas[:8], canvas[-8:], canvas[:, :8], canvas[:, -8:]):
        assert (edge == WHITE).all()


@given(caption=st.text(st.characters(codec="latin-1", exclude_categories=["C"]), max_size=400))
def test_caption_is_below_its_own_image(caption: str) -> None:
    size = 96
    images = random_images(3, size, size)
    canvas = np.asarray(image_grid(images, ["", caption, ""], columns=3))
    [(top, column_start)] = occurrences(canvas, images[1])
    below = canvas[top + size :]
    inked = np.nonzero((below != WHITE).any(axis=(0, 2)))[0]
    # A glyph's curve may reach a pixel over the advance width by which lines are measured.
    assert all(column_start - 2 <= column < column_start + size + 2 for column in inked)
    assert (len(inked) > 0) == bool(caption.strip())
    assert below.shape[0] < 140


def test_long_caption_is_cut_after_five_lines() -> None:
    images = random_images(1, 96, 96)
    heights = [image_grid(images, ["wordwordword " * words], columns=1).height for words in (1, 4, 5, 6, 100)]
    line = (heights[1] - heights[0]) // 3
    assert heights == [heights[0] + line * (lines - 1) for lines in (1, 4, 5, 5, 5)]


def test_non_ascii_letters_are_rendered_distinctly() -> None:
    grids = [np.asarray(image_grid(random_images(1, 64, 64), [letter], columns=1)) for letter in "äéжω"]
    assert len({grid.tobytes() for grid in grids}) == 4


def test_pair_is_an_original_above_its_reconstruction() -> None:
    originals, reconstructions = random_images(4), random_images(5)[:4]
    canvas = np.asarray(comparison_grid(originals, reconstructions, columns=2))
    for original, reconstruction in zip(originals, reconstructions, strict=True):
        [(row, column)] = occurrences(canvas, original)
        assert occurrences(canvas, reconstruction) == [(row + 9, column)]


def test_empty_grids_and_unequal_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="0 images"):
        image_grid(random_images(1)[:0], columns=2)
    with pytest.raises(ValueError, match="2 images with 1 captions"):
        image_grid(random_images(2), ["one"], columns=2)
    with pytest.raises(ValueError, match="differ"):
        comparison_grid(random_images(2), random_images(3), columns=2)


def test_published_image_round_trip(tmp_path: Path) -> None:
    image = image_grid(random_images(2), columns=2)
    publish_image(tmp_path / "grid.png", image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(image))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def curve_pixels(path: Path) -> Counter[tuple[int, int, int]]:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return Counter((int(red), int(green), int(blue)) for red, green, blue in pixels)


def test_curves_have_distinct_colors(tmp_path: Path) -> None:
    positions = list(range(0, 6400, 64))
    one = Series("loss", positions, [1 / (1 + position) for position in positions])
    two = Series("other", positions, [0.5] * len(positions))
    blue, orange = (0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)
    for series, expected_colors in (([one], {blue}), ([one, two], {blue, orange})):
        plot_curves(tmp_path / "loss.png", series, title="Training", x_label="images", y_label="nats")
        pixels = curve_pixels(tmp_path / "loss.png")
        assert {color for color in (blue, orange) if pixels[color] > 100} == expected_colors


def test_unwritable_folder_raises_user_error() -> None:
    with pytest.raises(UserError, match=r"/sys/vqd/loss\.png: cannot be written"):
        plot_curves(Path("/sys/vqd/loss.png"), [Series("a", [0], [1])], title="", x_label="", y_label="")


class Page(HTMLParser):
    """Parsed page: its text, its images, and whether its elements close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_report_embeds_everything_it_shows(tmp_path: Path) -> None:
    grid = image_grid(random_images(2), columns=2)
    publish_image(tmp_path / "grid.png", grid)
    sections = [
        TextSection("About", "First.\n\nSecond."),
        FiguresSection(
            "Score", {"accuracy": 0.98765, "seconds": 1234567.0, "prompts": 256, "kind": "text"}, "A note."
        ),
        ImageSection("Samples", tmp_path / "grid.png", "Another note."),
    ]
    html_report(tmp_path / "report.html", "The demo", sections)
    (tmp_path / "grid.png").unlink()

    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    for words in (
        "The demo",
        "First.",
        "Second.",
        "accuracy 0.9877",
        "1.235e+06",
        "prompts 256",
        "kind text",
    ):
        assert words in page.text
    assert "A note." in page.text
    assert "Another note." in page.text
    [image_element] = page.images
    assert image_element["alt"] == "Samples"
    kind, _, data = str(image_element["src"]).partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as embedded_image:
        assert np.array_equal(np.asarray(embedded_image), np.asarray(grid))
    assert all(link.startswith("data:") for link in page.links)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_text_is_escaped(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    publish_image(folder / "grid.png", image_grid(random_images(1), columns=1))
    sections = [
        TextSection(text, text),
        FiguresSection(text, {text: text}, text),
        ImageSection(text, folder / "grid.png", text),
    ]
    html_report(folder / "report.html", text, sections)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    # title and h1, then heading and paragraph, heading, name, value and note, heading and note
    assert page.words.count(text) == 10
    assert page.images[0]["alt"] == text


def test_a_script_in_a_caption_is_escaped(tmp_path: Path) -> None:
    caption = "<script>alert(1)</script>"
    publish_image(tmp_path / "grid.png", image_grid(random_images(1), [caption], columns=1))
    sections = [
        TableSection("Captions", ["image", "caption"], [["0", caption]]),
        ImageSection(caption, tmp_path / "grid.png", caption),
    ]
    html_report(tmp_path / "report.html", caption, sections)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert source.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6


def test_a_missing_value_of_a_template_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="'sections' is undefined"):
        render("report.html.j2", title="no sections")


def test_import_does_not_load_matplotlib() -> None:
    source = "import sys, vqd_scale.reports.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
