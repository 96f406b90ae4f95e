"""Import of diffusers' ``VQDiffusionPipeline`` folders, and the layout shared with the export.

The folder is JSON and safetensors, so diffusers is not imported. Only text-conditional models with fully
connected blocks and the released noise schedule are supported; others raise a `UserError`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqd_scale.core.atomic_io import read_json
from vqd_scale.core.config import validated
from vqd_scale.core.errors import UserError
from vqd_scale.core.tensors import read_tensors, with_prefix, without_prefix
from vqd_scale.diffusion.config import Released
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.conversion import MODEL, TOKENIZER, ModelPlan, model_weights
from vqd_scale.models.exchange.key_mapping import Exchange, Prefixes
from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.text.config import Tower
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
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "activation_fn": "geglu-approximate",
        "attention_bias": True,
        "in_channels": None,
        "double_self_attention": False,
        "only_cross_attention": False,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
    },
    "vqvae": {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_type": "group",
        "mid_block_add_attention": True,
    },
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
"""Required values, if the key is present; with others the networks would not be equivalent."""

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "transformer": (
        "num_vector_embeds",
        "sample_size",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "cross_attention_dim",
        "num_embeds_ada_norm",
        "activation_fn",
    ),
    "vqvae": (
        "block_out_channels",
        "down_block_types",
        "layers_per_block",
        "latent_channels",
        "num_vq_embeddings",
    ),
    "text_encoder": (*_TOWER_KEYS.values(), "vocab_size", "hidden_act"),
    "scheduler": ("num_vec_classes", *SCHEDULE_KEYS.values()),
    NULL: ("learnable",),
}


def plan_diffusers(folder: Path) -> ModelPlan:
    """Plan the import of a model from a ``VQDiffusionPipeline`` folder.

    Raises:
        UserError: The folder is not such a pipeline, a component is missing or damaged, or a network differs
            from VQ-Diffusion's.
    """
    index = read_json(folder / INDEX, "diffusers pipeline")
    if index.get("_class_name") != "VQDiffusionPipeline":
        raise UserError(
            f"{folder / INDEX}: describes a {index.get('_class_name')}, not a VQDiffusionPipeline."
        )
    for component in COMPONENTS:
        if index.get(component) is None:
            hint = " (the published fp16 revision has none; take the main one)" if component == NULL else ""
            raise UserError(f"{folder / INDEX}: lacks the key '{component}'{hint}.")
    _check_padding(folder / "tokenizer")
    learned = bool(_config_of(folder, NULL)["learnable"])
    transformer = _config_of(folder, "transformer")
    heads = transformer["num_attention_heads"]
    config = BundleConfig(
        codebook_size=transformer["num_vector_embeds"] - 1,
        grid=(transformer["sample_size"], transformer["sample_size"]),
        denoiser=DenoiserConfig(
            width=heads * transformer["attention_head_dim"],
            heads=heads,
            layers=transformer["num_layers"],
            condition=TextCondition(width=transformer["cross_attention_dim"]),
        ),
        text=_tower(folder, learned=learned),
        diffusion=_schedule(folder),
        origin=_ORIGIN.format(name=folder.resolve().name),
    )
    tokenizer = _autoencoder(folder)
    source_weights: dict[str, Tensor] = {}
    for component in ("transformer", "vqvae", "text_encoder", NULL):
        source_weights |= with_prefix(f"{component}/", _weights_of(folder / component))
    # Older versions of transformers also save the position ids 0, 1, 2, ...
    dropped = [r"text_encoder/(text_model\.)?embeddings\.position_ids"]
    if not learned:
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


def _tower(folder: Path, *, learned: bool) -> Tower:
    config = _config_of(folder, "text_encoder")
    values = {key: config[name] for key, name in _TOWER_KEYS.items()} | {
        "bpe_merges": config["vocab_size"] - CaptionTokenizer(merges=0).vocabulary,
        "null_condition": "learned" if learned else "empty",
    }
    return validated(Tower, values, f"{folder}/text_encoder/config.json")


def _schedule(folder: Path) -> Released:
    config = _config_of(folder, "scheduler")
    values = {key: config[name] for key, name in SCHEDULE_KEYS.items()}
    transformer = _config_of(folder, "transformer")
    for name, count, trained_count in (
        ("timesteps", values["steps"], transformer["num_embeds_ada_norm"]),
        ("classes", config["num_vec_classes"], transformer["num_vector_embeds"]),
    ):
        if count != trained_count:
            raise UserError(
                f"{folder}: the scheduler has {count} {name}, but the transformer was trained with "
                f"{trained_count}; they do not belong together."
            )
    return validated(Released, values, f"{folder}/scheduler/scheduler_config.json")


def _autoencoder(folder: Path) -> TamingVQConfig:
    config = _config_of(folder, "vqvae")
    widths = config["block_out_channels"]
    attention = [n for n, kind in enumerate(config["down_block_types"]) if kind == "AttnDownEncoderBlock2D"]
    if any(width % widths[0] for width in widths):
        raise UserError(f"{folder}/vqvae/config.json: block_out_channels must be multiples of the first.")
    values = {
        "codebook_size": config["num_vq_embeddings"],
        "code_dim": config.get("vq_embed_dim") or config["latent_channels"],
        "channels": widths[0],
        "channel_multipliers": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention": attention,
        "latent_channels": config["latent_channels"],
    }
    return validated(TamingVQConfig, values, f"{folder}/vqvae/config.json")


def _config_of(folder: Path, component: str) -> dict[str, Any]:
    """Read a component's configuration, with checks of required keys and fixed values."""
    path = folder / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
    config: dict[str, Any] = read_json(path, f"configuration of the {component}")
    missing = [key for key in _REQUIRED[component] if config.get(key) is None]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}.")
    for key, value in _FIXED.get(component, {}).items():
        if config.get(key, value) != value:
            raise UserError(
                f"{path}: {key} is {config[key]!r}, but VQ-Diffusion's {component} needs {value!r}."
            )
    return config


def _check_padding(folder: Path) -> None:
    """Check that captions are padded with token 0, which diffusers' own conversion refers to by its text."""
    config = read_json(folder / "tokenizer_config.json", "configuration of the tokenizer")
    pad = config.get("pad_token")
    if pad is None and (folder / "special_tokens_map.json").is_file():
        pad = read_json(folder / "special_tokens_map.json", "table of special tokens").get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad != PAD:
        raise UserError(
            f"{folder}: captions are padded with {pad!r}, but VQ-Diffusion was trained with {PAD!r}, token 0."
        )


def _weights_of(folder: Path) -> dict[str, Tensor]:
    """Read a component's weights from one or several files; other precisions only as a fallback."""
    for pattern in ("*model.safetensors", "*model-*-of-*.safetensors", "*model*.safetensors", "*model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    raise UserError(f"{folder}: there are no weights (*.safetensors or *.bin) here.")
