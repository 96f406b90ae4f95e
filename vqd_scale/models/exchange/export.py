"""Export of a model to a folder for diffusers' ``VQDiffusionPipeline.from_pretrained``."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqd_scale.core.atomic_io import publish_json, publish_text
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import published_folder
from vqd_scale.core.tensors import without_prefix, write_tensors
from vqd_scale.diffusion.config import Released
from vqd_scale.models.bundle import Bundle
from vqd_scale.models.exchange.diffusers import COMPONENTS, INDEX, NULL, PAD, SCHEDULE_KEYS, TRANSFORMER
from vqd_scale.nn.config import DenoiserConfig, TextCondition
from vqd_scale.text.clip import CaptionTokenizer, TextEncoder
from vqd_scale.text.open_clip import open_clip_module
from vqd_scale.text.weights import to_transformers
from vqd_scale.tokenizers.base import ImageTokenizer
from vqd_scale.tokenizers.codebook.reduction import Reduced
from vqd_scale.tokenizers.config import ConvolutionsConfig
from vqd_scale.tokenizers.taming import TamingGumbel, TamingVQ
from vqd_scale.tokenizers.vqgan import VQGAN
from vqd_scale.tokenizers.weights import to_diffusers

_SHAPE_KEYS = {"width", "heads", "layers", "condition"}
_TRAINING_KEYS = {"attention", "init_std", "gradient_checkpointing", "adaln_zero"}
"""Keys of the denoiser that may have any value in an export, with `_SHAPE_KEYS`."""
_START, _END = "<|startoftext|>", "<|endoftext|>"


def export_diffusers(bundle: Bundle, folder: Path, purpose: str = "export_diffusers") -> None:
    """Write a model as a ``VQDiffusionPipeline`` folder.

    diffusers' only codebook is the nearest learned vector. A tokenizer with another one still decodes to the
    same images, but its selection of codes is lost. EMA statistics of a codebook are dropped.

    Raises:
        UserError: diffusers has no counterpart of this model, or the folder cannot be written.
    """
    config, text = bundle.config, bundle.model.text if bundle.config.text is not None else None
    network, schedule, shape = config.denoiser, config.diffusion, _convolutions(bundle.tokenizer)
    if not isinstance(network, DenoiserConfig) or text is None or not _is_exportable(network):
        raise UserError(
            "diffusers has no counterpart of this network: it has text-conditional transformers with fully "
            "connected blocks of four times their width and a learned table of timesteps, nothing else."
        )
    if not isinstance(schedule, Released) or config.grid[0] != config.grid[1]:
        raise UserError("diffusers has the schedule of kind 'released' and square grids only.")
    if (
        shape is None
        or shape.norm != "group"
        or shape.patch_size != 1
        or not shape.mid_attention
        or not shape.latent_channels
    ):
        raise UserError(
            "diffusers has no counterpart of this tokenizer: it has VQ-GANs with group norm, attention in "
            "the middle and 1x1 convolutions at the codebook only."
        )
    if not text.normalize or not _has_quick_gelu(text):
        raise UserError(
            "diffusers has no counterpart of a text tower but CLIP's: QuickGELU, features of length 1."
        )
    states = {
        "transformer": TRANSFORMER.to_foreign(without_prefix(bundle.model.state_dict(), "denoiser.")),
        "vqvae": to_diffusers(_autoencoder(bundle.tokenizer)),
        "text_encoder": to_transformers(text.network.state_dict()),
        # diffusers represents embeddings that are not learned by an empty tensor.
        NULL: {"embeddings": torch.zeros(0) if text.null is None else text.null.detach()},
    }
    configs = {
        "transformer": _transformer(network, config.codebook_size, config.grid[0], config.diffusion.steps),
        "vqvae": _vqvae(shape, bundle.tokenizer),
        "text_encoder": _text_encoder(text),
        NULL: {
            "_class_name": COMPONENTS[NULL][1],
            "learnable": text.null is not None,
            "hidden_size": None if text.null is None else text.null.shape[1],
            "length": None if text.null is None else text.null.shape[0],
        },
    }
    with published_folder(folder, purpose) as partial:
        publish_json(partial / INDEX, {"_class_name": "VQDiffusionPipeline", **COMPONENTS})
        for component, state in states.items():
            publish_json(partial / component / "config.json", configs[component])
            name = "model" if component == "text_encoder" else "diffusion_pytorch_model"
            single = {key: value.float() for key, value in state.items()}
            write_tensors(partial / component / f"{name}.safetensors", single, {"format": "pt"})
        scheduler = {"_class_name": "VQDiffusionScheduler", "num_vec_classes": config.codebook_size + 1}
        scheduler |= {name: getattr(schedule, key) for key, name in SCHEDULE_KEYS.items()}
        publish_json(partial / "scheduler" / "scheduler_config.json", scheduler)
        _write_tokenizer(partial / "tokenizer", text.tokenizer)


def _is_exportable(network: DenoiserConfig) -> bool:
    required_defaults = DenoiserConfig.model_fields.keys() - _SHAPE_KEYS - _TRAINING_KEYS
    defaults = DenoiserConfig()
    return isinstance(network.condition, TextCondition) and all(
        getattr(network, key) == getattr(defaults, key) for key in required_defaults
    )


def _has_quick_gelu(text: TextEncoder) -> bool:
    quick_gelu = open_clip_module("transformer").QuickGELU
    return any(isinstance(module, quick_gelu) for module in text.network.modules())


def _convolutions(tokenizer: ImageTokenizer) -> ConvolutionsConfig | None:
    full = tokenizer.full if isinstance(tokenizer, Reduced) else tokenizer
    return full.config if isinstance(full, VQGAN | TamingVQ | TamingGumbel) else None


def _autoencoder(tokenizer: ImageTokenizer) -> dict[str, Tensor]:
    """Return the weights of encoder and decoder, with ``code_vectors`` as the codebook."""
    full = tokenizer.full if isinstance(tokenizer, Reduced) else tokenizer
    state = cast(nn.Module, full).state_dict()
    network_weights = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    return {**network_weights, "quantize.embedding.weight": tokenizer.code_vectors()}


def _transformer(network: DenoiserConfig, codes: int, side: int, steps: int) -> dict[str, Any]:
    return {
        "_class_name": "Transformer2DModel",
        "activation_fn": "geglu-approximate",
        "attention_bias": True,
        "attention_head_dim": network.width // network.heads,
        "cross_attention_dim": cast(TextCondition, network.condition).width,
        "norm_type": "ada_norm",
        "num_attention_heads": network.heads,
        "num_embeds_ada_norm": steps,
        "num_layers": network.layers,
        "num_vector_embeds": codes + 1,
        "sample_size": side,
    }


def _vqvae(shape: ConvolutionsConfig, tokenizer: ImageTokenizer) -> dict[str, Any]:
    attends = [level in shape.attention for level in range(len(shape.channel_multipliers))]
    return {
        "_class_name": "VQModel",
        "act_fn": "silu",
        "block_out_channels": [shape.channels * multiplier for multiplier in shape.channel_multipliers],
        "down_block_types": [f"{'Attn' * attended}DownEncoderBlock2D" for attended in attends],
        "latent_channels": shape.latent_channels,
        "layers_per_block": shape.num_res_blocks,
        "num_vq_embeddings": tokenizer.codes,
        "up_block_types": [f"{'Attn' * attended}UpDecoderBlock2D" for attended in reversed(attends)],
        "vq_embed_dim": tokenizer.code_vectors().shape[1],
    }


def _text_encoder(text: TextEncoder) -> dict[str, Any]:
    tower, tokenizer = text.network, text.tokenizer
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": tokenizer.vocabulary - 2,
        "eos_token_id": tokenizer.vocabulary - 1,
        "pad_token_id": 0,
        "hidden_act": "quick_gelu",
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "max_position_embeddings": tokenizer.context_length,
        "num_attention_heads": tower.heads,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "projection_dim": tower.width,
        "vocab_size": tokenizer.vocabulary,
    }


def _write_tokenizer(folder: Path, tokenizer: CaptionTokenizer) -> None:
    """Write CLIP's byte pairs in transformers' format, truncated to this tokenizer's merges."""
    tokenizer_data = open_clip_module("tokenizer").SimpleTokenizer()
    entries = sorted(tokenizer_data.encoder, key=lambda entry: tokenizer_data.encoder[entry])[
        : tokenizer.vocabulary - 2
    ]
    merges = [" ".join(pair) for pair in list(tokenizer_data.bpe_ranks)[: tokenizer.merges]]
    vocabulary = {entry: number for number, entry in enumerate([*entries, _START, _END])}
    publish_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    publish_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": PAD}
    publish_json(folder / "special_tokens_map.json", special)
    settings = {"model_max_length": tokenizer.context_length, "do_lower_case": True, **special}
    publish_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **settings})
