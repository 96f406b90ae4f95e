"""Sample filters by metadata and caption, for third-party datasets."""

import re
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError

_LARGEST = sys.float_info.max


class Bounds(Config):
    """Closed range of numbers; a bound of ``null`` is open."""

    min: float | None = None
    """Smallest allowed number."""
    max: float | None = None
    """Largest allowed number."""

    def hold(self, number: float) -> bool:
        """Return whether a number lies within the bounds; false for nan if a bound is given."""
        return (self.min is None or number >= self.min) and (self.max is None or number <= self.max)

    @property
    def is_bounded(self) -> bool:
        """Flag for at least one given bound."""
        return self.min is not None or self.max is not None


class Filters(Config):
    """Sample filters; a sample must satisfy all conditions."""

    columns: dict[str, Bounds] = Field(default={})
    """Bounds of numeric columns, such as ``similarity``, ``punsafe``, ``pwatermark``, ``aesthetic``,
    ``width``, ``original_width``. A sample with a null value is rejected if the column has a bound."""
    labels: dict[str, tuple[str, ...]] = Field(default={})
    """Allowed values of text columns, such as ``NSFW``."""
    aspect: Bounds = Bounds()
    """Bounds of the ratio of longer to shorter side, from the columns ``width`` and ``height``."""
    words: Bounds = Bounds()
    """Bounds of the number of words in the caption."""
    any_of: tuple[str, ...] = ()
    """Words or phrases of which at least one must occur in the caption, case-insensitive."""
    none_of: tuple[str, ...] = ()
    """Words or phrases that must not occur in the caption, case-insensitive."""

    @property
    def read_metadata(self) -> bool:
        """Flag for conditions on metadata."""
        return bool(self.columns or self.labels or self.aspect.is_bounded)

    @property
    def read_caption(self) -> bool:
        """Flag for conditions on the caption."""
        return bool(self.any_of or self.none_of or self.words.is_bounded)

    def accept(self, metadata: Mapping[str, Any], caption: str) -> bool:
        """Return whether a sample passes all filters.

        Raises:
            UserError: A condition names a column that the metadata lack.
        """
        return (
            all(bounds.hold(_number(metadata, name)) for name, bounds in self.columns.items())
            and all(_column(metadata, name) in allowed for name, allowed in self.labels.items())
            and (not self.aspect.is_bounded or self.aspect.hold(_aspect(metadata)))
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
    # Integers in JSON have no bound.
    return value if isinstance(value, float) else float(max(min(value, _LARGEST), -_LARGEST))


def _aspect(metadata: Mapping[str, Any]) -> float:
    sides = sorted(_number(metadata, name) for name in ("width", "height"))
    return sides[1] / sides[0] if sides[0] > 0 else float("nan")


def _mentions(caption: str, phrases: tuple[str, ...]) -> bool:
    words = "|".join(re.escape(phrase) for phrase in phrases)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", caption, re.IGNORECASE) is not None
