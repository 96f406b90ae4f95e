"""Options, numbers and images that a user gives to the pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import write_model
from vqd_scale.core.errors import UserError
from vqd_scale.models.pipeline import TextToImage

PROMPTS = ["a red circle", "a blue star"]


@pytest.fixture
def pipe(tmp_path: Path) -> TextToImage:
    return TextToImage.load(write_model(tmp_path), device="cpu")


def test_decoder_overflow_in_half_precision_is_no_black_image(pipe: TextToImage) -> None:
    tokenizer: Any = pipe.bundle.tokenizer
    tokenizer.decoder.conv_out.bias.fill_(6e4)
    tokenizer.decoder.conv_out.weight.fill_(6e4)
    pipe(PROMPTS, steps=2)
    with pytest.raises(UserError, match="in float16 the decoder's values overflow, take bfloat16 or float32"):
        pipe.to(torch.float16)(PROMPTS, steps=2)
