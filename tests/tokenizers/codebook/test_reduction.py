from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from vqd_scale.core.errors import UserError
from vqd_scale.tokenizers.base import ImageTokenizer, SamplingKey
from vqd_scale.tokenizers.codebook.reduction import (
    Reduced,
    check_map,
    inverse,
    map_from_counts,
    map_to_nearest,
    read_map,
    used_codes,
)
from vqd_scale.tokenizers.config import TamingGumbelConfig
from vqd_scale.tokenizers.taming import TamingGumbel


def published_like_map() -> Tensor:
    """Return a map of 8,192 codes of which 2,886 are used; the first is unused."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(8192, dtype=torch.int64)
    counts[1 + torch.randperm(8191, generator=generator)[:2886]] = 1
    return map_from_counts(counts)


def test_full_to_reduced_round_trip() -> None:
    map = published_like_map()
    back = inverse(map)
    used = map.nonzero()[:, 0]
    assert len(map.unique()) == 2887
    assert int(map.max()) + 1 == 2887
    assert torch.equal(back[map[used]], used)
    assert torch.equal(map[back], torch.arange(2887))
    assert int((map == 0).sum()) == 5306
    assert back[0] == 0
    assert (used.diff() > 0).all()
    assert torch.equal(map[used], torch.arange(1, 2887))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(1, 4))
def test_used_codes_keep_their_order_and_unused_ones_share_id_0(counts: list[int], least: int) -> None:
    used = [code for code, count in enumerate(counts) if count >= least]
    unused = [code for code, count in enumerate(counts) if count < least]
    if not used or not unused:
        with pytest.raises(UserError, match="nothing to reduce"):
            map_from_counts(torch.tensor(counts), least)
        return
    map = map_from_counts(torch.tensor(counts), least)
    check_map(map, len(counts), len(used) + 1, "map")
    assert map.tolist() == [0 if code in unused else 1 + used.index(code) for code in range(len(counts))]
    assert inverse(map).tolist() == [unused[0], *used]


def gumbel() -> TamingGumbel:
    torch.manual_seed(0)
    config = TamingGumbelConfig(
        codebook_size=12,
        code_dim=4,
        channels=32,
        channel_multipliers=(1, 1),
        num_res_blocks=1,
        latent_channels=4,
        attention=(),
    )
    return TamingGumbel(config).requires_grad_(False)


def reduced() -> Reduced:
    tokenizer = Reduced(gumbel(), codes=6)
    state = tokenizer.state_dict()
    state["map"] = torch.tensor([0, 1, 0, 2, 0, 0, 3, 0, 4, 0, 5, 0])
    tokenizer.load_state_dict(state)
    return tokenizer


def test_unused_codes_become_0_and_decode_as_the_first_of_them() -> None:
    full, tokenizer = gumbel(), reduced()
    protocol: ImageTokenizer = tokenizer
    images = torch.rand(3, 3, 16, 12) * 2 - 1
    all_codes, tokens = full.encode(images), protocol.encode(images)
    assert torch.equal(tokens, tokenizer.map[all_codes])
    is_used = torch.isin(all_codes, torch.tensor([1, 3, 6, 8, 10]))
    assert is_used.any()
    assert not is_used.all()
    as_decoded = torch.where(is_used, all_codes, 0)
    assert torch.equal(tokenizer.decode(tokens), full.decode(as_decoded))
    assert torch.equal(tokenizer.code_vectors(), full.code_vectors()[[0, 1, 3, 6, 8, 10]])
    assert torch.equal(protocol.latents(images), full.latents(images))
    assert (protocol.codes, protocol.factor) == (6, 2)
    with pytest.raises(ValueError, match=r"expected codes 0\.\.5"):
        tokenizer.decode(torch.full((1, 2, 2), 6))


def test_map_is_state_and_moves_with_the_model() -> None:
    tokenizer = reduced()
    assert torch.equal(tokenizer.state_dict()["map"], tokenizer.map)
    assert tokenizer.to("meta").map.device.type == "meta"
    fresh = Reduced(gumbel(), codes=6)
    assert not torch.equal(fresh.map, reduced().map)
    fresh.load_state_dict(reduced().state_dict())
    assert torch.equal(fresh.map, reduced().map)
    assert reduced().half().map.dtype == torch.int64


@pytest.mark.parametrize(
    ("map", "message"),
    [
        ([0, 1, 0, 2, 0, 0, 3, 0, 4, 0, 4, 0], r"ids 0\.\.4, but the model has 6 codes"),
        ([0, 1, 0, 2, 0, 0, 3, 0, 4, 0, 6, 5], r"ids 0\.\.6, but the model has 6 codes"),
        ([1, 1, 1, 2, 1, 1, 3, 1, 4, 1, 5, 1], r"ids 1\.\.5, but"),
        ([0, 1, 0, 2, 0, 0, 2, 0, 4, 0, 5, 0], r"no code leads to 1 of the ids 0\.\.5"),
    ],
)
def test_map_of_another_model_is_refused_on_load(map: list[int], message: str) -> None:
    tokenizer = reduced()
    state = tokenizer.state_dict() | {"map": torch.tensor(map)}
    with pytest.raises(UserError, match=message):
        tokenizer.load_state_dict(state)


def test_map_of_974_does_not_fit_a_codebook_of_1024() -> None:
    map = published_like_map()
    with pytest.raises(UserError, match="maps 8192 codes, but the tokenizer has 1024"):
        check_map(map, 1024, 2887, "imagenet.pt")
    with pytest.raises(UserError, match=r"ids 0\.\.2886, but the model has 974 codes"):
        check_map(map, 8192, 974, "imagenet.pt")
    with pytest.raises(UserError, match="give 1 to 12"):
        Reduced(gumbel(), codes=13)


def test_sampling_passes_through_to_the_tokenizer() -> None:
    full, tokenizer = gumbel(), reduced()
    images, sampling_key = torch.rand(2, 3, 8, 8) * 2 - 1, SamplingKey(seed=3, slots=torch.tensor([4, 9]))
    assert torch.equal(
        tokenizer.encode(images, sampling_key), tokenizer.map[full.encode(images, sampling_key)]
    )
    assert not torch.equal(tokenizer.encode(images, sampling_key), tokenizer.encode(images))
    tokenizer.compute_in(torch.bfloat16)
    state = tokenizer.state_dict()
    assert state["full.encoder.conv_in.weight"].dtype == torch.bfloat16


def test_maps_are_read_from_both_file_formats(tmp_path: Path) -> None:
    map = published_like_map()
    torch.save(map, tmp_path / "map.pt")
    save_file({"map": map.int()}, tmp_path / "map.safetensors")
    for name in ("map.pt", "map.safetensors"):
        loaded_map = read_map(tmp_path / name)
        assert loaded_map.dtype == torch.int64
        assert torch.equal(loaded_map, map)


class Planted:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_invalid_map_is_refused_and_not_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    torch.save(Planted(witness), tmp_path / "planted.pt")
    with pytest.raises(UserError, match="nothing in it was executed"):
        read_map(tmp_path / "planted.pt")
    assert not witness.exists()
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "two.pt")
    with pytest.raises(UserError, match="expected a file of one tensor"):
        read_map(tmp_path / "two.pt")
    torch.save(torch.rand(5), tmp_path / "floats.pt")
    with pytest.raises(UserError, match="expected one row of int64"):
        read_map(tmp_path / "floats.pt")
    with pytest.raises(UserError, match="no such file"):
        read_map(tmp_path / "absent.pt")


def test_without_bucket_unused_codes_join_the_nearest() -> None:
    """Lossless reduction: the first code is unused, and its id still means the nearest used one."""
    full = gumbel()
    counts = torch.tensor([0, 3, 0, 1, 0, 0, 9, 0, 2, 0, 5, 0])
    vectors = full.code_vectors()
    map = map_to_nearest(counts, vectors)
    kept_codes = used_codes(counts)
    assert kept_codes.tolist() == [1, 3, 6, 8, 10]
    assert map[kept_codes].tolist() == [0, 1, 2, 3, 4]
    for code in range(12):
        distances = (vectors[code] - vectors[kept_codes]).square().sum(dim=1)
        assert int(map[code]) == int(distances.argmin())
    tokenizer = Reduced(full, codes=5, unused="nearest")
    tokenizer.load_state_dict(tokenizer.state_dict() | {"map": map, "kept": kept_codes})
    assert (inverse(map) != kept_codes).any()
    tokens = torch.randint(0, 5, (1, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.decode(tokens), full.decode(kept_codes[tokens]))
    assert torch.equal(tokenizer.decode(map[kept_codes[tokens]]), full.decode(kept_codes[tokens]))
    assert torch.equal(tokenizer.code_vectors(), vectors[kept_codes])


def test_kept_codes_that_contradict_the_map_are_refused() -> None:
    tokenizer = Reduced(gumbel(), codes=5, unused="nearest")
    state = tokenizer.state_dict()
    with pytest.raises(UserError, match="no inverse of the map"):
        tokenizer.load_state_dict(state | {"kept": state["kept"].roll(1)})
