"""Checkpoints of Microsoft's VQ-Diffusion: everything but the heads' number can be read off the weights.

They hold the network, CLIP's text tower, the tokenizer and the schedule. The moving average of the weights
stands beside the weights last trained, and is what is taken.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_load import read_saved, tensors_in
from vqd_scale.diffusion.schedule import Released
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.models.bundle import BundleConfig, load_tokenizer
from vqd_scale.models.exchange.autoencoders import autoencoder_config
from vqd_scale.models.exchange.conversion import (
    MODEL,
    TOKENIZER,
    ModelPlan,
    Plan,
    TokenizerPlan,
    wanted_tokenizer,
    wanted_weights,
)
from vqd_scale.models.exchange.key_mapping import Exchange, Prefixes, part_of, under
from vqd_scale.nn.denoiser import ClassCondition, Condition, DenoiserConfig, NoCondition, TextCondition
from vqd_scale.nn.layers import Convolutional, FeedForwardConfig, FullyConnected
from vqd_scale.text.clip import CaptionTokenizer, Tower
from vqd_scale.tokenizers.codebook.reduction import check_map, read_map
from vqd_scale.tokenizers.registry import ReducedConfig, TokenizerConfig

_NETWORK = "transformer."
_TEXT = "condition_emb."
_NULL = "empty_text_embed"
_CODEC = "content_codec."
_MAP = "reduction map"

_OURS = Prefixes(
    ("denoiser.content_emb.", "transformer.content_emb."),
    ("denoiser.blocks.*.attn1.", "transformer.blocks.*.attn."),
    ("denoiser.blocks.*.mlp.0.", "transformer.blocks.*.mlp.conv1."),
    ("denoiser.blocks.*.mlp.2.", "transformer.blocks.*.mlp.conv2."),
    ("denoiser.blocks.", "transformer.blocks."),
    ("denoiser.norm.", "transformer.to_logits.0."),
    ("denoiser.head.", "transformer.to_logits.1."),
    ("text.tower.", _TEXT),
    ("text.null", _NULL),
)
_CODEC_OURS = Prefixes(
    ("", "enc."), ("decoder.", "dec.decoder."), ("post_quant_conv.", "dec.post_quant_conv.")
)
_DROPPED: Sequence[str] = (
    # Causal masks that no attention reads; the schedule, which is checked; what importance sampling learned.
    r"transformer\.blocks\.\d+\.attn2\.mask",
    r"log_\w+",
    r"Lt_(history|count)",
    # CLIP's way to one vector for a caption: here each position counts.
    r"condition_emb\.text_projection",
    # The same codebook again.
    r"content_codec\.dec\.quantize\..+",
)
_TOLERANCE = 1e-3
_HEAD_WIDTH_OF_CLIP = 64
_IMAGENET_WITH_NULL = 1001
_PIXELS = 256

_ORIGIN = (
    "Converted from Microsoft's VQ-Diffusion checkpoint '{name}'; its code is under the MIT licence, the "
    "licence of the weights is that under which they were published."
)


@dataclass(frozen=True)
class MicrosoftOptions:
    """What the file does not say.

    Attributes:
        heads: Attention heads; 16 in every published model.
        grid: Rows and columns of tokens; if not given, as the file has masks for, or what its tokenizer makes
            of 256 x 256 pixels.
        no_caption: Whether the learned embedding of "no caption" was trained; every newer file has one, only
            the models with ``learnable`` in their names use it. If not given: where there is one.
        reduction: The map of the codebook to fewer codes, for models of a reduced one.
        tokenizer: A tokenizer's bundle, for files without one.
    """

    heads: int = 16
    grid: tuple[int, int] | None = None
    no_caption: Literal["learned", "empty"] | None = None
    reduction: Path | None = None
    tokenizer: Path | None = None


def plan_microsoft(path: Path, options: MicrosoftOptions) -> Plan:
    """What a ``.pth`` file holds: a model, or a tokenizer by itself.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint of VQ-Diffusion; or an option is needed.
    """
    found = _weights_in(path)
    if "encoder.conv_in.weight" in found:
        shape = autoencoder_config(found, str(path))
        return TokenizerPlan(shape, Exchange(str(path), found, wanted_tokenizer(shape), dict, [r"loss\..+"]))
    codes, width = _table(found, f"{_NETWORK}content_emb.emb.weight", path)
    tokenizer = _tokenizer(found, codes - 1, options, path)
    if options.reduction is not None and isinstance(tokenizer, ReducedConfig):
        found[_MAP] = read_map(options.reduction)
        check_map(found[_MAP], len(found[_MAP]), codes - 1, str(options.reduction))
    grid = options.grid or _grid(found, tokenizer)
    rows, columns = (
        _table(found, f"{_NETWORK}content_emb.{side}_emb.weight", path)[0] for side in ("height", "width")
    )
    condition = _condition(found)
    no_caption = options.no_caption or ("learned" if _NULL in found else "empty")
    config = BundleConfig(
        codebook_size=codes - 1,
        grid=grid,
        denoiser=DenoiserConfig(
            width=width,
            heads=options.heads,
            layers=_count(found, rf"{_NETWORK}blocks\.(\d+)\."),
            feed_forward=_feed_forward(found, width),
            condition=condition,
            timestep_embedding="learned" if f"{_NETWORK}blocks.0.ln1.emb.weight" in found else "sinusoidal",
            position_grid=None if (rows, columns) == grid else (rows, columns),
        ),
        text=_tower(found, no_caption, path) if isinstance(condition, TextCondition) else None,
        diffusion=_schedule(found, codes - 1, path),
        origin=_ORIGIN.format(name=path.name),
    )
    dropped = list(_DROPPED)
    if config.text is None or no_caption == "empty":
        dropped.append(_NULL)
    if options.tokenizer is not None:
        dropped.append(r"content_codec\..+")
    exchange = Exchange(str(path), found, wanted_weights(config, tokenizer), _to_ours, dropped)
    return ModelPlan(config, tokenizer, exchange)


def _weights_in(path: Path) -> dict[str, Tensor]:
    """What is of use: the moving average where there is one, and all that stands beside the network."""
    loaded = read_saved(path)
    checkpoint = cast(Mapping[str, object], loaded) if isinstance(loaded, Mapping) else {}
    last, average = tensors_in(checkpoint.get("model")), tensors_in(checkpoint.get("ema"))
    if not last and not average:
        raise UserError(f"{path}: holds neither 'ema' nor 'model' as VQ-Diffusion's checkpoints do.")
    if "encoder.conv_in.weight" in last:
        return last
    return (average or part_of(last, "transformer.")) | {
        name: tensor for name, tensor in last.items() if not name.startswith("transformer.")
    }


def _to_ours(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tokenizer = _CODEC_OURS.to_ours(part_of(found, _CODEC))
    if _MAP in found:
        tokenizer = {**under("full.", tokenizer), "map": found[_MAP]}
    return under(MODEL, _OURS.to_ours(found)) | under(TOKENIZER, tokenizer)


def _table(found: Mapping[str, Tensor], name: str, path: Path) -> list[int]:
    """The shape of a weight without which nothing of the network is known."""
    if name not in found:
        raise UserError(f"{path}: has no weight '{name}' as VQ-Diffusion's checkpoints do.")
    return list(found[name].shape)


def _count(found: Mapping[str, Tensor], pattern: str) -> int:
    numbers = [re.match(pattern, name) for name in found]
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def _tokenizer(
    found: Mapping[str, Tensor], codes: int, options: MicrosoftOptions, path: Path
) -> TokenizerConfig | Path:
    if options.tokenizer is not None and options.reduction is not None:
        raise UserError("give --tokenizer or --reduction, not both: a tokenizer's bundle holds its own map.")
    if options.tokenizer is not None:
        return options.tokenizer
    state = _CODEC_OURS.to_ours(part_of(found, _CODEC))
    if not state:
        raise UserError(f"{path}: holds no tokenizer; name the bundle of one with --tokenizer.")
    full = autoencoder_config(state, str(path))
    if options.reduction is not None:
        return ReducedConfig(codebook_size=codes, full=full)
    if full.codebook_size != codes:
        raise UserError(
            f"{path}: the network has {codes} codes, but the tokenizer {full.codebook_size}; name the map "
            "from these to those with --reduction (taming_vqvae_2887.pt or taming_vqvae_974.pt, "
            "published beside it)."
        )
    return full


def _grid(found: Mapping[str, Tensor], tokenizer: TokenizerConfig | Path) -> tuple[int, int]:
    """As many tokens as the masks of cross-attention have; or those of a picture of 256 x 256."""
    mask = found.get(f"{_NETWORK}blocks.0.attn2.mask")
    if mask is not None:
        side = math.isqrt(mask.shape[-1])
    elif isinstance(tokenizer, Path):
        side = _PIXELS // load_tokenizer(tokenizer, torch.device("cpu")).factor
    else:
        side = _PIXELS // (tokenizer.full if isinstance(tokenizer, ReducedConfig) else tokenizer).factor
    return side, side


def _condition(found: Mapping[str, Tensor]) -> Condition:
    block = f"{_NETWORK}blocks.0."
    if f"{block}attn2.key.weight" in found:
        return TextCondition(width=found[f"{block}attn2.key.weight"].shape[1])
    if f"{block}ln2.emb.weight" in found:
        rows = found[f"{block}ln2.emb.weight"].shape[0]
        # ImageNet's 1,000 classes and, where the model was trained for guidance, a row for none of them.
        is_learned = rows == _IMAGENET_WITH_NULL
        return ClassCondition(classes=rows - is_learned, null="learned" if is_learned else "mean")
    return NoCondition()


def _feed_forward(found: Mapping[str, Tensor], width: int) -> FeedForwardConfig:
    convolution = found.get(f"{_NETWORK}blocks.0.mlp.conv1.weight")
    if convolution is not None:
        return Convolutional(mlp_ratio=convolution.shape[0] // width)
    linear = found.get(f"{_NETWORK}blocks.0.mlp.0.weight")
    return FullyConnected() if linear is None else FullyConnected(mlp_ratio=linear.shape[0] // width)


def _tower(found: Mapping[str, Tensor], no_caption: Literal["learned", "empty"], path: Path) -> Tower:
    vocabulary, width = _table(found, f"{_TEXT}token_embedding.weight", path)
    return Tower(
        context_length=_table(found, f"{_TEXT}positional_embedding", path)[0],
        width=width,
        heads=max(1, width // _HEAD_WIDTH_OF_CLIP),
        layers=_count(found, rf"{_TEXT}transformer\.resblocks\.(\d+)\."),
        bpe_merges=vocabulary - CaptionTokenizer(merges=0).vocabulary,
        null_condition=no_caption,
    )


def _schedule(found: Mapping[str, Tensor], codes: int, path: Path) -> Released:
    """The released schedule, if the file's own tables say so."""
    steps = _table(found, "log_at", path)[0]
    schedule = Released(steps=steps)
    chances = MaskAndReplace(schedule, codes).rates.at(torch.arange(steps))
    for ours, name in ((chances.keep, "log_cumprod_at"), (chances.mask, "log_cumprod_ct")):
        if _table(found, name, path)[0] != steps + 1 or not torch.allclose(
            found[name][:steps].double(), ours.log(), rtol=0, atol=_TOLERANCE
        ):
            raise UserError(
                f"{path}: was trained under another schedule than the released one ({name} differs), and "
                "sampling under the released one would give pictures of no meaning."
            )
    return schedule
