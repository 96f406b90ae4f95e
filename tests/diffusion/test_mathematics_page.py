"""The page of formulas: its names exist, and its equations are numbered consecutively."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "maths.md").read_text(encoding="utf-8")
MODULES = (
    "schedule",
    "transition",
    "timestep_sampler",
    "objective",
    "guidance",
    "samplers",
    "unmasking",
    "sampling_plan",
    "config",
)


def resolves(name: str) -> bool:
    """Return whether a dotted name exists in the `diffusion` folder or in `reference`."""
    first, *remaining_parts = name.split(".")
    if first == "reference":
        places = [import_module("tests.diffusion.reference")]
    elif remaining_parts and (Path(__file__).parents[2] / "vqd_scale" / "diffusion" / f"{first}.py").exists():
        places = [import_module(f"vqd_scale.diffusion.{first}")]
    else:
        places, remaining_parts = (
            [import_module(f"vqd_scale.diffusion.{module}") for module in MODULES],
            [first, *remaining_parts],
        )
    for place in places:
        target: object = place
        for part in remaining_parts:
            fields = getattr(target, "model_fields", {}) | getattr(target, "__dataclass_fields__", {})
            target = fields[part] if part in fields else getattr(target, part, None)
        if target is not None:
            return True
    return False


@pytest.mark.parametrize(
    "name", ["MaskAndReplace.posterior", "timestep_sampler.Importance", "objective._KLTerms.divergence"]
)
def test_names_resolve(name: str) -> None:
    assert resolves(name)
    assert not resolves(name + "s")


def test_every_documented_function_exists() -> None:
    code = {
        name
        for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\([a-z]*\))?`", PAGE)
        if ("." in name or name[0].isupper()) and not name.startswith(("kernels.", "rng."))
    }
    assert len(code) > 30
    assert [
        name for name in sorted(code - {"MaskAndReplace.codes", "MaskAndReplace.mask"}) if not resolves(name)
    ] == []


def test_equations_are_numbered_consecutively() -> None:
    numbers = [int(number) for number in re.findall(r"^ {4}\S.* \((\d+)\)$", PAGE, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 13
