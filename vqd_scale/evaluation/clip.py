"""How well pictures fit their captions by CLIP: its score, and which caption of many it would choose."""

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
from vqd_scale.core.rng import Purpose, permutation
from vqd_scale.core.tensors import check_names, read_tensors
from vqd_scale.evaluation.extractors import checked_weights

_PROGRAMS_REST = {"input_resolution", "context_length", "vocab_size"}
"""What OpenAI's TorchScript programs leave among the weights when they are converted."""

PICTURE = "clip_picture"
CAPTION = "clip_caption"


class ClipConfig(Config):
    """Which CLIP judges.

    Attributes:
        weights: A file of its weights under open_clip's or OpenAI's names.
        model: open_clip's name of it; OpenAI's weights need one that ends in ``-quickgelu``, and say nothing
            if they do not get it.
        sha256: Digest of the file; without it any is taken, and its digest recorded.
        retrieval_candidates: Of how many captions R-precision chooses, its own one of them.
    """

    weights: Path
    model: str = "ViT-B-32-quickgelu"
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    retrieval_candidates: int = Field(default=100, ge=2)


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP.

    Attributes:
        network: open_clip's.
        tokenize: Captions to ids.
        size: Side of the pictures it sees.
        description: What its scores depend on.
        device: Where it computes.
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
        """Directions of pictures and captions, on the CPU, each of length 1."""
        ids = self.tokenize(captions).to(self.device)
        return {
            PICTURE: _direction(self.network.encode_image(self._prepared(images.to(self.device)))),
            CAPTION: _direction(self.network.encode_text(ids)),
        }

    def _prepared(self, images: Tensor) -> Tensor:
        """Its own preprocessing of squares: bicubic, anti-aliased, to its size and its range."""
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
        UserError: The file is missing or another one, or open_clip knows no such model.
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
    """The cosine of each picture and its caption: what the papers print as 0.30."""
    return (pictures * captions).sum(dim=1)


def r_precision(
    pictures: Float32[Tensor, "count width"], captions: Float32[Tensor, "count width"], among: int
) -> float:
    """The share of pictures that are nearer to their own caption than to others drawn at random.

    Captions of the same words as the own one are not counted against it.

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
    for place, number in enumerate(order.tolist()):
        # The others are those that follow it in a random order of all.
        others = captions[order[torch.arange(place + 1, place + among) % count]]
        own = captions[number]
        others = others[(others - own).abs().amax(dim=1) > 0]
        right += bool((others @ pictures[number] < own @ pictures[number]).all())
    return right / count


def _direction(features: Tensor) -> Float32[Tensor, "batch width"]:
    return functional.normalize(features.float(), dim=-1).cpu()
