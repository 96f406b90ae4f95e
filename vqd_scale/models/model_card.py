"""Model card of a bundle, in Markdown."""

from collections.abc import Mapping
from dataclasses import dataclass

_TOLD = {"text": "a caption", "class": "a class", "none": "nothing"}


@dataclass(frozen=True)
class ModelKind:
    """Texts of the model card that depend on the kind of model.

    Attributes:
        name: Name of the kind.
        loader: Pipeline class, in the form that follows ``from vqd_scale.models.``.
        how: Sampling procedure, as a phrase that follows a comma.
        source: Papers.
    """

    name: str
    loader: str
    how: str
    source: str


DENOISING = ModelKind(
    "VQ-Diffusion",
    "pipeline import TextToImage",
    "undoing mask-and-replace noise step by step",
    "Gu et al., arXiv 2111.14822; Tang et al., arXiv 2205.16007",
)
AUTOREGRESSION = ModelKind(
    "VQ-AR",
    "autoregressive_sampling import AutoregressiveTextToImage",
    "one token after the other in raster order",
    "the autoregressive peer of VQ-Diffusion, Gu et al., arXiv 2111.14822",
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
    rows = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    return f"""# A {kind.name} model

It draws pictures as {grid[0]} x {grid[1]} tokens of {codes} codes,
{kind.how} under {_TOLD[condition]}
({kind.source}).

```python
from vqd_scale.models.{kind.loader}

{kind.loader.split()[-1]}.load("this folder")
```

| | |
|---|---|
{rows}

## Origin and licence

{origin}
"""
