"""Model card of a bundle, in Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass

from vqd_scale.reports.html import render

_CONDITIONS = {
    "text": "conditioned on a caption",
    "class": "conditioned on a class",
    "none": "unconditionally",
}


@dataclass(frozen=True)
class ModelKind:
    """Texts of the model card that depend on the kind of model.

    Attributes:
        name: Name of the kind.
        module: Module of the pipeline class, below ``vqd_scale.models``.
        pipeline: Pipeline class.
        procedure: Sampling procedure, as a sentence without its period.
        source: Papers.
    """

    name: str
    module: str
    pipeline: str
    procedure: str
    source: str


DENOISING = ModelKind(
    "VQ-Diffusion",
    "pipeline",
    "TextToImage",
    "Sampling reverses mask-and-replace noise step by step",
    "Gu et al., arXiv 2111.14822; Tang et al., arXiv 2205.16007",
)
AUTOREGRESSION = ModelKind(
    "VQ-AR",
    "autoregressive_sampling",
    "AutoregressiveTextToImage",
    "Tokens are sampled one after the other in raster order",
    "the autoregressive baseline of VQ-Diffusion, Gu et al., arXiv 2111.14822",
)


def model_card(
    kind: ModelKind, grid: tuple[int, int], codes: int, condition: str, facts: Mapping[str, str], origin: str
) -> str:
    """Render the model card as Markdown.

    Args:
        kind: Kind of model.
        grid: Token grid (rows, columns).
        codes: K.
        condition: Kind of condition.
        facts: Further table rows, by name.
        origin: Origin of the weights and their known license.
    """
    return render(
        "model_card.md.j2",
        kind=kind,
        grid=grid,
        codes=codes,
        condition=_CONDITIONS[condition],
        facts=facts,
        origin=origin,
    )
