"""The model card: what a bundle says of itself to people."""

from collections.abc import Mapping
from dataclasses import dataclass

_TOLD = {"text": "a caption", "class": "a class", "none": "nothing"}


@dataclass(frozen=True)
class ModelKind:
    """What sort of model it is, in words.

    Attributes:
        name: What it is called.
        loader: The class that draws with it, as ``from vqd_scale.models. ... import`` names it.
        how: How it draws, to follow a comma.
        source: The papers.
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
    """The card as Markdown.

    Args:
        kind: What sort of model.
        grid: Rows and columns of tokens.
        codes: K.
        condition: The kind of its condition.
        facts: What else is known, a row each.
        origin: Where the weights come from, and what is known of their licence.
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
