"""Key conversion for published tokenizer weights: pure functions between state dictionaries.

This package uses the key names of VQ-GAN's authors. diffusers' ``VQModel`` is the same network with other
names. It numbers decoder blocks in data order; here 0 is the finest. Its attention has linear layers; here
they are 1x1 convolutions.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from vqd_scale.core.tensors import check_names, without_prefix

_RESIDUAL = ("norm1", "conv1", "norm2", "conv2")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""diffusers' attention names at the time of the ITHQ model's publication, to the current names."""
_LINEAR = re.compile(r".+\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")
"""Names of diffusers' linear layers that are 1x1 convolutions here."""
_MOVING_AVERAGES = ("quantize.cluster_size", "quantize.embedding_avg")
_CODEBOOK = "quantize.embedding.weight"


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a `VQGAN` or `TamingVQ` to the names of diffusers' ``VQModel``.

    The autoencoder must have 1x1 convolutions at the codebook. ``VQModel`` has no EMA statistics, so they are
    dropped.

    Raises:
        UserError: Entries are unknown or missing; all are listed.
    """
    weights = {name: value for name, value in state.items() if name not in _MOVING_AVERAGES}
    if "quantize.embedding" in weights:
        weights[_CODEBOOK] = weights.pop("quantize.embedding")
    names = dict(_names(_shape_of(weights, "encoder.down.{}.block.{}.", "encoder.down.{}.attn.")))
    check_names(weights, names, "a VQ-GAN")
    return {
        target: weights[name][:, :, 0, 0].contiguous() if _LINEAR.fullmatch(target) else weights[name]
        for name, target in names.items()
    }


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of diffusers' ``VQModel``, current or older attention names, to a `TamingVQ`'s.

    Raises:
        UserError: Entries are unknown or missing; all are listed.
    """
    weights = {_current_name(name): value for name, value in state.items()}
    pattern = "encoder.down_blocks.{}.resnets.{}.", "encoder.down_blocks.{}.attentions."
    names = dict(_names(_shape_of(weights, *pattern)))
    check_names(weights, names.values(), "diffusers' VQModel")
    return {
        name: weights[source][:, :, None, None] if _LINEAR.fullmatch(source) else weights[source]
        for name, source in names.items()
    }


def from_taming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extract a tokenizer's state from its own checkpoint or from a transformer's (the first stage).

    Loss and transformer weights are dropped.
    """
    weights = without_prefix(state, "first_stage_model.") or state
    return {name: value for name, value in weights.items() if not name.startswith("loss.")}


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
    numbers = [tuple(map(int, match.groups())) for name in state if (match := pattern.match(name))]
    levels = len({level for level, _ in numbers})
    first = [state.get(block.format(level, 0) + "conv1.weight") for level in range(levels)]
    shapes = [() if weight is None else tuple(weight.shape[:2]) for weight in first]
    return _Shape(
        widths=[(shape[1], shape[0]) if len(shape) == 2 else (0, 0) for shape in shapes],
        blocks=len({number for _, number in numbers}),
        attends=[any(name.startswith(attention.format(level)) for name in state) for level in range(levels)],
    )


def _names(shape: _Shape) -> Iterator[tuple[str, str]]:
    """Return the name here and the name in diffusers of every weight."""
    last = len(shape.widths) - 1
    for side in ("encoder", "decoder"):
        yield from _weight_and_bias(f"{side}.conv_in", f"{side}.conv_in")
        for number in range(2):
            block = f"{side}.mid.block_{number + 1}"
            yield from _residual(block, f"{side}.mid_block.resnets.{number}", has_shortcut=False)
        yield from _attention(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        yield from _weight_and_bias(f"{side}.norm_out", f"{side}.conv_norm_out")
        yield from _weight_and_bias(f"{side}.conv_out", f"{side}.conv_out")
    for level, (in_width, width) in enumerate(shape.widths):
        taming, diffusers = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        yield from _level(taming, diffusers, shape.blocks, in_width != width, shape.attends[level])
        if level < last:
            yield from _weight_and_bias(f"{taming}.downsample.conv", f"{diffusers}.downsamplers.0.conv")
        taming, diffusers = f"decoder.up.{level}", f"decoder.up_blocks.{last - level}"
        coarser = shape.widths[min(level + 1, last)][1]
        yield from _level(taming, diffusers, shape.blocks + 1, coarser != width, shape.attends[level])
        if level > 0:
            yield from _weight_and_bias(f"{taming}.upsample.conv", f"{diffusers}.upsamplers.0.conv")
    yield from _weight_and_bias("quant_conv", "quant_conv")
    yield from _weight_and_bias("post_quant_conv", "post_quant_conv")
    yield _CODEBOOK, _CODEBOOK


def _level(
    taming: str, diffusers: str, blocks: int, has_shortcut: bool, attends: bool
) -> Iterator[tuple[str, str]]:
    for number in range(blocks):
        changes_width = has_shortcut and number == 0
        yield from _residual(
            f"{taming}.block.{number}", f"{diffusers}.resnets.{number}", has_shortcut=changes_width
        )
        if attends:
            yield from _attention(f"{taming}.attn.{number}", f"{diffusers}.attentions.{number}")


def _residual(taming: str, diffusers: str, *, has_shortcut: bool) -> Iterator[tuple[str, str]]:
    for name in _RESIDUAL:
        yield from _weight_and_bias(f"{taming}.{name}", f"{diffusers}.{name}")
    if has_shortcut:
        yield from _weight_and_bias(f"{taming}.nin_shortcut", f"{diffusers}.conv_shortcut")


def _attention(taming: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for taming_part, diffusers_part in _ATTENTION.items():
        yield from _weight_and_bias(f"{taming}.{taming_part}", f"{diffusers}.{diffusers_part}")


def _weight_and_bias(taming: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for kind in ("weight", "bias"):
        yield f"{taming}.{kind}", f"{diffusers}.{kind}"


def _current_name(name: str) -> str:
    head, dot, kind = name.rpartition(".")
    stem, _, part = head.rpartition(".")
    return f"{stem}.{_OLD_ATTENTION[part]}{dot}{kind}" if part in _OLD_ATTENTION else name
