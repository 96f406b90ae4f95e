"""What the tools that draw share: which model, and in which precision."""

import argparse

import torch

from vqd_scale.models.generate import Pipeline, load_pipeline
from vqd_scale.models.pipeline import TextToImage

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model and ``--dtype``."""
    parser.add_argument(
        "model", help="a run's folder, a model bundle, a diffusers folder, or s3://bucket/key"
    )
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="float32", help="what the networks compute in"
    )


def load_any_model(arguments: argparse.Namespace) -> Pipeline:
    """The pipeline that the arguments of `add_model_arguments` name, whatever kind of model it is.

    Raises:
        UserError: There is no such model, or a file of it is damaged.
    """
    return load_pipeline(arguments.model, dtype=_DTYPES[arguments.dtype])


def load_model(arguments: argparse.Namespace) -> TextToImage:
    """The same of a model that denoises, for what no other can do.

    Raises:
        UserError: There is no such model, or a file of it is damaged.
    """
    return TextToImage.load(arguments.model, dtype=_DTYPES[arguments.dtype])
