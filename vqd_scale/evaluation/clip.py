"""CLIP metrics of image-text alignment: CLIP score and R-precision."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.core.tensors import check_names, read_tensors
from vqd_scale.evaluation.config import ClipConfig
from vqd_scale.evaluation.extractors import checked_weights
from vqd_scale.text.open_clip import check_activation

_NON_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
"""Entries that are not weights, left by converting OpenAI's TorchScript archives."""

IMAGE = "clip_image"
CAPTION = "clip_caption"


@dataclass(frozen=True)
class Clip:
    """Loaded CLIP model.

    Attributes:
        network: open_clip model.
        tokenize: Tokenizer from captions to token IDs.
        size: Side of the input images in pixels.
        description: Model, weights and settings that the scores depend on.
        device: Compute device.
    """

    network: Any
    tokenize: Any
    size: int
    description: dict[str, Any]
    device: torch.device

    @torch.no_grad()
    def columns(
        self, images: UInt8[Tensor, "batch 3 height width"], captions: list[str]
    ) -> dict[str, Float32[Tensor, "batch width"]]:
        """Return L2-normalized embeddings of images and captions, on the CPU."""
        ids = self.tokenize(captions).to(self.device)
        return {
            IMAGE: _direction(self.network.encode_image(self._prepared(images.to(self.device)))),
            CAPTION: _direction(self.network.encode_text(ids)),
        }

    def _prepared(self, images: Tensor) -> Tensor:
        """Apply CLIP's preprocessing to square images: antialiased bicubic resize and normalization."""
        mean, deviation = (
            torch.tensor(self.description[name], device=images.device).view(3, 1, 1)
            for name in ("mean", "std")
        )
        sides = (self.size, self.size)
        # On a GPU, this interpolation of bytes does not exist.
        resized = functional.interpolate(images.float(), sides, mode="bicubic", antialias=True)
        return (resized.round().clamp(0, 255) / 255 - mean) / deviation


def load_clip(config: ClipConfig, device: torch.device) -> Clip:
    """Build the network and load its weights.

    Raises:
        UserError: The file is missing, has another digest or is of another model; open_clip has no such
            model or tag, or the weights were trained with another activation than the model's.
    """
    import open_clip

    digest = checked_weights(config.weights, config.sha256, "CLIP", "give clip.weights=FILE.")
    if open_clip.get_model_config(config.model) is None:
        raise UserError(f"clip.model: open_clip has no model '{config.model}'; see open_clip.list_models().")
    normalization = _checked_normalization(config)
    network: Any = open_clip.create_model(config.model, pretrained=None)
    state = read_tensors(config.weights)
    state = {name: value for name, value in state.items() if name not in _NON_WEIGHTS}
    check_names(state, network.state_dict(), f"open_clip's {config.model}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{config.weights}: not the weights of open_clip's {config.model} ({reason}); set clip.model."
        ) from None
    size = network.visual.image_size
    return Clip(
        network.eval().to(device),
        open_clip.get_tokenizer(config.model),
        size[0] if isinstance(size, tuple) else int(size),
        {
            "model": config.model,
            "weights_sha256": digest,
            "pretrained": config.pretrained,
            **(normalization or {"mean": network.visual.image_mean, "std": network.visual.image_std}),
            "retrieval_candidates": config.retrieval_candidates,
        },
        device,
    )


def _checked_normalization(config: ClipConfig) -> dict[str, Any]:
    """Return mean and deviation of the images that the weights need; empty without a published tag.

    A wrong activation or normalization raises no error and gives other scores, so the model's name or the tag
    must decide both.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(config.model)
    named = tags if config.pretrained is None else [config.pretrained]
    if config.pretrained == "custom" or not named:
        return {}
    if not set(named) <= set(tags):
        raise UserError(f"clip.pretrained: given {config.pretrained!r}, allowed: custom, {', '.join(tags)}.")
    variants = {
        (bool(tag.get("quick_gelu")), tuple(tag["mean"]), tuple(tag["std"]))
        for tag in (get_pretrained_cfg(config.model, name) for name in named)
    }
    if len(variants) > 1:
        raise UserError(
            f"clip.pretrained: the published weights of '{config.model}' differ in activation or "
            f"normalization; name the tag of yours: custom, {', '.join(tags)}."
        )
    ((quick_gelu, mean, deviation),) = variants
    check_activation(config.model, quick_gelu, f"the weights '{named[0]}'", "clip.model")
    return {"mean": list(mean), "std": list(deviation)}


def scores(
    images: Float32[Tensor, "count width"], captions: Float32[Tensor, "count width"]
) -> Float32[Tensor, " count"]:
    """Return the cosine similarity of each image and its caption, the scale on which papers report 0.30."""
    return (images * captions).sum(dim=1)


def check_candidates(count: int, candidates: int) -> None:
    """Raise a `UserError` if there are fewer captions than candidates of R-precision."""
    if count < candidates:
        raise UserError(
            f"CLIP R-precision: {count} captions are fewer than clip.retrieval_candidates={candidates}; "
            "lower it."
        )


def r_precision(
    images: Float32[Tensor, "count width"], captions: Float32[Tensor, "count width"], candidates: int
) -> float:
    """Return the fraction of images that are closer to their own caption than to random other captions.

    Candidates identical to the image's own caption are ignored.

    Source: Park et al., "Benchmark for compositional text-to-image synthesis", 2021.

    Raises:
        UserError: There are fewer captions than ``candidates``.
    """
    count = len(images)
    check_candidates(count, candidates)
    correct = 0
    order = torch.from_numpy(permutation(0, Purpose.EVALUATION, 1, count))
    for position, number in enumerate(progress(order.tolist(), "CLIP R-precision", count, unit="img")):
        # The other candidates are the next ones in a random permutation of all captions.
        distractors = captions[order[torch.arange(position + 1, position + candidates) % count]]
        caption = captions[number]
        distractors = distractors[(distractors - caption).abs().amax(dim=1) > 0]
        correct += bool((distractors @ images[number] < caption @ images[number]).all())
    return correct / count


def _direction(features: Tensor) -> Float32[Tensor, "batch width"]:
    return functional.normalize(features.float(), dim=-1).cpu()
