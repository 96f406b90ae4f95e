"""torch-fidelity's Inception with random weights, in a file like the published one."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class _Blank(FeatureExtractorInceptionV3):
    def load_state_dict(self, *_: Any, **__: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Store the constructor's arguments."""


def write_random_inception(path: Path) -> None:
    """Return random weights that preserve the scale of activations, so that features vary."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = _Blank("blank", ["2048"], nothing)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
