"""Embedded synthetic dataset: rendered scenes that are fully described by their caption.

A scene is one figure on a plain background, or two figures in a relation. Its attributes can be read from the
image. Some combinations of shape, color and background are held out of training: a model that generates
them correctly generalizes over the words and has not memorized images.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw
from pydantic import Field

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.config import Config
from vqd_scale.core.rng import Purpose, integers, permutation
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, Sample, shard_recipes, write_shard_set

Color = tuple[int, int, int]
Split = Literal["train", "held_out"]

SHAPES = ("circle", "square", "triangle", "star")
COLORS: Mapping[str, Color] = {
    "red": (226, 45, 58),
    "orange": (255, 128, 0),
    "yellow": (255, 212, 0),
    "green": (32, 178, 78),
    "turquoise": (0, 196, 204),
    "blue": (38, 98, 255),
    "purple": (140, 56, 224),
    "pink": (255, 92, 172),
}
BACKGROUNDS: Mapping[str, Color] = {
    "white": (250, 250, 247),
    "gray": (150, 156, 166),
    "black": (20, 20, 24),
    "navy": (22, 38, 92),
    "brown": (92, 58, 40),
    "lavender": (214, 204, 248),
    "mint": (192, 240, 212),
    "peach": (255, 216, 188),
}
SIZES: Mapping[str, float] = {"small": 0.125, "large": 0.2}
"""Radius of the circle, as a fraction of the image side; other shapes scale with it."""

_ROWS = {"top": 0.25, "middle": 0.5, "bottom": 0.75}
_COLUMNS = {"left": 0.25, "center": 0.5, "right": 0.75}
POSITIONS: Mapping[str, tuple[float, float]] = {
    f"{row} {column}": (x, y) for (row, y), (column, x) in product(_ROWS.items(), _COLUMNS.items())
}
"""Center (x, y) of a figure, as fractions of the image side."""

RELATIONS: Mapping[str, tuple[str, str]] = {
    "left of": ("middle left", "middle right"),
    "above": ("top center", "bottom center"),
}
"""Positions of the first and the second figure of a scene, by relation."""

_SUPERSAMPLING = 8
_WORDS_BLOCK = 1_024


@dataclass(frozen=True)
class Figure:
    """Shape, color, size and position of a figure: keys of the tables above."""

    shape: str
    color: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """Background and one figure, or two figures in one of `RELATIONS`."""

    background: str
    figures: tuple[Figure, ...]

    @property
    def relation(self) -> str:
        """Relation of the first of two figures to the second."""
        positions = tuple(figure.position for figure in self.figures)
        return next(name for name, placed in RELATIONS.items() if placed == positions)

    def attributes(self) -> dict[str, str]:
        """Return all attributes that a caption describes, by name."""
        if len(self.figures) == 1:
            return {**asdict(self.figures[0]), "background": self.background}
        named = {
            f"{order} {name}": value
            for order, figure in zip(("first", "second"), self.figures, strict=True)
            for name, value in asdict(figure).items()
            if name != "position"
        }
        return {**named, "relation": self.relation, "background": self.background}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Scene":
        """Parse the scene in a shard's ``json`` member, which is its `dataclasses.asdict`."""
        return cls(value["background"], tuple(Figure(**figure) for figure in value["figures"]))


class ShapesConfig(Config):
    """Embedded synthetic dataset of shapes."""

    image_size: int = Field(default=64, ge=16, le=512)
    """Height and width of the images in pixels."""
    objects: int = Field(default=1, ge=1, le=2)
    """Figures per scene; 2 gives captions with a spatial relation."""
    train_samples: int = Field(default=16_384, ge=1, le=1 << 24)
    """Number of training samples; scenes occur equally often, each time with a new caption. Lower it for a
    quick test."""
    held_out_samples: int = Field(default=512, ge=1, le=1 << 24)
    """Number of samples of held-out scenes. Raise it for a less noisy evaluation."""
    samples_per_shard: int = Field(default=1_024, ge=1, le=1 << 20)
    """Samples per shard. Lower it for several shards of a small dataset."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of scene order and caption wording."""


