"""Import of diffusers' ``VQDiffusionPipeline`` folders, and the layout shared with the export.

The folder is JSON and safetensors, so diffusers is not imported. Only text-conditional models with fully
connected blocks and the released noise schedule are supported; others raise a `UserError`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.config import validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.safe_json import JSON_OBJECT, MAX_SIZE, Count, Depth, Size
from vqd_scale.core.tensors import read_tensors, with_prefix, without_prefix
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.conversion import MODEL, TOKENIZER, ModelPlan, model_weights
from vqd_scale.models.exchange.key_mapping import Exchange, Prefixes
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.text.weights import from_transformers
from vqd_scale.tokenizers.config import TamingVQConfig
from vqd_scale.tokenizers.weights import from_diffusers

INDEX = "model_index.json"
NULL = "learned_classifier_free_sampling_embeddings"
COMPONENTS = {
    "transformer": ("diffusers", "Transformer2DModel"),
    "vqvae": ("diffusers", "VQModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "VQDiffusionScheduler"),
    NULL: (
        "diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion",
        "LearnedClassifierFreeSamplingEmbeddings",
    ),
}
"""Library and class of each component. The last library is a module path: diffusers 0.42 cannot load the
name that it writes itself."""
PAD = "!"
"""CLIP's token 0, the padding of captions. The network was not trained with any other padding token."""

_ATTENTION_KEYS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj": "to_out.0"}
TRANSFORMER = Prefixes(
    ("content_emb.", "latent_image_embedding."),
    ("blocks.*.ln1.", "transformer_blocks.*.norm1."),
    ("blocks.*.ln1_1.", "transformer_blocks.*.norm2."),
    ("blocks.*.ln2.", "transformer_blocks.*.norm3."),
    *(
        (f"blocks.*.attn{number}.{name}.", f"transformer_blocks.*.attn{number}.{diffusers_name}.")
        for number in (1, 2)
        for name, diffusers_name in _ATTENTION_KEYS.items()
    ),
    ("blocks.*.mlp.0.", "transformer_blocks.*.ff.net.0.proj."),
    ("blocks.*.mlp.2.", "transformer_blocks.*.ff.net.2."),
    ("norm.", "norm_out."),
    ("head.", "out."),
)

SCHEDULE_KEYS = {
    "steps": "num_train_timesteps",
    "keep_first": "alpha_cum_start",
    "keep_last": "alpha_cum_end",
    "mask_first": "gamma_cum_start",
    "mask_last": "gamma_cum_end",
}
"""Keys of `Released`, and their names in diffusers' scheduler."""
_TOWER_KEYS = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "context_length": "max_position_embeddings",
}
"""Keys of `Tower`, and their names in transformers' ``CLIPTextModel``."""

_ORIGIN = (
    "Converted from the diffusers folder '{name}'; the license of these weights is that under which they "
    "were published."
)
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "(pytorch_)?model"}
"""Names of weights, by library; other libraries' are those of diffusers."""
_CANDIDATE = re.compile(r"\.(safetensors|bin)$|\.index(\.\w+)?\.json$")
_SHARD = re.compile(r"-\d+-of-\d+\.(\w+\.)?\w+$")
_EPSILON = Annotated[float, Field(ge=1e-5, le=1e-5)]


class _Component(BaseModel):
    """Base of the configurations in a folder; keys that are not declared have no effect on the networks.

    A key with a default has this single value: with another one the networks would not be equivalent.
    """


class _Transformer(_Component):
    num_vector_embeds: Annotated[int, Field(gt=1, le=MAX_SIZE)]
    sample_size: Count
    num_attention_heads: Count
    attention_head_dim: Size
    num_layers: Depth
    cross_attention_dim: Size
    num_embeds_ada_norm: Size
    activation_fn: Literal["geglu-approximate"]
    attention_bias: Literal[True] = True
    in_channels: None = None
    double_self_attention: Literal[False] = False
    only_cross_attention: Literal[False] = False
    norm_elementwise_affine: Literal[True] = True
    norm_eps: _EPSILON = 1e-5


class _Autoencoder(_Component):
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)]
    down_block_types: list[str]
    layers_per_block: Count
    latent_channels: Size
    num_vq_embeddings: Size
    vq_embed_dim: Size | None = None
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Literal[32] = 32
    norm_type: Literal["group"] = "group"
    mid_block_add_attention: Literal[True] = True


