import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqd_scale.core.config import Config, load_config, read_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_yaml import MAX_BYTES, format_yaml, parse_yaml


def nested_aliases(value: str, item: str) -> str:
    """Return YAML in which each of ten keys repeats the one before nine times."""
    lines = [f"k0: &k0 {value}"]
    lines += [f"k{n}: &k{n} {item.replace('*', f'*k{n - 1}')}" for n in range(1, 11)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (nested_aliases("x", f"[{', '.join(['*'] * 9)}]"), "with all aliases expanded"),
        (f"a: &a {'x' * 500_000}\nb: [*a, *a, *a]", "line 2, column .*: larger than 1,048,576 bytes"),
        (f"a: &a {{{'x' * 999}: 1}}\nb: [{'*a, ' * 2000}]", "with all aliases expanded"),
        (nested_aliases(f"{'[' * 40}{']' * 40}", f"{'[' * 40}*{']' * 40}"), "deeper than 50 levels"),
        ("a: &a [*a]", "the alias 'a' has no complete anchor before it"),
        ("[" * 1000, "line 1, column 52: nested deeper than 50 levels"),
        ("[" * MAX_BYTES, "nested deeper than 50 levels"),
        ("- " * 100_000, "nested deeper than 50 levels"),
        ("? " * 100_000, "nested deeper than 50 levels"),
        ("a: !!int abc", "line 1, column 4: the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("a: !!bool maybe", "the tag '.*bool' is not allowed"),
        ("!!map x", "the tag '.*map' is not allowed"),
        ("!!timestamp 2026-99-99", "the tag '.*timestamp' is not allowed"),
        ("!!binary x", "the tag '.*binary' is not allowed"),
        ("!mine x", "the tag '!mine' is not allowed"),
        ("a: 1\nb: 1:30", "line 2, column 4: '1:30' is no plain decimal number"),
        ("1:30.5", "'1:30.5' is no plain decimal number"),
        ("0100", "'0100' is no plain decimal number"),
        ("08", "'08' is no plain decimal number"),
        ("0x10", "'0x10' is no plain decimal number"),
        ("0b11", "'0b11' is no plain decimal number"),
        ("9" * 5000, "'9{40}' is no plain decimal number of at most 64 bits"),
        (str(2**63), "is no plain decimal number of at most 64 bits"),
        ("1e999", "'1e999' is no plain decimal number"),
        (".nan", "'.nan' is no plain decimal number"),
        (r'"\ud800"', "text with a NUL or a surrogate"),
        (r'"\0"', "text with a NUL or a surrogate"),
        (r'"\U00110000"', "line 1, column 4: .*not in range"),
        (f"%YAML 1.{'9' * 5000}\n--- a", "line 1, column 9"),
        ("a\n--- b", "line 2, column 1: a second document"),
        ("1: a", "the key 1 is not text; quote it"),
        ("[a]: b", r"the key \['a'\] is not text; quote it"),
        ("{a: 1, a: 2}", "line 1, column 8: the key 'a' is given twice"),
        ("\x1b", "unacceptable character"),
    ],
)
def test_hostile_yaml_is_refused_with_line_and_column(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("-9223372036854775807", -(2**63) + 1),
        ("'0100'", "0100"),
        ("2026-11-30", "2026-11-30"),
        ("=", "="),
        ("<<", "<<"),
        ("1.2.3", "1.2.3"),
        ("on", True),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_aliases_are_copies() -> None:
    values = parse_yaml("a: &x {k: [1]}\nb: *x\nc: &x 2\nd: *x")
    assert values == {"a": {"k": [1]}, "b": {"k": [1]}, "c": 2, "d": 2}
    values["a"]["k"].append(3)
    assert values["b"] == {"k": [1]}


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0")) | st.from_regex(
    re.compile(r"[-+.0-9_eE:xb]{1,6}", re.ASCII), fullmatch=True
)
scalars = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | texts
values = st.recursive(
    scalars | st.floats(allow_nan=False, allow_infinity=False),
    lambda items: st.lists(items) | st.dictionaries(texts, items),
)


@given(values)
def test_formatted_values_are_read_back(value: Any) -> None:
    assert repr(parse_yaml(format_yaml(value))) == repr(value)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "large.yaml"])
def test_devices_pipes_and_large_files_are_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match=f"{name}: the configuration file cannot be read"):
        read_yaml(tmp_path / name)


class Numbers(Config):
    integer: int = 1
    number: float = 1.0
    switch: bool = False
    text: str = ""
    folder: Path = Path("runs")
    kinds: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "override",
    [
        "integer=true",
        "integer='5'",
        "integer=1.0",
        "number=false",
        "number='5'",
        "switch=1",
        "switch='yes'",
        "text=5",
        "folder=5",
        "kinds=[1, true]",
        "kinds='12'",
    ],
)
def test_values_of_another_type_are_refused(override: str) -> None:
    key, _, text = override.partition("=")
    with pytest.raises(UserError, match=rf"{key}.*: given .*, allowed: ") as caught:
        load_config(Numbers, overrides=[override])
    assert repr(parse_yaml(text)).strip("[]").split(", ")[-1] in str(caught.value)


@pytest.mark.parametrize(
    "override", ["a." * 1000 + "b=1", "a\x1b[31m=1", "a\udc80=1", "a\0=1", "text=" + "x" * 10**7, "x" * 10**7]
)
def test_hostile_overrides_are_refused_in_one_printable_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(Numbers, overrides=[override])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