def write_shapes(config: ShapesConfig, folder: Path) -> dict[Split, ShardSet]:
    """Write the training and the held-out split to the folders ``train`` and ``held_out``.

    Raises:
        UserError: A folder contains another dataset or cannot be written.
    """
    splits: dict[Split, int] = {"train": config.train_samples, "held_out": config.held_out_samples}
    datasets: dict[Split, ShardSet] = {}
    for split, samples in splits.items():
        generate = functools.partial(map, functools.partial(make_sample, config, split))
        recipes = shard_recipes(range(samples), config.samples_per_shard, generate)
        source = {"name": "shapes", "split": split, "config": config.model_dump(mode="json")}
        meta = {"content": "images", "image_size": config.image_size, "source": source}
        title = f"rendering {split.replace('_', '-')} scenes"
        datasets[split] = write_shard_set(folder / split, meta, recipes, title)
    return datasets


def make_sample(config: ShapesConfig, split: Split, index: int) -> Sample:
    """Generate sample ``index`` of a split, as a pure function of (seed, index)."""
    scene = scene_at(config, split, index)
    block, row = divmod(index, _WORDS_BLOCK)
    words = _words(config.seed, _own_slot(split, block))[row]
    return {
        KEY: f"{index:09d}",
        "png": _png(scene, config.image_size),
        "txt": caption(scene, words),
        "json": asdict(scene),
    }


def scene_at(config: ShapesConfig, split: Split, index: int) -> Scene:
    """Return the scene of a sample; each pass over the scenes of the split is shuffled anew."""
    scenes = all_scenes(config.objects, split)
    turn, position = divmod(index, len(scenes))
    return scenes[_scene_order(config.seed, _own_slot(split, turn), len(scenes))[position]]


@functools.cache
def all_scenes(objects: int, split: Split) -> tuple[Scene, ...]:
    """List all scenes of a split; a scene is held out if one (figure, background) pair is."""
    placements = [(position,) for position in POSITIONS] if objects == 1 else list(RELATIONS.values())
    appearances = list(product(SHAPES, COLORS, SIZES))
    scenes = (
        Scene(background, tuple(Figure(*look, at) for look, at in zip(looks, positions, strict=True)))
        for background, positions in product(BACKGROUNDS, placements)
        for looks in product(appearances, repeat=objects)
    )
    return tuple(scene for scene in scenes if _is_held_out(scene) == (split == "held_out"))


def render(scene: Scene, pixels: int) -> UInt8[NDArray[np.uint8], "height width 3"]:
    """Render a scene, anti-aliased, with ``pixels`` as height and width."""
    canvas = np.full((pixels, pixels, 3), BACKGROUNDS[scene.background], np.float32)
    for figure in scene.figures:
        cover = coverage(figure.shape, figure.size, figure.position, pixels)[..., None]
        canvas += cover * (np.array(COLORS[figure.color], np.float32) - canvas)
    return np.rint(canvas).astype(np.uint8)


@functools.cache
def coverage(
    shape: str, size: str, position: str, pixels: int
) -> Float32[NDArray[np.float32], "height width"]:
    """Compute the fraction of each pixel that a figure covers, 0 to 1."""
    side = pixels * _SUPERSAMPLING
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    x, y = POSITIONS[position]
    outline = [((x + dx) * side, (y + dy) * side) for dx, dy in _outline(shape, SIZES[size])]
    draw.polygon(outline, fill=255)
    return np.divide(np.asarray(image.reduce(_SUPERSAMPLING)), 255, dtype=np.float32)


def caption(scene: Scene, words: Sequence[int]) -> str:
    """Generate a full caption of a scene; two random integers (``words``) choose the wording."""
    return _caption_of_one(scene, words) if len(scene.figures) == 1 else _caption_of_two(scene, words)


# Size precedes color, so the article before a figure is "a"; backgrounds all start with a consonant.
_ONE_FIGURE = (
    "a {size} {color} {shape} {position} on a {background} background",
    "a {size} {color} {shape} {position}, {background} background",
    "a {size} {color} {shape} on a {background} background, {position}",
    "a {background} background with a {size} {color} {shape} {position}",
    "{position}, a {size} {color} {shape} on {background}",
    "{position} of a {background} picture, a {size} {color} {shape}",
    "one {size} {color} {shape} {position} of a {background} image",
    "a picture of a {size} {color} {shape} {position} on {background}",
    "there is a {size} {color} {shape} {position} on a {background} background",
    "a {size} {shape} in {color}, {position}, on a {background} background",
    "on a {background} background, a {size} {color} {shape} {position}",
    "a {shape} {position}, {size} and {color}, on {background}",
    "a {color} {shape}, {size}, {position}, on a {background} background",
    "the {shape} {position} is {size} and {color}, the background is {background}",
)
_TWO_FIGURES = (
    "{first} {relation} {second} on a {background} background",
    "{first} {relation} {second}, {background} background",
    "on {background}, {first} {relation} {second}",
    "a {background} background with {first} {relation} {second}",
    "{first} is {relation} {second} on {background}",
    "there is {first} {relation} {second} on {background}",
)
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_ROW_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}
_RELATION_WORDS = {
    "left of": (("to the left of", "left of"), ("to the right of", "right of")),
    "above": (("above", "over"), ("below", "under")),
}
"""Phrases for the relation of the first figure to the second, and of the second to the first."""