class _TextEncoder(_Component):
    hidden_size: Size
    num_attention_heads: Count
    num_hidden_layers: Depth
    max_position_embeddings: Size
    vocab_size: Size
    hidden_act: Literal["quick_gelu"]
    layer_norm_eps: _EPSILON = 1e-5


class _Scheduler(_Component):
    num_vec_classes: Size
    num_train_timesteps: Size
    alpha_cum_start: float
    alpha_cum_end: float
    gamma_cum_start: float
    gamma_cum_end: float


class _NullEmbeddings(_Component):
    learnable: bool


class _Token(_Component):
    content: str


class _SpecialTokens(_Component):
    pad_token: str | _Token | None = None


class _WeightIndex(_Component):
    weight_map: dict[str, str]


AnyComponent = TypeVar("AnyComponent", bound=_Component)


def plan_diffusers(folder: Path) -> ModelPlan:
    """Plan the import of a model from a ``VQDiffusionPipeline`` folder.

    Raises:
        UserError: The folder is not such a pipeline, a component is missing or damaged, or a network differs
            from VQ-Diffusion's.
    """
    index = read_json(folder / INDEX, "diffusers pipeline", JSON_OBJECT)
    if index.get("_class_name") != "VQDiffusionPipeline":
        raise UserError(
            f"{folder / INDEX}: describes a {index.get('_class_name')!r:.99}, not a VQDiffusionPipeline."
        )
    for component in COMPONENTS:
        if index.get(component) is None:
            hint = " (the published fp16 revision has none; take the main one)" if component == NULL else ""
            raise UserError(f"{folder / INDEX}: lacks the key '{component}'{hint}.")
    _check_padding(folder / "tokenizer")
    is_learned = _config_of(folder, NULL, _NullEmbeddings).learnable
    transformer = _config_of(folder, "transformer", _Transformer)
    config = validated(
        BundleConfig,
        {
            "codebook_size": transformer.num_vector_embeds - 1,
            "grid": [transformer.sample_size, transformer.sample_size],
            "denoiser": {
                "width": transformer.num_attention_heads * transformer.attention_head_dim,
                "heads": transformer.num_attention_heads,
                "layers": transformer.num_layers,
                "condition": {"kind": "text", "width": transformer.cross_attention_dim},
            },
            "text": _tower(folder, is_learned=is_learned),
            "diffusion": _schedule(folder, transformer),
            "origin": _ORIGIN.format(name=folder.resolve().name),
        },
        str(folder),
    )
    tokenizer = _autoencoder(folder)
    source_weights: dict[str, Tensor] = {}
    for component in ("transformer", "vqvae", "text_encoder", NULL):
        source_weights |= with_prefix(f"{component}/", _weights_of(folder, component))
    # Older versions of transformers also save the position ids 0, 1, 2, ...
    dropped = [r"text_encoder/(text_model\.)?embeddings\.position_ids"]
    if not is_learned:
        dropped.append(f"{NULL}/embeddings")
    target_weights = model_weights(config, tokenizer, str(folder))
    return ModelPlan(
        config, tokenizer, Exchange(str(folder), source_weights, target_weights, _convert, dropped)
    )


