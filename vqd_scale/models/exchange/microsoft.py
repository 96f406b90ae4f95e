"""Import of Microsoft's VQ-Diffusion checkpoints.

A checkpoint contains the network, CLIP's text tower, the tokenizer and the noise schedule. The architecture
is inferred from the weights, except for the number of attention heads. EMA weights are preferred over the
last training weights.
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
    # Unused causal masks; the noise schedule, checked separately; the state of importance sampling.
    r"transformer\.blocks\.\d+\.attn2\.mask",
    r"log_\w+",
    r"Lt_(history|count)",
    # CLIP's projection to one vector per caption; the network uses the features of all positions.
    r"condition_emb\.text_projection",
    # A copy of the codebook.
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
    """Import options that the file does not contain.

    Attributes:
        heads: Number of attention heads; 16 in every published model.
        grid: Token grid (rows, columns). Default: from the file's attention masks, or the tokenizer's grid
            for 256 x 256 pixels.
        no_caption: Null condition. Every newer file has a learned "no caption" embedding, but only models
            with ``learnable`` in their names use it. Default: learned if the file has the embedding.
        reduction: Map to fewer codes, for models with a reduced codebook.
        tokenizer: Tokenizer bundle, for files without a tokenizer.
    """

    heads: int = 16
    grid: tuple[int, int] | None = None
    no_caption: Literal["learned", "empty"] | None = None
    reduction: Path | None = None
    tokenizer: Path | None = None


def plan_microsoft(path: Path, options: MicrosoftOptions) -> Plan:
    """Plan the import of a ``.pth`` file with a model, or with only a tokenizer.

    Raises:
        UserError: The file is missing, damaged, or not a VQ-Diffusion checkpoint; or an option is missing.
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
    """Return the network's EMA weights (else its training weights) and all weights outside it."""
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
    """Return the shape of a weight that is required to infer the architecture."""
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
    """Infer the token grid from the cross-attention masks, or from the tokenizer at 256 x 256 pixels."""
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
        # ImageNet's 1,000 classes, plus a null row if the model was trained for classifier-free guidance.
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
    """Return the released noise schedule; the file's own tables must match it."""
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
