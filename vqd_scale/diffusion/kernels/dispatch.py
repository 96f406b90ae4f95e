"""Where the Triton kernels run; the only module of this folder that may be imported without Triton."""

import os
from importlib.util import find_spec

import torch


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels: on a GPU, if Triton is installed.

    With ``TRITON_INTERPRET=1`` Triton runs its kernels in numpy, on any device: for tests and debugging.
    """
    return is_interpreted() or (device.type == "cuda" and find_spec("triton") is not None)


def is_interpreted() -> bool:
    """Whether kernels are interpreted; Triton asks the environment when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
