"""Text-to-image training by discrete diffusion, from two CPU cores to a thousand GPUs.

Public names are imported at first use, so a tool that needs no network does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqd_scale.diffusion.transition import MaskAndReplace
    from vqd_scale.launchers.slurm import launch
    from vqd_scale.models.pipeline import TextToImage
    from vqd_scale.nn.denoiser import Denoiser
    from vqd_scale.text.clip import TextEncoder
    from vqd_scale.tokenizers.base import ImageTokenizer
    from vqd_scale.training.loop import train
    from vqd_scale.training.tasks.config import TrainConfig

_HOMES = {
    "Denoiser": "vqd_scale.nn.denoiser",
    "ImageTokenizer": "vqd_scale.tokenizers.base",
    "MaskAndReplace": "vqd_scale.diffusion.transition",
    "TextEncoder": "vqd_scale.text.clip",
    "TextToImage": "vqd_scale.models.pipeline",
    "TrainConfig": "vqd_scale.training.tasks.config",
    "launch": "vqd_scale.launchers.slurm",
    "train": "vqd_scale.training.loop",
}

__all__ = [
    "Denoiser",
    "ImageTokenizer",
    "MaskAndReplace",
    "TextEncoder",
    "TextToImage",
    "TrainConfig",
    "launch",
    "train",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name not in _HOMES:
        raise AttributeError(f"module 'vqd_scale' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
