"""Options for the model and for sampling, shared by the tools that generate images."""

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

    sampler: Annotated[str, typer.Option(metavar="KIND", help=f"sampler: {_KINDS}")] = "strided"
    sampler_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="setting of the sampler, such as weight=2; repeatable"),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="sampling steps, each one forward pass (default: the sampler's)")
    ] = None
    guidance_scale: Annotated[
        float, typer.Option(help="scale of classifier-free guidance; 1 disables it")
    ] = 3.0
    top_p: Annotated[
        float | None, typer.Option(help="sample only from the most probable codes of this total probability")
    ] = None
    seed: Annotated[int, typer.Option(help="seed of the samples")] = 0
    batch_size: Annotated[int, typer.Option(help="images per batch")] = 32

    def config(self) -> SamplingConfig:
        """Return the validated configuration.

        Raises:
            UserError: The kind of the sampler is unknown, or a value is wrong.
        """
        settings = [*([] if self.steps is None else [f"steps={self.steps}"]), *(self.sampler_option or [])]
        truncation = ["truncation.kind=top_p", f"truncation.p={self.top_p}"]
        return load_config(
            SamplingConfig,
            overrides=[
                f"sampler.kind={self.sampler}",
                *(f"sampler.{setting}" for setting in settings),
                "guidance.kind=constant",
                f"guidance.scale={self.guidance_scale}",
                *([] if self.top_p is None else truncation),
                f"seed={self.seed}",
                f"batch_size={self.batch_size}",
            ],
        )
