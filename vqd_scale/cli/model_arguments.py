"""Model and precision arguments, shared by the sampling tools."""

import argparse

import torch

from vqd_scale.models.generate import Pipeline, load_pipeline
from vqd_scale.models.pipeline import TextToImage

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the model and ``--dtype``."""
    parser.add_argument(
        "model", help="a run's folder, a model bundle, a diffusers folder, or s3://bucket/key"
    )
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="what the networks compute in"
    )


def load_any_model(arguments: argparse.Namespace) -> Pipeline:
    """Load the pipeline named by the arguments of `add_model_arguments`, for any kind of model.

    Raises:
        UserError: The model does not exist, or one of its files is damaged.
    """
    return load_pipeline(arguments.model, dtype=_DTYPES[arguments.dtype])


def load_model(arguments: argparse.Namespace) -> TextToImage:
    """Load the pipeline of a diffusion model, for features that other models lack, such as inpainting.

    Raises:
        UserError: The model does not exist, or one of its files is damaged.
    """
    return TextToImage.load(arguments.model, dtype=_DTYPES[arguments.dtype])