def _caption_of_one(scene: Scene, words: Sequence[int]) -> str:
    figure = scene.figures[0]
    template, word = _choose(_ONE_FIGURE, words[0])
    size, _ = _choose(_SIZE_WORDS[figure.size], word)
    position, _ = _choose(_position_phrases(figure.position), words[1])
    words_of_figure = {**asdict(figure), "size": size, "position": position}
    text = template.format(background=scene.background, **words_of_figure)
    return text.replace("a orange", "an orange")


def _caption_of_two(scene: Scene, words: Sequence[int]) -> str:
    template, word = _choose(_TWO_FIGURES, words[0])
    is_reversed, word = _choose((False, True), word)
    forward, backward = _RELATION_WORDS[scene.relation]
    relation, _ = _choose(backward if is_reversed else forward, word)
    described: list[str] = []
    word = words[1]
    for figure in scene.figures[::-1] if is_reversed else scene.figures:
        size, word = _choose(_SIZE_WORDS[figure.size], word)
        described.append(f"a {size} {figure.color} {figure.shape}")
    first, second = described
    return template.format(first=first, second=second, relation=relation, background=scene.background)


def _position_phrases(position: str) -> tuple[str, ...]:
    row, column = position.split()
    if position == "middle center":
        return "in the middle", "in the center"
    if row == "middle":
        return f"on the {column}", f"at the {column} side"
    if column == "center":
        return f"at the {row}", f"in the {row} center"
    return (*(f"in the {word} {column}" for word in _ROW_WORDS[row]), f"in the {row} {column} corner")


def _choose(choices: Sequence[Any], word: int) -> tuple[Any, int]:
    """Return one of the choices, and the rest of the random integer for the next choice."""
    remainder, choice = divmod(word, len(choices))
    return choices[choice], remainder


def _outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Return the corners relative to the center; the factors give all shapes about equal visual weight."""
    if shape == "circle":
        return _regular(120, radius)
    if shape == "square":
        return [(-radius, -radius), (radius, -radius), (radius, radius), (-radius, radius)]
    if shape == "triangle":
        # The visual center lies between the center of mass and the center of the bounding box.
        return [(dx, dy + 0.12 * radius) for dx, dy in _regular(3, 1.25 * radius)]
    points, notches = _regular(5, 1.25 * radius), _regular(5, 0.58 * radius, turn=math.pi / 5)
    return [corner for pair in zip(points, notches, strict=True) for corner in pair]


def _regular(corners: int, radius: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon, clockwise, the first one at the top if ``turn`` is 0."""
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for angle in angles]


def _is_held_out(scene: Scene) -> bool:
    """Test for a Latin pattern: a seventh of the combinations; every pair of attributes stays in training."""
    background = list(BACKGROUNDS).index(scene.background)
    return any(
        (2 * SHAPES.index(figure.shape) + 3 * list(COLORS).index(figure.color) + background) % 7 == 0
        for figure in scene.figures
    )


def _own_slot(split: Split, number: int) -> int:
    """Return a slot id that is unique to the split: splits share a seed but no random numbers."""
    return 2 * number + (split == "held_out")


@functools.lru_cache(maxsize=4)
def _words(seed: int, slot: int) -> list[list[int]]:
    """Return two random integers per caption of a block; generating a block at once is fast."""
    return integers(seed, Purpose.CAPTION, slot, 2 * _WORDS_BLOCK).reshape(-1, 2).tolist()


@functools.lru_cache(maxsize=4)
def _scene_order(seed: int, slot: int, scenes: int) -> list[int]:
    return permutation(seed, Purpose.SCENE, slot, scenes).tolist()


@functools.cache
def _png(scene: Scene, pixels: int) -> bytes:
    """Encode a scene as PNG; cached, since scenes repeat with other captions."""
    with io.BytesIO() as file:
        Image.fromarray(render(scene, pixels)).save(file, format="PNG")
        return file.getvalue()
