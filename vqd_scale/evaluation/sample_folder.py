"""Evaluation of a folder of generated images: attribute accuracy and distance to real images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.data.shards.decode import decode_image, decode_json, image_extension
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import KEY, read_shard
from vqd_scale.data.sources.shapes import Scene
from vqd_scale.evaluation.extractors import latent_moments
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.evaluation.reconstruction import psnr, ssim
from vqd_scale.evaluation.scene_reader import attribute_accuracy, chance_accuracy
from vqd_scale.models.generate import read_generated
from vqd_scale.tokenizers.base import to_bytes, to_signal
from vqd_scale.tokenizers.registry import Tokenizer

_BATCH = 64

Images = UInt8[Tensor, "count 3 height width"]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        figures: Metrics as nested plain JSON values.
        real: Real images of the prompts.
        reconstructed: Tokenizer reconstructions of ``real``.
    """

    figures: dict[str, Any]
    real: Images
    reconstructed: Images


def evaluate_samples(samples: Path, data: Path, tokenizer: Tokenizer) -> Evaluation:
    """Compare generated images with the real samples of their captions.

    Attribute accuracy is computed if the shards' JSON describes scenes of the embedded shapes dataset.

    Args:
        samples: Output folder of `vqd_scale.models.generate.generate`.
        data: Shards of the captions.
        tokenizer: The model's tokenizer; its latents are the features of the Fréchet distance.

    Raises:
        UserError: Samples are missing, or do not belong to these shards.
    """
    prompts, generated = read_generated(samples)
    images = torch.from_numpy(generated).permute(0, 3, 1, 2).contiguous()
    real, scenes = _read([prompt.key for prompt in prompts], ShardSet.open(data))
    reconstructed = _reconstruct(tokenizer, real)
    figures: dict[str, Any] = {
        "count": len(prompts),
        "tokenizer_psnr": float(psnr(real, reconstructed).mean()),
        "tokenizer_ssim": float(ssim(real, reconstructed).mean()),
        "frechet_distance_of_tokenizer_features": frechet_distance(
            FeatureStatistics.of(_features(tokenizer, images)),
            FeatureStatistics.of(_features(tokenizer, real)),
        ),
    }
    if scenes:
        accuracy = attribute_accuracy(images, scenes)
        figures["attribute_accuracy"] = {
            "mean": accuracy.mean,
            "all": accuracy.all,
            "shuffled": chance_accuracy(images, scenes).mean,
            "per_attribute": accuracy.per_attribute,
        }
        figures["reader_on_truth"] = attribute_accuracy(real, scenes).mean
        figures["tokenizer_ceiling"] = attribute_accuracy(reconstructed, scenes).mean
    return Evaluation(figures, real, reconstructed)


def _read(keys: list[str], shards: ShardSet) -> tuple[Images, list[Scene]]:
    """Read the images of the given keys, and their scenes if all samples have one."""
    wanted = set(keys)
    pictures: dict[str, Tensor] = {}
    scenes: dict[str, Scene] = {}
    for shard in shards.shards:
        for sample in read_shard(shard):
            if sample[KEY] in wanted:
                pixels = decode_image(sample[image_extension(sample)])
                pictures[sample[KEY]] = torch.from_numpy(pixels).permute(2, 0, 1)
                described = decode_json(sample["json"]) if "json" in sample else {}
                if "figures" in described:
                    scenes[sample[KEY]] = Scene.from_json(described)
    missing = [key for key in keys if key not in pictures]
    if missing:
        raise UserError(
            f"{shards.folder}: has no sample '{missing[0]}'; these pictures were drawn for other shards."
        )
    real = torch.stack([pictures[key] for key in keys])
    return real, [scenes[key] for key in keys] if len(scenes) == len(keys) else []


@torch.no_grad()
def _reconstruct(tokenizer: Tokenizer, images: Images) -> Images:
    return torch.cat(
        [to_bytes(tokenizer.decode(tokenizer.encode(to_signal(part)))) for part in images.split(_BATCH)]
    )


@torch.no_grad()
def _features(tokenizer: Tokenizer, images: Images) -> Float[Tensor, "count features"]:
    return torch.cat([latent_moments(tokenizer, part) for part in images.split(_BATCH)])
