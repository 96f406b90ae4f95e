"""Nested mappings of plain values, with dotted paths such as ``a.b.c``."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from vqd_scale.core.safe_yaml import MAX_DEPTH


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values that are not mappings with their dotted paths, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(cast(Mapping[str, Any], value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401 - plain values
    """Yield dotted path and both values wherever two trees differ; a missing value is None."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        values = cast(tuple[Mapping[str, Any], ...], (first, second))
        for key in {**values[1], **values[0]}:
            yield from differences(values[0].get(key), values[1].get(key), f"{path}.{key}" if path else key)
    elif first != second:
        yield path, first, second


def set_at(values: dict[str, Any], path: str, value: Any) -> None:  # noqa: ANN401 - plain values
    """Set the value at a dotted path; missing mappings are created.

    Raises:
        ValueError: The path is empty, too deep or unprintable, or a part of it is not a mapping.
    """
    *parents, last = keys = path.split(".")
    if not all(keys) or not path.isprintable() or len(keys) > MAX_DEPTH:
        raise ValueError(f"expected key.subkey=value, with at most {MAX_DEPTH} keys")
    for key in parents:
        child = values.setdefault(key, {})
        if not isinstance(child, dict):
            raise ValueError(f"{key} holds the value {child!r:.200}, not further keys")
        values = cast(dict[str, Any], child)
    values[last] = value
