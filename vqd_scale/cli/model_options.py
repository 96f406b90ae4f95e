"""Options for the model and for sampling, shared by the tools that generate images."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from vqd_scale.core.config import load_config
from vqd_scale.diffusion.config import SamplerConfig
from vqd_scale.models.config import SamplingConfig

if TYPE_CHECKING:
    from vqd_scale.models.generate import Pipeline
    from vqd_scale.models.pipeline import TextToImage

_KINDS = ", ".join(str(kind.model_fields["kind"].default) for kind in get_args(get_args(SamplerConfig)[0]))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model and compute dtype."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="run folder, model bundle, diffusers folder, or s3://bucket/key of one"
        ),
    ]
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="compute dtype of the networks")
    ] = "float32"

    def load(self) -> "Pipeline":
        """Load the pipeline of any kind of model; errors as for `load_pipeline`."""
        import torch

        from vqd_scale.models.generate import load_pipeline

        return load_pipeline(self.model, dtype=getattr(torch, self.dtype))

    def load_denoiser(self) -> "TextToImage":
        """Load a diffusion model's pipeline, which has features that others lack, such as inpainting."""
        import torch

        from vqd_scale.models.pipeline import TextToImage

        return TextToImage.load(self.model, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampler and guidance; each option sets a key of `SamplingConfig`."""

    sampler: Annotated[
        str | None, typer.Option(metavar="KIND", help=f"sampler: {_KINDS} (default: strided)")
    ] = None
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="setting of the sampler, such as weight=2; repeatable"),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, help="sampling steps, each one forward pass (default: the sampler's)")
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, max=1000, help="scale of classifier-free guidance; 1 disables it (default: 3)"),
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="sample only from the most probable codes of this total probability")
    ] = None
    negative: Annotated[
        str | None, typer.Option(help="negative prompt: what guidance leads away from (default: no caption)")
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, max=(1 << 31) - 1, help="seed of the samples (default: 0)")
    ] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="images per batch (default: 32)")] = None

    def overrides(self, prefix: str = "") -> list[str]:
        """Return the overrides of `SamplingConfig` that the given options stand for.

        Args:
            prefix: Dotted path of the sampling options in a larger configuration, with a dot at the end.
        """
        kinds = {
            "sampler.kind": self.sampler,
            "guidance.kind": None if self.guidance_scale is None else "constant",
            "truncation.kind": None if self.top_p is None else "top_p",
        }
        values = {
            "sampler.steps": self.steps,
            "guidance.scale": self.guidance_scale,
            "truncation.p": self.top_p,
            "negative": self.negative,
            "seed": self.seed,
            "batch_size": self.batch_size,
        }
        settings = {**kinds, **values}.items()
        return [
            *(
                f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}"
                for key, value in settings
                if value is not None
            ),
            *(f"{prefix}sampler.{setting}" for setting in self.sampler_option or []),
        ]

    def config(self) -> SamplingConfig:
        """Return the validated configuration.

        Raises:
            UserError: The kind of the sampler is unknown, or a value is wrong.
        """
        return load_config(SamplingConfig, overrides=["sampler.kind=strided", *self.overrides()])
