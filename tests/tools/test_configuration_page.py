"""``docs/configuration.md`` is what the code generates, and every key has a description."""

import re
from typing import Annotated, Literal

import pytest
import yaml
from _configuration_page import PAGE, descriptions, page
from pydantic import Discriminator, Field, PositiveInt, Tag

from vqd_scale.core.config import Config, kind_or


def subclasses(config: type[Config]) -> list[type[Config]]:
    return [each for subclass in config.__subclasses__() for each in (subclass, *subclasses(subclass))]


# Private classes are shapes of files of others.
CONFIGS = [
    config
    for config in subclasses(Config)
    if config.__module__.startswith("vqd_scale.") and not config.__name__.startswith("_")
]


def test_page_is_what_the_code_generates() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: make docs"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_is_described_and_needs_no_quotes_in_yaml(config: type[Config]) -> None:
    texts = descriptions(config)
    assert [name for name in config.model_fields if name != "kind" and not texts.get(name)] == []
    assert "Attributes:" not in (config.__doc__ or "")
    assert [name for name in config.model_fields if yaml.safe_load(name) != name] == []


def test_links_have_one_target_and_lines_fit() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^### (\w+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings)) > 50
    assert set(re.findall(r"\(#(\w+)\)", text)) == {heading.lower() for heading in headings}
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


class Leaf(Config):
    """Nested keys."""

    kind: Literal["leaf"] = "leaf"
    size: PositiveInt | None = Field(default=None, le=9)
    """Size, in
    ``tokens``."""


class Twig(Config):
    """Another kind."""

    kind: Literal["twig"] = "twig"


class Tree(Config):
    """Root."""

    leaf: Annotated[
        Annotated[Leaf, Tag("leaf")] | Annotated[Twig, Tag("twig")], Discriminator(kind_or("leaf"))
    ] = Leaf(size=3)
    """First | last."""
    children: tuple[Leaf, ...]
    """All leaves."""


def test_table_has_types_defaults_and_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("_configuration_page.TOOLS", {"grow": ("Grows a tree", (Tree,))})
    table = "| key | type or values | default | description |\n|---|---|---|---|\n"
    assert page().partition("## grow\n")[2] == (
        "\nGrows a tree: [Tree](#tree).\n\n### Tree\n\nRoot.\n\n"
        + table
        + '| `leaf` | [Leaf](#leaf) or [Twig](#twig) | `{"kind": "leaf", "size": 3}` | First \\| last. |\n'
        "| `children` | list of [Leaf](#leaf) | required | All leaves. |\n\n"
        "### Leaf\n\n`kind: leaf`. Nested keys.\n\n"
        + table
        + "| `size` | integer > 0, ≤ 9 or `null` | `null` | Size, in `tokens`. |\n\n"
        "### Twig\n\n`kind: twig`. Another kind.\n"
    )
