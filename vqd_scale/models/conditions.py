"""Prompts as the network is told them: captions, labels, or nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.models.bundle import AnyBundleConfig, AnyModel, Bundle
from vqd_scale.nn.denoiser import ClassCondition, TextCondition

Prompts = str | int | Sequence[str] | Sequence[int]
"""One caption or several; labels, for a class-conditional model."""


@dataclass(frozen=True)
class Conditions:
    """A batch's conditions as the network takes them.

    Attributes:
        given: Of the prompts; ``None`` for an unconditional model.
        absent: What guidance leads away from, a row for each prompt; ``None`` for an unconditional model.
    """

    given: Tensor | None
    absent: Tensor | None


def conditions_of(
    bundle: Bundle[AnyBundleConfig, AnyModel],
    prompts: Sequence[str] | Sequence[int],
    negative: Sequence[str] | None,
) -> Conditions:
    """What a model is told for these prompts, on its device and in its dtype.

    Args:
        bundle: The model.
        prompts: Captions, an empty one being no caption; labels, where the number of classes says "none".
        negative: Captions that take the place of "no caption", a row for each prompt.

    Raises:
        UserError: A label is none, or a negative prompt is given to a model that takes no text.
    """
    condition = bundle.model.condition
    if isinstance(condition, TextCondition):
        return Conditions(_text(bundle, prompts), _text(bundle, negative or [""] * len(prompts)))
    if negative is not None:
        raise UserError("this model takes no text; leave the negative prompt out.")
    if isinstance(condition, ClassCondition):
        labels = torch.tensor([_label(prompt, condition.classes) for prompt in prompts], device=bundle.device)
        return Conditions(labels, torch.full_like(labels, condition.classes))
    return Conditions(None, None)


@torch.no_grad()
def _text(bundle: Bundle[AnyBundleConfig, AnyModel], captions: Sequence[str] | Sequence[int]) -> Tensor:
    tokenizer = bundle.model.text.tokenizer
    ids = torch.from_numpy(tokenizer([str(caption) for caption in captions])).to(bundle.device)
    # None is dropped: the encoder itself takes an empty caption for none.
    return bundle.model.text_features(ids, torch.zeros(len(ids), dtype=torch.bool, device=bundle.device))


def _label(prompt: str | int, classes: int) -> int:
    label = int(prompt) if str(prompt).isdecimal() else -1
    if not 0 <= label <= classes:
        raise UserError(
            f"label '{prompt}': this model knows the classes 0 to {classes - 1}, and {classes} for none."
        )
    return label
