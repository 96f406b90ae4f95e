"""Where the Triton kernels run; the only module of this folder that may be imported without Triton."""

from importlib.util import find_spec

import torch


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels: on a GPU of NVIDIA, if Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None
