"""Import of Microsoft's VQ-Diffusion checkpoints.

A checkpoint contains the network, CLIP's text tower, the tokenizer and the noise schedule. The architecture
is inferred from the weights, except for the number of attention heads. EMA weights are preferred over the
last training weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_load import read_saved, tensors_in
from vqd_scale.core.tensors import with_prefix, without_prefix
from vqd_scale.diffusion.config import Released
from vqd_scale.diffusion.transition import MaskAndReplace
from vqd_scale.models.bundle import load_tokenizer
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.autoencoders import autoencoder_config
from vqd_scale.models.exchange.conversion import (
    MODEL,
    TOKENIZER,
    ModelPlan,
    Plan,
    TokenizerPlan,
    expected_shapes,
    model_weights,
    tokenizer_weights,
)
from vqd_scale.models.exchange.key_mapping import Exchange, Prefixes, count_numbered
from vqd_scale.nn.config import (
    ClassCondition,
    Condition,
    Convolutional,
    DenoiserConfig,
    FeedForwardConfig,
    FullyConnected,
    NoCondition,
    TextCondition,
)
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.codebook.reduction import check_map, read_map
from vqd_scale.tokenizers.config import ReducedConfig, TokenizerConfig

_NETWORK = "transformer."
_TEXT = "condition_emb."
_NULL = "empty_text_embed"
_CODEC = "content_codec."
_MAP = "reduction map"

_MODEL_PREFIXES = Prefixes(
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
_CODEC_PREFIXES = Prefixes(
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
    "Converted from Microsoft's VQ-Diffusion checkpoint '{name}'; its code is under the MIT license, the "
    "license of the weights is that under which they were published."
)


@dataclass(frozen=True)
class MicrosoftOptions:
    """Import options that the file does not contain.

    Attributes:
        heads: Number of attention heads; 16 in every published model.
        grid: Token grid (rows, columns). Default: from the file's attention masks, or the tokenizer's grid
            for 256 x 256 pixels.
        null_condition: Null condition. Every newer file has a learned "no caption" embedding, but only models
            with ``learnable`` in their names use it. Default: learned if the file has the embedding.
        reduction: Map to fewer codes, for models with a reduced codebook.
        tokenizer: Tokenizer bundle, for files without a tokenizer.
    """

    heads: int = 16
    grid: tuple[int, int] | None = None
    null_condition: Literal["learned", "empty"] | None = None
    reduction: Path | None = None
    tokenizer: Path | None = None


def plan_microsoft(path: Path, options: MicrosoftOptions) -> Plan:
    """Plan the import of a ``.pth`` file with a model, or with only a tokenizer.

    Raises:
        UserError: The file is missing, damaged, or not a VQ-Diffusion checkpoint; or an option is missing or
            does not fit.
    """
    weights = _weights_in(path)
    with expected_shapes(str(path)):
        return _plan(weights, path, options)


def _plan(weights: dict[str, Tensor], path: Path, options: MicrosoftOptions) -> Plan:
    if "encoder.conv_in.weight" in weights:
        shape = autoencoder_config(weights, str(path))
        return TokenizerPlan(
            shape, Exchange(str(path), weights, tokenizer_weights(shape, str(path)), dict, [r"loss\..+"])
        )
    codes, width = _table(weights, f"{_NETWORK}content_emb.emb.weight", path)
    tokenizer = _tokenizer(weights, codes - 1, options, path)
    if options.reduction is not None and isinstance(tokenizer, ReducedConfig):
        weights[_MAP] = read_map(options.reduction)
        check_map(weights[_MAP], len(weights[_MAP]), codes - 1, str(options.reduction))
    rows, columns = (
        _table(weights, f"{_NETWORK}content_emb.{side}_emb.weight", path)[0] for side in ("height", "width")
    )
    grid = options.grid or _grid(weights, (rows, columns), tokenizer, path)
    condition = _condition(weights)
    null_condition = options.null_condition or ("learned" if _NULL in weights else "empty")
    config = BundleConfig(
        codebook_size=codes - 1,
        grid=grid,
        denoiser=DenoiserConfig(
            width=width,
            heads=options.heads,
            layers=count_numbered(weights, rf"{_NETWORK}blocks\.(\d+)\."),
            feed_forward=_feed_forward(weights, width),
            condition=condition,
            timestep_embedding="learned" if f"{_NETWORK}blocks.0.ln1.emb.weight" in weights else "sinusoidal",
            position_grid=None if (rows, columns) == grid else (rows, columns),
        ),
        text=_tower(weights, null_condition, path) if isinstance(condition, TextCondition) else None,
        diffusion=_schedule(weights, codes - 1, path),
        origin=_ORIGIN.format(name=path.name),
    )
    dropped = list(_DROPPED)
    if config.text is None or null_condition == "empty":
        dropped.append(_NULL)
    if options.tokenizer is not None:
        dropped.append(r"content_codec\..+")
    exchange = Exchange(str(path), weights, model_weights(config, tokenizer, str(path)), _convert, dropped)
    return ModelPlan(config, tokenizer, exchange)


def _weights_in(path: Path) -> dict[str, Tensor]:
    """Return the network's EMA weights (else its training weights) and all weights outside it.

    The file contains ``model`` and ``ema``, or is itself a state dictionary, also one of safetensors.
    """
    saved = read_saved(path)
    checkpoint = cast(Mapping[str, object], saved) if isinstance(saved, Mapping) else {}
    last, average = tensors_in(checkpoint.get("model")), tensors_in(checkpoint.get("ema"))
    if not last and not average:
        last = tensors_in(saved)
    if not last and not average:
        raise UserError(f"{path}: contains neither 'ema' nor 'model', as VQ-Diffusion's checkpoints do.")
    if "encoder.conv_in.weight" in last or f"{_NETWORK}content_emb.emb.weight" in last:
        return last
    return (average or without_prefix(last, _NETWORK)) | {
        name: tensor for name, tensor in last.items() if not name.startswith(_NETWORK)
    }


def _convert(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tokenizer = _CODEC_PREFIXES.from_foreign(without_prefix(weights, _CODEC))
    if _MAP in weights:
        tokenizer = {**with_prefix("full.", tokenizer), "map": weights[_MAP]}
    return with_prefix(MODEL, _MODEL_PREFIXES.from_foreign(weights)) | with_prefix(TOKENIZER, tokenizer)


def _table(weights: Mapping[str, Tensor], name: str, path: Path) -> list[int]:
    """Return the shape of a weight that is required to infer the architecture."""
    if name not in weights:
        raise UserError(f"{path}: has no weight '{name}' as VQ-Diffusion's checkpoints do.")
    return list(weights[name].shape)


def _tokenizer(
    weights: Mapping[str, Tensor], codes: int, options: MicrosoftOptions, path: Path
) -> TokenizerConfig | Path:
    if options.tokenizer is not None and options.reduction is not None:
        raise UserError("give --tokenizer or --reduction, not both: a tokenizer bundle contains its own map.")
    if options.tokenizer is not None:
        return options.tokenizer
    state = _CODEC_PREFIXES.from_foreign(without_prefix(weights, _CODEC))
    if not state:
        raise UserError(f"{path}: contains no tokenizer; give a tokenizer bundle with --tokenizer.")
    full = autoencoder_config(state, str(path))
    if options.reduction is not None:
        return ReducedConfig(codebook_size=codes, full=full)
    if full.codebook_size != codes:
        raise UserError(
            f"{path}: the network has {codes} codes, but the tokenizer {full.codebook_size}; give the map "
            "from the tokenizer's codes to the network's with --reduction (taming_vqvae_2887.pt or "
            "taming_vqvae_974.pt, published beside the checkpoint)."
        )
    return full


def _grid(
    weights: Mapping[str, Tensor], tables: tuple[int, int], tokenizer: TokenizerConfig | Path, path: Path
) -> tuple[int, int]:
    """Infer the token grid from the cross-attention masks, or from the tokenizer at 256 x 256 pixels.

    The position tables may be larger than the grid, so only a square grid can be inferred without a doubt, or
    one that fills the tables.
    """
    mask = weights.get(f"{_NETWORK}blocks.0.attn2.mask")
    length = None if mask is None else mask.shape[-1]
    if length == math.prod(tables):
        return tables
    side = None if length is None else math.isqrt(length)
    if side is None and tables[0] == tables[1]:
        codec = tokenizer.full if isinstance(tokenizer, ReducedConfig) else tokenizer
        codec = load_tokenizer(codec, torch.device("cpu")) if isinstance(codec, Path) else codec
        side = _PIXELS // codec.factor
    if side is None or (length is not None and side * side != length):
        raise UserError(
            f"{path}: the grid of its {length or 'unknown number of'} tokens is unclear, its position tables "
            f"have {tables[0]} rows and {tables[1]} columns. Give --grid ROWS COLUMNS."
        )
    return side, side


def _condition(weights: Mapping[str, Tensor]) -> Condition:
    block = f"{_NETWORK}blocks.0."
    if f"{block}attn2.key.weight" in weights:
        return TextCondition(width=weights[f"{block}attn2.key.weight"].shape[1])
    if f"{block}ln2.emb.weight" in weights:
        rows = weights[f"{block}ln2.emb.weight"].shape[0]
        # ImageNet's 1,000 classes, plus a null row if the model was trained for classifier-free guidance.
        is_learned = rows == _IMAGENET_WITH_NULL
        return ClassCondition(classes=rows - is_learned, null_condition="learned" if is_learned else "mean")
    return NoCondition()


def _feed_forward(weights: Mapping[str, Tensor], width: int) -> FeedForwardConfig:
    convolution = weights.get(f"{_NETWORK}blocks.0.mlp.conv1.weight")
    if convolution is not None:
        return Convolutional(mlp_ratio=convolution.shape[0] // width)
    dense = weights.get(f"{_NETWORK}blocks.0.mlp.0.weight")
    return FullyConnected() if dense is None else FullyConnected(mlp_ratio=dense.shape[0] // width)


def _tower(weights: Mapping[str, Tensor], null_condition: Literal["learned", "empty"], path: Path) -> Tower:
    vocabulary, width = _table(weights, f"{_TEXT}token_embedding.weight", path)
    return Tower(
        context_length=_table(weights, f"{_TEXT}positional_embedding", path)[0],
        width=width,
        heads=max(1, width // _HEAD_WIDTH_OF_CLIP),
        layers=count_numbered(weights, rf"{_TEXT}transformer\.resblocks\.(\d+)\."),
        bpe_merges=vocabulary - CaptionTokenizer(merges=0).vocabulary,
        null_condition=null_condition,
    )


def _schedule(weights: Mapping[str, Tensor], codes: int, path: Path) -> Released:
    """Return the released noise schedule; the file's own tables must match it."""
    steps = _table(weights, "log_at", path)[0]
    schedule = Released(steps=steps)
    probabilities = MaskAndReplace(schedule, codes).rates.at(torch.arange(steps))
    for name, expected in (("log_cumprod_at", probabilities.keep), ("log_cumprod_ct", probabilities.mask)):
        if _table(weights, name, path)[0] != steps + 1 or not torch.allclose(
            weights[name][:steps].double(), expected.log(), rtol=0, atol=_TOLERANCE
        ):
            raise UserError(
                f"{path}: was trained with another schedule than the released one ({name} differs), and "
                "sampling with the released one would give meaningless images."
            )
    return schedule
