"""Curves and image grids as PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import published
from vqd_scale.core.terminal import escaped

_INPUTS = "vqd_scale inputs"
_MARGIN = 16
_FONT_SIZE = 13
_LINE_HEIGHT = 18
_CAPTION_LINES = 5
_LONGEST_CAPTION = 2000
"""More characters do not fit in the lines of the widest images."""
_CAPTION_COLOR = (60, 60, 60)
_WHITE = (255, 255, 255)
_MAX_MARKED_VALUES = 20


@dataclass(frozen=True)
class Series:
    """One curve: ``values`` over ``positions``, of equal length, with an optional band (lower, upper)."""

    name: str
    positions: Sequence[float]
    values: Sequence[float]
    between: tuple[Sequence[float], Sequence[float]] | None = None


def plot_curves(path: Path, series: Sequence[Series], *, title: str, x_label: str, y_label: str) -> None:
    """Plot curves to a PNG file: pale raw values, and a dark running mean over 1/50 of the values."""
    # Imported here because the import takes half a second, which tools without plots should not pay.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = colormaps["tab10" if len(series) <= 10 else "tab20"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    for number, curve in enumerate(series):
        color = colors(number % colors.N)
        values = np.asarray(curve.values, dtype=np.float64)
        if curve.between is not None:
            axes.fill_between(curve.positions, *curve.between, color=color, alpha=0.15, linewidth=0)
            axes.vlines(curve.positions, *curve.between, color=color, alpha=0.3)
        axes.plot(curve.positions, values, color=color, alpha=0.25, linewidth=1)
        marker = "o" if len(values) <= _MAX_MARKED_VALUES else None
        smoothed = _running_mean(values)
        axes.plot(curve.positions, smoothed, color=color, linewidth=2, marker=marker, label=curve.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with published(path) as partial:
        figure.savefig(partial, format="png")


def image_grid(
    images: UInt8[NDArray[np.uint8], "count height width 3"],
    captions: Sequence[str] | None = None,
    *,
    columns: int,
    scale: int = 1,
) -> Image.Image:
    """Arrange images in a grid on white, each with its wrapped caption below.

    Args:
        images: uint8 RGB images, at least one.
        captions: One caption per image, truncated with an ellipsis after five lines.
        columns: Number of images per row.
        scale: Integer upscaling factor; pixels are repeated, so that small images stay sharp.

    Raises:
        ValueError: There are no images, or the number of captions differs from the number of images.
    """
    count, height, width, _ = images.shape
    if count == 0 or (captions is not None and len(captions) != count):
        raise ValueError(f"a grid of {count} images with {captions and len(captions)} captions")
    font = _caption_font()
    texts = [escaped(caption[:_LONGEST_CAPTION]) for caption in captions or [""] * count]
    lines = [_wrapped(text, font, width * scale) for text in texts]
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    text_heights = [_LINE_HEIGHT * max(len(lines[index]) for index in row) for row in rows]
    pitch = width * scale + _MARGIN
    total_height = _MARGIN + sum(height * scale + text_height + _MARGIN for text_height in text_heights)
    canvas = Image.new("RGB", (_MARGIN + pitch * min(columns, count), total_height), _WHITE)
    draw = ImageDraw.Draw(canvas)
    y = _MARGIN
    for row, text_height in zip(rows, text_heights, strict=True):
        for column, index in enumerate(row):
            x = _MARGIN + pitch * column
            enlarged = images[index].repeat(scale, axis=0).repeat(scale, axis=1)
            canvas.paste(Image.fromarray(enlarged), (x, y))
            for number, line in enumerate(lines[index]):
                position = (x, y + height * scale + 3 + _LINE_HEIGHT * number)
                draw.text(position, line, font=font, fill=_CAPTION_COLOR)
        y += height * scale + text_height + _MARGIN
    return canvas


def comparison_grid(
    originals: UInt8[NDArray[np.uint8], "count height width 3"],
    reconstructions: UInt8[NDArray[np.uint8], "count height width 3"],
    *,
    columns: int,
    scale: int = 1,
) -> Image.Image:
    """Arrange originals and reconstructions in a grid, each original directly above its reconstruction.

    Raises:
        ValueError: There are no images, or the two arrays differ in shape.
    """
    if originals.shape != reconstructions.shape:
        raise ValueError(f"originals {originals.shape} and reconstructions {reconstructions.shape} differ")
    gap = np.full_like(originals[:, :1], 255)
    return image_grid(np.concatenate([originals, gap, reconstructions], axis=1), columns=columns, scale=scale)


def publish_image(path: Path, image: Image.Image, inputs: str | None = None) -> None:
    """Write a PNG file atomically; errors as for `published`.

    Args:
        path: File to write.
        image: Image.
        inputs: Fingerprint of what the image depends on, for `inputs_of`.
    """
    metadata = PngInfo()
    if inputs is not None:
        metadata.add_text(_INPUTS, inputs)
    with published(path, shared=True) as partial:
        image.save(partial, format="PNG", pnginfo=metadata)


def inputs_of(path: Path) -> str | None:
    """Return the fingerprint that `publish_image` wrote into a file; ``None`` for any other file.

    Raises:
        OSError: The file is missing or unreadable.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get(_INPUTS)
    except (UnidentifiedImageError, SyntaxError, ValueError):
        return None


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the trailing mean over a window of up to 1/50 of the values (at least one value)."""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _caption_font() -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans from matplotlib: Pillow's default font is limited to ASCII."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)


def _wrapped(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Wrap a caption to lines of at most ``width`` pixels; words longer than a line are split."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width:
            fitting = max(1, next(end for end in range(len(word)) if font.getlength(word[: end + 1]) > width))
            lines.append(word[:fitting])
            word = word[fitting:]
        lines.append(word)
    if len(lines) <= _CAPTION_LINES:
        return lines
    last = lines[_CAPTION_LINES - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: _CAPTION_LINES - 1], f"{last.rstrip()}…"]
