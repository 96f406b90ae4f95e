"""Availability of the Triton kernels; the only module of this folder importable without Triton."""

import os
from importlib.util import find_spec

import torch


def has_kernels(device: torch.device) -> bool:
    """Return whether tensors on ``device`` use the Triton kernels: on a GPU with Triton installed.

    With ``TRITON_INTERPRET=1`` Triton runs its kernels in numpy on any device, for tests and debugging.
    """
    return is_interpreted() or (device.type == "cuda" and find_spec("triton") is not None)


def is_interpreted() -> bool:
    """Return whether kernels are interpreted; Triton reads the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
