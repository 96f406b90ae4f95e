"""Which samples of somebody else's set are wanted, by what their metadata say."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError


class Bounds(Config):
    """A range of numbers, both ends included; what is not given is not bounded."""

    min: float | None = None
    max: float | None = None

    def hold(self, number: float) -> bool:
        """Whether a number lies within; nan lies nowhere."""
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return self.min is not None or self.max is not None


class Filters(Config):
    """Which samples are wanted; all conditions must hold.

    Attributes:
        columns: Bounds of any numeric column, such as ``similarity``, ``punsafe``, ``pwatermark``,
            ``aesthetic``, ``width``, ``original_width``; a sample whose column is null is not wanted.
        labels: Allowed values of any text column, such as ``NSFW``.
        aspect: Bounds of the longer over the shorter side, from the columns ``width`` and ``height``.
        words: Bounds of the number of words of the caption.
        any_of: At least one of these must occur in the caption as a word or phrase, in any case.
        none_of: None of these may.
    """

    columns: dict[str, Bounds] = Field(default={})
    labels: dict[str, tuple[str, ...]] = Field(default={})
    aspect: Bounds = Bounds()
    words: Bounds = Bounds()
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()

    @property
    def read_metadata(self) -> bool:
        """Whether a sample's metadata are needed."""
        return bool(self.columns or self.labels or self.aspect.given)

    @property
    def read_caption(self) -> bool:
        """Whether a sample's caption is needed."""
        return bool(self.any_of or self.none_of or self.words.given)

    def accept(self, metadata: Mapping[str, Any], caption: str) -> bool:
        """Whether a sample is wanted.

        Raises:
            UserError: A condition is about a column that the metadata do not have.
        """
        return (
            all(bounds.hold(_number(metadata, name)) for name, bounds in self.columns.items())
            and all(_column(metadata, name) in allowed for name, allowed in self.labels.items())
            and (not self.aspect.given or self.aspect.hold(_aspect(metadata)))
            and self.words.hold(len(caption.split()))
            and (not self.any_of or _mentions(caption, self.any_of))
            and not (self.none_of and _mentions(caption, self.none_of))
        )


def _column(metadata: Mapping[str, Any], name: str) -> object:
    if name not in metadata:
        raise UserError(
            f"filters: this set has no column '{name}'; it has {', '.join(sorted(metadata)) or 'none'}."
        )
    return metadata[name]


def _number(metadata: Mapping[str, Any], name: str) -> float:
    value = _column(metadata, name)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"filters.columns.{name}: holds {value!r}, no number; use filters.labels.")
    return float(value)


def _aspect(metadata: Mapping[str, Any]) -> float:
    sides = sorted(_number(metadata, name) for name in ("width", "height"))
    return sides[1] / sides[0] if sides[0] > 0 else float("nan")


def _mentions(caption: str, phrases: tuple[str, ...]) -> bool:
    words = "|".join(re.escape(phrase) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", caption, re.IGNORECASE) is not None
