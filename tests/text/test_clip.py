import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqd_scale.text.clip import CaptionTokenizer, TextEncoder
from vqd_scale.text.config import Tower

SMALL = Tower(context_length=10, width=16, heads=2, layers=1, bpe_merges=600)


def test_ids_have_start_and_end_and_zero_padding() -> None:
    ids = CaptionTokenizer()(["a", "", "two Words"])
    assert ids.shape == (3, 77)
    assert ids[0, :4].tolist() == [49406, 320, 49407, 0]
    assert ids[1, :3].tolist() == [49406, 49407, 0]
    assert (ids[2] == CaptionTokenizer()(["two words"])[0]).all()


def test_long_captions_keep_the_end_token() -> None:
    ids = CaptionTokenizer(context_length=6)(["one two three four five six seven"])
    assert ids[0, -1] == 49407


@pytest.mark.parametrize("merges", [0, 600, 4096])
def test_fewer_merges_are_a_prefix_of_all_merges(merges: int) -> None:
    tokenizer = CaptionTokenizer(context_length=77, merges=merges)
    ids = tokenizer(["a small red circle at the top left"])[0]
    assert ids.max() < tokenizer.vocabulary
    assert ids[0] == tokenizer.vocabulary - 2
    assert tokenizer.vocabulary == 512 + merges + 2


def test_tokenizer_pickles_and_fingerprints_its_vocabulary() -> None:
    tokenizer = CaptionTokenizer(context_length=24, merges=600)
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    other_tokenizers = [CaptionTokenizer(24, 601), CaptionTokenizer(25, 600), CaptionTokenizer()]
    assert tokenizer.fingerprint not in [
        tokenizer_variant.fingerprint for tokenizer_variant in other_tokenizers
    ]


def encode(config: Tower, dropped: list[bool]) -> tuple[TextEncoder, torch.Tensor]:
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    ids = torch.from_numpy(encoder.tokenizer(["a red circle", "a blue star"]))
    return encoder, encoder(ids, torch.tensor(dropped))


def test_features_are_per_token_and_of_unit_length() -> None:
    _, features = encode(SMALL, [False, False])
    assert features.shape == (2, 10, 16)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 10))
    _, raw = encode(SMALL.model_copy(update={"normalize": False}), [False, False])
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), features)


def test_dropped_captions_use_the_learned_null() -> None:
    encoder, features = encode(SMALL, [True, False])
    assert encoder.null is not None
    torch.testing.assert_close(features[0], encoder.null)
    assert not torch.allclose(features[1], encoder.null)


def test_dropped_captions_use_the_empty_caption() -> None:
    config = SMALL.model_copy(update={"null_condition": "empty"})
    encoder, features = encode(config, [True, False])
    empty = torch.from_numpy(encoder.tokenizer(["", ""]))
    torch.testing.assert_close(features[0], encoder(empty, torch.tensor([False, False]))[0])


def test_features_cover_all_positions_and_padding() -> None:
    """Without an attention mask, padding ids change the features after the end token."""
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL)
    ids = torch.from_numpy(encoder.tokenizer(["a red circle"]))
    length = int((ids != 0).sum())
    padded_with_end = torch.where(ids == 0, ids.max(), ids)
    is_dropped = torch.tensor([False])
    with_zeros, with_end = encoder(ids, is_dropped)[0], encoder(padded_with_end, is_dropped)[0]
    assert length < 10
    torch.testing.assert_close(with_zeros[:length], with_end[:length])
    assert (with_zeros[length:] - with_end[length:]).norm(dim=-1).min() > 1e-3


def test_tower_uses_quick_gelu() -> None:
    encoder = TextEncoder(SMALL)
    activations = {type(module) for module in encoder.modules() if "GELU" in type(module).__name__}
    assert [activation.__name__ for activation in activations] == ["QuickGELU"]
    one: Tensor = activations.pop()()(torch.ones(1))
    torch.testing.assert_close(one.item(), 0.845796, atol=1e-6, rtol=0)
    torch.testing.assert_close(nn.GELU()(torch.ones(1)).item(), 0.841345, atol=1e-6, rtol=0)


def test_trained_parameters_have_one_dtype() -> None:
    encoder = TextEncoder(SMALL)
    assert encoder.null is not None
    assert encoder.null.dtype == torch.float32
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_empty_caption_is_the_null_condition() -> None:
    """Token shards contain ids, so an empty caption is recognized by its ids."""
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL)
    assert encoder.null is not None
    ids = torch.from_numpy(encoder.tokenizer(["", " ", "a"]))
    features = encoder(ids, torch.tensor([False, False, False]))
    torch.testing.assert_close(features[0], encoder.null)
    torch.testing.assert_close(features[1], encoder.null)
    assert not torch.allclose(features[2], encoder.null)


def test_null_embedding_gradient_comes_from_dropped_samples() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(SMALL)
    assert encoder.null is not None
    ids = torch.from_numpy(encoder.tokenizer(["a red circle", "", "a blue star", "a green square"]))
    upstream = torch.randn(4, 10, 16)
    features = encoder(ids, torch.tensor([True, False, False, False]))
    grads: tuple[Any, ...] = torch.autograd.grad(
        (features * upstream).sum(), [encoder.null, encoder.tower.token_embedding.weight]
    )
    torch.testing.assert_close(grads[0], upstream[0] + upstream[1])
    word = int(encoder.tokenizer(["red"])[0, 1])
    blue_id = int(encoder.tokenizer(["blue"])[0, 1])
    assert grads[1][word].abs().max() == 0
    assert grads[1][blue_id].abs().max() > 0
    none_dropped = encoder(ids[2:], torch.tensor([False, False]))
    (unreached,) = torch.autograd.grad((none_dropped * upstream[2:]).sum(), [encoder.null])
    assert unreached.abs().max() == 0
