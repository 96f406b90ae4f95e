import pickle

import pytest
import torch

from vqd_scale.core.errors import UserError
from vqd_scale.text.clip import CaptionTokenizer, Pretrained, TextEncoder, Tower

SMALL = Tower(context_length=10, width=16, heads=2, layers=1, merges=600)


def test_trap_15_ids_start_end_and_are_padded_with_zero() -> None:
    ids = CaptionTokenizer()(["a", "", "two Words"])
    assert ids.shape == (3, 77)
    assert ids[0, :4].tolist() == [49406, 320, 49407, 0]
    assert ids[1, :3].tolist() == [49406, 49407, 0]
    assert (ids[2] == CaptionTokenizer()(["two words"])[0]).all()


def test_long_captions_keep_the_end_token() -> None:
    ids = CaptionTokenizer(context_length=6)(["one two three four five six seven"])
    assert ids[0, -1] == 49407


@pytest.mark.parametrize("merges", [0, 600, 4096])
def test_fewer_merges_are_the_first_of_all_merges(merges: int) -> None:
    tokenizer = CaptionTokenizer(context_length=77, merges=merges)
    ids = tokenizer(["a small red circle at the top left"])[0]
    assert ids.max() < tokenizer.vocabulary
    assert ids[0] == tokenizer.vocabulary - 2
    assert tokenizer.vocabulary == 512 + merges + 2


def test_tokenizer_is_picklable_and_its_fingerprint_tells_vocabularies_apart() -> None:
    tokenizer = CaptionTokenizer(context_length=24, merges=600)
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    others = [CaptionTokenizer(24, 601), CaptionTokenizer(25, 600), CaptionTokenizer()]
    assert tokenizer.fingerprint not in [other.fingerprint for other in others]


def encode(config: Tower, dropped: list[bool]) -> tuple[TextEncoder, torch.Tensor]:
    torch.manual_seed(0)
    encoder = TextEncoder(config)
    ids = torch.from_numpy(encoder.tokenizer(["a red circle", "a blue star"]))
    return encoder, encoder(ids, torch.tensor(dropped))


def test_features_are_per_token_and_of_unit_length() -> None:
    _, features = encode(SMALL, [False, False])
    assert features.shape == (2, 10, 16)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 10))
    _, raw = encode(SMALL.model_copy(update={"normalise": False}), [False, False])
    torch.testing.assert_close(raw / raw.norm(dim=-1, keepdim=True), features)


def test_dropped_captions_see_the_learned_null() -> None:
    encoder, features = encode(SMALL, [True, False])
    assert encoder.null is not None
    torch.testing.assert_close(features[0], encoder.null)
    assert not torch.allclose(features[1], encoder.null)


def test_dropped_captions_see_the_empty_caption() -> None:
    config = SMALL.model_copy(update={"no_caption": "empty"})
    encoder, features = encode(config, [True, False])
    empty = torch.from_numpy(encoder.tokenizer(["", ""]))
    torch.testing.assert_close(features[0], encoder(empty, torch.tensor([False, False]))[0])


def test_openai_weights_demand_quick_gelu() -> None:
    with pytest.raises(UserError, match="QuickGELU"):
        TextEncoder(Pretrained(model="ViT-B-32", pretrained="openai"))


def test_unknown_models_and_weights_are_one_sentence() -> None:
    with pytest.raises(UserError, match="knows no model"):
        TextEncoder(Pretrained(model="ViT-Z-99"))
    with pytest.raises(UserError, match="cannot be loaded"):
        TextEncoder(Pretrained(model="ViT-B-32-quickgelu", pretrained="/nowhere/weights.pt"))