def _convert(source_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    null = without_prefix(source_weights, f"{NULL}/")
    text = {"null": null["embeddings"]} if "embeddings" in null else {}
    text |= with_prefix("tower.", from_transformers(without_prefix(source_weights, "text_encoder/")))
    return {
        **with_prefix(
            f"{MODEL}denoiser.", TRANSFORMER.from_foreign(without_prefix(source_weights, "transformer/"))
        ),
        **with_prefix(f"{MODEL}text.", text),
        **with_prefix(TOKENIZER, from_diffusers(without_prefix(source_weights, "vqvae/"))),
    }


def _tower(folder: Path, *, is_learned: bool) -> Mapping[str, object]:
    config = _config_of(folder, "text_encoder", _TextEncoder)
    return {key: getattr(config, name) for key, name in _TOWER_KEYS.items()} | {
        "kind": "tower",
        "bpe_merges": config.vocab_size - CaptionTokenizer(merges=0).vocabulary,
        "null_condition": "learned" if is_learned else "empty",
    }


def _schedule(folder: Path, transformer: _Transformer) -> Mapping[str, object]:
    config = _config_of(folder, "scheduler", _Scheduler)
    for name, count, trained_count in (
        ("timesteps", config.num_train_timesteps, transformer.num_embeds_ada_norm),
        ("classes", config.num_vec_classes, transformer.num_vector_embeds),
    ):
        if count != trained_count:
            raise UserError(
                f"{folder}: the scheduler has {count} {name}, but the transformer was trained with "
                f"{trained_count}; they do not belong together."
            )
    return {"kind": "released"} | {key: getattr(config, name) for key, name in SCHEDULE_KEYS.items()}


def _autoencoder(folder: Path) -> TamingVQConfig:
    config = _config_of(folder, "vqvae", _Autoencoder)
    widths = config.block_out_channels
    if any(width % widths[0] for width in widths):
        raise UserError(f"{folder}/vqvae/config.json: block_out_channels must be multiples of the first.")
    values = {
        "codebook_size": config.num_vq_embeddings,
        "code_dim": config.vq_embed_dim or config.latent_channels,
        "channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": config.layers_per_block,
        "attention": [
            level for level, kind in enumerate(config.down_block_types) if kind == "AttnDownEncoderBlock2D"
        ],
        "latent_channels": config.latent_channels,
    }
    return validated(TamingVQConfig, values, f"{folder}/vqvae/config.json")


def _config_of(folder: Path, component: str, shape: type[AnyComponent]) -> AnyComponent:
    name = "scheduler_config.json" if component == "scheduler" else "config.json"
    return read_json(folder / component / name, f"configuration of the {component}", TypeAdapter(shape))


def _check_padding(folder: Path) -> None:
    """Check that captions are padded with token 0, which diffusers' own conversion refers to by its text."""
    shape = TypeAdapter(_SpecialTokens)
    pad = read_json(folder / "tokenizer_config.json", "configuration of the tokenizer", shape).pad_token
    if pad is None and (folder / "special_tokens_map.json").is_file():
        pad = read_json(folder / "special_tokens_map.json", "table of special tokens", shape).pad_token
    pad = pad.content if isinstance(pad, _Token) else pad
    if pad != PAD:
        raise UserError(
            f"{folder}: captions are padded with {pad!r:.99}, but VQ-Diffusion was trained with {PAD!r}, "
            f"token 0."
        )


def _weights_of(folder: Path, component: str) -> dict[str, Tensor]:
    """Read a component's weights from the file with the standard name, or from those that its index names.

    safetensors precede pickles. A file of another name, such as a variant, counts only if it is the only one.
    """
    folder = folder / component
    names = [
        path.name for path in sorted(folder.glob("*")) if path.is_file() and _CANDIDATE.search(path.name)
    ]
    stem = _STEMS.get(COMPONENTS[component][0], _STEMS["diffusers"])
    candidates: list[str] = []
    for suffix in ("safetensors", "bin"):
        pattern = re.compile(rf"{stem}\.{suffix}(\.index\.json)?")
        candidates = candidates or [name for name in names if pattern.fullmatch(name)]
    candidates = candidates or [name for name in names if not _SHARD.search(name)]
    if not candidates:
        raise UserError(f"{folder}: there are no weights (*.safetensors or *.bin) here, or not their index.")
    if len(candidates) > 1:
        raise UserError(f"{folder}: it is unclear which are the weights: {', '.join(candidates)}; keep one.")
    path = folder / candidates[0]
    if path.suffix != ".json":
        return read_tensors(path)
    files = read_json(path, "index of the weights", TypeAdapter(_WeightIndex)).weight_map
    if outside := [name for name in files.values() if name in ("", ".", "..") or Path(name).name != name]:
        raise UserError(f"{path}: names the file {outside[0]!r:.99}, which is not in its folder.")
    shards = {name: read_tensors(folder / name) for name in sorted(set(files.values()))}
    locations = {(name, file) for file, shard in shards.items() for name in shard}
    if differing := sorted(locations ^ set(files.items())):
        raise UserError(f"{path}: does not fit its files: '{differing[0][0]}' in {differing[0][1]}, for one.")
    return {name: shards[file][name] for name, file in files.items()}
