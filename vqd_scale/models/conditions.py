"""Conversion of prompts to the network's conditions: captions, labels or none."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.models.bundle import AnyBundleConfig, AnyModel, Bundle
from vqd_scale.nn.config import ClassCondition, Condition, TextCondition

Prompts = str | int | Sequence[str] | Sequence[int]
"""One or several captions; or labels, for a class-conditional model."""

Conditions: TypeAlias = tuple[Tensor, Tensor] | None
"""Network conditions of a batch: of the prompts, and the negative ones of classifier-free guidance, one row
per prompt each; ``None`` for an unconditional model."""


def conditions_of(
    bundle: Bundle[AnyBundleConfig, AnyModel],
    prompts: Sequence[str] | Sequence[int],
    negative: Sequence[str] | None,
) -> Conditions:
    """Compute a model's conditions for prompts, on its device and in its dtype.

    Args:
        bundle: Model.
        prompts: Captions, where an empty one means no caption; or labels, where the number of classes means
            no class.
        negative: Negative captions, one per prompt, instead of the null condition.

    Raises:
        UserError: A label is invalid, or the model takes no text and a negative prompt is given.
    """
    condition = bundle.model.condition
    check_prompts(condition, prompts, negative)
    if isinstance(condition, TextCondition):
        return _text(bundle, prompts), _text(bundle, negative or [""] * len(prompts))
    if isinstance(condition, ClassCondition):
        labels = torch.tensor([_label(prompt, condition.classes) for prompt in prompts], device=bundle.device)
        return labels, torch.full_like(labels, condition.classes)
    return None


def check_prompts(
    condition: Condition, prompts: Sequence[str] | Sequence[int], negative: Sequence[str] | None
) -> None:
    """Check prompts without computing anything; arguments and errors of `conditions_of`."""
    if negative is not None and not isinstance(condition, TextCondition):
        raise UserError("this model takes no text; leave the negative prompt out.")
    if isinstance(condition, ClassCondition):
        for prompt in prompts:
            _label(prompt, condition.classes)


@torch.no_grad()
def _text(bundle: Bundle[AnyBundleConfig, AnyModel], captions: Sequence[str] | Sequence[int]) -> Tensor:
    tokenizer = bundle.model.text.tokenizer
    ids = torch.from_numpy(tokenizer([str(caption) for caption in captions])).to(bundle.device)
    # No sample is marked as dropped: the text encoder treats an empty caption as no caption.
    return bundle.model.text_features(ids, torch.zeros(len(ids), dtype=torch.bool, device=bundle.device))


def _label(prompt: str | int, classes: int) -> int:
    label = int(prompt) if str(prompt).isdecimal() else -1
    if not 0 <= label <= classes:
        raise UserError(
            f"label '{prompt}': the classes of this model are 0 to {classes - 1}, and {classes} for none."
        )
    return label
