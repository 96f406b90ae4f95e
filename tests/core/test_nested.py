from typing import Any

import pytest

from vqd_scale.core.nested import differences, leaves, set_at

TREE = {"a": {"b": 1, "c": {"d": None}}, "e": [{"f": 2}]}


def test_leaves_have_dotted_paths_and_lists_are_leaves() -> None:
    assert list(leaves(TREE)) == [("a.b", 1), ("a.c.d", None), ("e", [{"f": 2}])]
    assert list(leaves({})) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (TREE, []),
        ({}, [("a", TREE["a"], None), ("e", TREE["e"], None)]),
        (
            {"a": {"b": 2, "c": {"d": None}}, "e": [], "g": 0},
            [("a.b", 1, 2), ("e", TREE["e"], []), ("g", None, 0)],
        ),
        ({"a": {"b": 1, "c": 3}, "e": [{"f": 2}]}, [("a.c", {"d": None}, 3)]),
    ],
)
def test_differences_name_both_values(changed: dict[str, Any], expected: list[tuple[str, Any, Any]]) -> None:
    assert list(differences(TREE, changed)) == expected
    assert sorted(path for path, _, _ in differences(changed, TREE)) == [path for path, _, _ in expected]


def test_a_value_is_set_at_its_path() -> None:
    values: dict[str, Any] = {"a": {"b": 1}}
    set_at(values, "a.b", 2)
    set_at(values, "a.c.d", 3)
    set_at(values, "e", {})
    assert values == {"a": {"b": 2, "c": {"d": 3}}, "e": {}}
    with pytest.raises(ValueError, match="b holds the value 2, not further keys"):
        set_at(values, "a.b.c", 4)
