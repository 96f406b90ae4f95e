"""CLIP metrics of image-text alignment: CLIP score and R-precision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from vqd_scale.core.config import Config
from vqd_scale.core.errors import UserError
from vqd_scale.core.progress import progress
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.core.tensors import check_names, read_tensors
from vqd_scale.evaluation.extractors import checked_weights

_PROGRAMS_REST = {"input_resolution", "context_length", "vocab_size"}
"""Entries that are not weights, left by converting OpenAI's TorchScript archives."""

PICTURE = "clip_picture"
CAPTION = "clip_caption"


class ClipConfig(Config):
    """CLIP model for evaluation.

    Attributes:
        weights: Weights file, with open_clip's or OpenAI's names.
        model: Model name in open_clip. OpenAI's weights need a name ending in ``-quickgelu``; a mismatch
            raises no error.
        sha256: SHA-256 of the weights file. If not given, any file is accepted and its digest is recorded.
        retrieval_candidates: Number of candidate captions of R-precision, including the image's own.
    """

    weights: Path
    model: str = "ViT-B-32-quickgelu"
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    retrieval_candidates: int = Field(default=100, ge=2)


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
            PICTURE: _direction(self.network.encode_image(self._prepared(images.to(self.device)))),
            CAPTION: _direction(self.network.encode_text(ids)),
        }

    def _prepared(self, images: Tensor) -> Tensor:
        """Apply CLIP's preprocessing to square images: antialiased bicubic resize and normalization."""
        mean, deviation = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.network.visual.image_mean, self.network.visual.image_std)
        )
        sides = (self.size, self.size)
        resized = functional.interpolate(images, sides, mode="bicubic", antialias=True)
        return (resized / 255 - mean) / deviation


def load_clip(config: ClipConfig, device: torch.device) -> Clip:
    """Build the network and load its weights.

    Raises:
        UserError: The file is missing or has another digest, or open_clip has no such model.
    """
    import open_clip

    digest = checked_weights(config.weights, config.sha256, "CLIP", "give clip.weights=FILE.")
    if open_clip.get_model_config(config.model) is None:
        raise UserError(
            f"clip.model: open_clip knows no model '{config.model}'; see open_clip.list_models()."
        )
    network: Any = open_clip.create_model(config.model, pretrained=None)
    state = read_tensors(config.weights)
    state = {name: value for name, value in state.items() if name not in _PROGRAMS_REST}
    check_names(state, network.state_dict(), f"open_clip's {config.model}")
    network.load_state_dict(state)
    size = network.visual.image_size
    return Clip(
        network.eval().to(device),
        open_clip.get_tokenizer(config.model),
        size[0] if isinstance(size, tuple) else int(size),
        {"model": config.model, "weights_sha256": digest, "among": config.retrieval_candidates},
        device,
    )


def scores(
    pictures: Float32[Tensor, "count width"], captions: Float32[Tensor, "count width"]
) -> Float32[Tensor, " count"]:
    """Return the cosine similarity of each image and its caption, the scale on which papers report 0.30."""
    return (pictures * captions).sum(dim=1)


def r_precision(
    pictures: Float32[Tensor, "count width"], captions: Float32[Tensor, "count width"], among: int
) -> float:
    """Return the fraction of images that are closer to their own caption than to random other captions.

    Candidates identical to the image's own caption are ignored.

    Source: Park et al., "Benchmark for compositional text-to-image synthesis", 2021.

    Raises:
        UserError: There are fewer captions than ``among``.
    """
    count = len(pictures)
    if count < among:
        raise UserError(
            f"CLIP-R-precision: {count} captions are fewer than clip.retrieval_candidates={among}; lower it."
        )
    right = 0
    order = torch.from_numpy(permutation(0, Purpose.EVALUATION, 1, count))
    for place, number in enumerate(progress(order.tolist(), "CLIP R-precision", count, unit="img")):
        # The other candidates are the next ones in a random permutation of all captions.
        others = captions[order[torch.arange(place + 1, place + among) % count]]
        own = captions[number]
        others = others[(others - own).abs().amax(dim=1) > 0]
        right += bool((others @ pictures[number] < own @ pictures[number]).all())
    return right / count


def _direction(features: Tensor) -> Float32[Tensor, "batch width"]:
    return functional.normalize(features.float(), dim=-1).cpu()
