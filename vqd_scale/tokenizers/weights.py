"""Key conversion for published tokenizer weights: pure functions between state dictionaries.

This package uses the key names of VQ-GAN's authors. diffusers' ``VQModel`` is the same network with other
names. It numbers decoder blocks in data order; here 0 is the finest. Its attention has linear layers; here
they are 1x1 convolutions.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from vqd_scale.core.tensors import check_names

_RESIDUAL = ("norm1", "conv1", "norm2", "conv2")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_EARLIER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers' attention names at the time of the ITHQ model's publication, to the current names."""
_MOVING_AVERAGES = ("quantize.cluster_size", "quantize.embedding_avg")
_CODEBOOK = "quantize.embedding.weight"


class _Entry(NamedTuple):
    ours: str
    theirs: str
    is_linear: bool


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a `VQGAN` or `TamingVQ` to the names of diffusers' ``VQModel``.

    The autoencoder must have 1x1 convolutions at the codebook. ``VQModel`` has no EMA statistics, so they are
    dropped.

    Raises:
        UserError: Entries are unknown or missing; all are listed.
    """
    given = {name: value for name, value in state.items() if name not in _MOVING_AVERAGES}
    if "quantize.embedding" in given:
        given[_CODEBOOK] = given.pop("quantize.embedding")
    entries = list(_entries(_shape_of(given, "encoder.down.{}.block.{}.", "encoder.down.{}.attn.")))
    check_names(given, [entry.ours for entry in entries], "a VQ-GAN")
    return {
        entry.theirs: given[entry.ours][:, :, 0, 0].contiguous() if entry.is_linear else given[entry.ours]
        for entry in entries
    }


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of diffusers' ``VQModel``, current or older attention names, to a `TamingVQ`'s.

    Raises:
        UserError: Entries are unknown or missing; all are listed.
    """
    given = {_renewed(name): value for name, value in state.items()}
    pattern = "encoder.down_blocks.{}.resnets.{}.", "encoder.down_blocks.{}.attentions."
    entries = list(_entries(_shape_of(given, *pattern)))
    check_names(given, [entry.theirs for entry in entries], "diffusers' VQModel")
    return {
        entry.ours: given[entry.theirs].unsqueeze(-1).unsqueeze(-1)
        if entry.is_linear
        else given[entry.theirs]
        for entry in entries
    }


def from_taming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extract a tokenizer's state from its own checkpoint or from a transformer's (the first stage).

    Loss and transformer weights are dropped.
    """
    first_stage = "first_stage_model."
    if any(name.startswith(first_stage) for name in state):
        state = {
            name.removeprefix(first_stage): value
            for name, value in state.items()
            if name.startswith(first_stage)
        }
    return {name: value for name, value in state.items() if not name.startswith("loss.")}


class _Shape(NamedTuple):
    """Architecture parameters that determine the entries' names."""

    widths: list[tuple[int, int]]
    blocks: int
    attends: list[bool]


def _shape_of(state: Mapping[str, Tensor], block: str, attention: str) -> _Shape:
    """Infer the shape from the encoder's entries, which follow two name patterns.

    Inconsistent entries are later reported as missing.
    """
    pattern = re.compile(re.escape(block).replace(r"\{\}", r"(\d+)"))
    numbers = [tuple(map(int, found.groups())) for name in state if (found := pattern.match(name))]
    levels = len({level for level, _ in numbers})
    first = [state.get(block.format(level, 0) + "conv1.weight") for level in range(levels)]
    shapes = [() if weight is None else tuple(weight.shape[:2]) for weight in first]
    return _Shape(
        widths=[(shape[1], shape[0]) if len(shape) == 2 else (0, 0) for shape in shapes],
        blocks=len({number for _, number in numbers}),
        attends=[any(name.startswith(attention.format(level)) for name in state) for level in range(levels)],
    )


def _entries(shape: _Shape) -> Iterator[_Entry]:
    last = len(shape.widths) - 1
    for side in ("encoder", "decoder"):
        yield from _both(f"{side}.conv_in", f"{side}.conv_in")
        for number in range(2):
            yield from _residual(
                f"{side}.mid.block_{number + 1}", f"{side}.mid_block.resnets.{number}", has_shortcut=False
            )
        yield from _attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        yield from _both(f"{side}.norm_out", f"{side}.conv_norm_out")
        yield from _both(f"{side}.conv_out", f"{side}.conv_out")
    for level, (before, width) in enumerate(shape.widths):
        ours, theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _level(ours, theirs, shape.blocks, before != width, shape.attends[level])
        if level < last:
            yield from _both(f"{ours}.downsample.conv", f"{theirs}.downsamplers.0.conv")
        ours, theirs = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        coarser = shape.widths[min(level + 1, last)][1]
        yield from _level(ours, theirs, shape.blocks + 1, coarser != width, shape.attends[level])
        if level > 0:
            yield from _both(f"{ours}.upsample.conv", f"{theirs}.upsamplers.0.conv")
    yield from _both("quant_conv", "quant_conv")
    yield from _both("post_quant_conv", "post_quant_conv")
    yield _Entry(_CODEBOOK, _CODEBOOK, is_linear=False)


def _level(ours: str, theirs: str, blocks: int, widens: bool, attends: bool) -> Iterator[_Entry]:
    for number in range(blocks):
        yield from _residual(
            f"{ours}.block.{number}", f"{theirs}.resnets.{number}", has_shortcut=widens and number == 0
        )
        if attends:
            yield from _attention(f"{ours}.attn.{number}", f"{theirs}.attentions.{number}")


def _residual(ours: str, theirs: str, *, has_shortcut: bool) -> Iterator[_Entry]:
    for name in _RESIDUAL:
        yield from _both(f"{ours}.{name}", f"{theirs}.{name}")
    if has_shortcut:
        yield from _both(f"{ours}.nin_shortcut", f"{theirs}.conv_shortcut")


def _attention(ours: str, theirs: str) -> Iterator[_Entry]:
    for mine, their in _ATTENTION.items():
        yield _Entry(f"{ours}.{mine}.weight", f"{theirs}.{their}.weight", is_linear=mine != "norm")
        yield _Entry(f"{ours}.{mine}.bias", f"{theirs}.{their}.bias", is_linear=False)


def _both(ours: str, theirs: str) -> Iterator[_Entry]:
    for kind in ("weight", "bias"):
        yield _Entry(f"{ours}.{kind}", f"{theirs}.{kind}", is_linear=False)


def _renewed(name: str) -> str:
    head, dot, kind = name.rpartition(".")
    stem, _, part = head.rpartition(".")
    return f"{stem}.{_EARLIER[part]}{dot}{kind}" if part in _EARLIER else name
