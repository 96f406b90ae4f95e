import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.compat import WebDataset

from vqd_scale.core.errors import UserError
from vqd_scale.data.index import Shard, ShardSet
from vqd_scale.data.shards import KEY, Sample, ShardRecipe, read_shard, write_shard_set
from vqd_scale.inference.bundle import load_tokenizer, save_tokenizer
from vqd_scale.inference.tokenize import (
    CaptionsConfig,
    EncodingConfig,
    TokenizeConfig,
    TokenSetMeta,
    tokenize_shards,
)
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import to_signal
from vqd_scale.tokenizers.taming import TamingGumbel, TamingGumbelConfig
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

CPU = torch.device("cpu")
SHAPE = VQGANConfig(
    codes=9, code_width=4, channels=8, multipliers=(1, 2), residual_blocks=1, patch=2, norm="none"
)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        return file.getvalue()


def pictures(start: int, count: int) -> list[Sample]:
    return [
        {KEY: f"{n:05d}", "png": png(n), "txt": f"picture {n}", "json": {"number": n}, "cls": n % 3}
        for n in range(start, start + count)
    ]


@pytest.fixture
def config(tmp_path: Path) -> TokenizeConfig:
    torch.manual_seed(0)
    vqgan = VQGAN(SHAPE)
    vqgan.quantize.embedding.copy_(torch.randn(9, 4) * 0.1)
    save_tokenizer(tmp_path / "tokenizer", SHAPE, vqgan.state_dict())
    recipes = [
        ShardRecipe("000000.tar", 5, lambda: pictures(0, 5)),
        ShardRecipe("000001.tar", 3, lambda: [*pictures(5, 2), {KEY: "bad", "png": b"no", "txt": "?"}]),
    ]
    write_shard_set(tmp_path / "images", {"kind": "images"}, recipes, "images")
    return TokenizeConfig(
        images=tmp_path / "images",
        out=tmp_path / "tokens",
        tokenizer=tmp_path / "tokenizer",
        size=16,
        captions=CaptionsConfig(context_length=8, merges=300),
        batch=4,
    )


def test_tokens_are_the_tokenizers_and_everything_else_is_kept(config: TokenizeConfig) -> None:
    shards = tokenize_shards(config, CPU)
    tokenizer = load_tokenizer(config.tokenizer, CPU)
    assert shards.count == 7
    for number, row in enumerate(row for shard in shards.shards for row in rows(shard)):
        pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(png(number)))).copy())
        expected = tokenizer.encode(to_signal(pixels.permute(2, 0, 1)[None])).flatten()
        assert row["tokens.npy"].dtype == np.uint16
        assert row["tokens.npy"].tolist() == expected.tolist()
        assert (row["text.npy"] == CaptionTokenizer(8, 300)([f"picture {number}"])[0]).all()
        assert row["txt"] == f"picture {number}"
        assert row["json"] == {"number": number}
        assert row["cls"] == number % 3
    assert "bad" in (config.out / "quarantine.jsonl").read_text()


def test_codes_do_not_depend_on_the_batch_and_a_second_run_changes_no_byte(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    first = tokenize_shards(config, CPU)
    again = tokenize_shards(config, CPU)
    assert first == again
    other = config.model_copy(update={"out": tmp_path / "other", "batch": 3})
    for mine, theirs in zip(first.shards, tokenize_shards(other, CPU).shards, strict=True):
        assert mine.sha256 == theirs.sha256


def test_the_set_knows_its_tokenizer_and_vocabulary(config: TokenizeConfig, tmp_path: Path) -> None:
    meta = TokenSetMeta.of(tokenize_shards(config, CPU))
    assert (meta.codes, meta.grid) == (9, (4, 4))
    meta.check(config.tokenizer, CaptionTokenizer(8, 300), config.out)
    with pytest.raises(UserError, match="tokenized otherwise"):
        meta.check(config.tokenizer, CaptionTokenizer(9, 300), config.out)
    save_tokenizer(tmp_path / "other", SHAPE, VQGAN(SHAPE).state_dict())
    with pytest.raises(UserError, match="made by another tokenizer"):
        meta.check(tmp_path / "other", CaptionTokenizer(8, 300), config.out)


def test_another_tokenizer_into_the_same_folder_is_refused(config: TokenizeConfig, tmp_path: Path) -> None:
    tokenize_shards(config, CPU)
    save_tokenizer(tmp_path / "other", SHAPE, VQGAN(SHAPE).state_dict())
    with pytest.raises(UserError, match="another"):
        tokenize_shards(config.model_copy(update={"tokenizer": tmp_path / "other"}), CPU)


def test_trap_23_sampled_codes_are_asked_for_repeat_and_are_said(
    config: TokenizeConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = TamingGumbelConfig(
        codes=9,
        code_width=4,
        channels=32,
        multipliers=(1, 2),
        residual_blocks=1,
        latent_width=4,
        attention=(),
    )
    save_tokenizer(tmp_path / "gumbel", shape, TamingGumbel(shape).state_dict())
    best = config.model_copy(update={"tokenizer": tmp_path / "gumbel", "out": tmp_path / "best"})
    drawn = best.model_copy(update={"out": tmp_path / "drawn", "encoding": EncodingConfig(sampled=3)})
    again = drawn.model_copy(update={"out": tmp_path / "again", "batch": 3})
    digests = [
        [shard.sha256 for shard in tokenize_shards(one, CPU).shards] for one in (best, best, drawn, again)
    ]
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert not set(digests[0]) & set(digests[2])
    assert TokenSetMeta.of(ShardSet.open(best.out)).encoding == "best codes, fp32"
    assert TokenSetMeta.of(ShardSet.open(drawn.out)).encoding == "codes drawn with seed 3, fp32"
    with pytest.raises(UserError, match="another"):
        tokenize_shards(best.model_copy(update={"encoding": EncodingConfig(sampled=3)}), CPU)
    with pytest.raises(UserError, match="VQGAN gives no probabilities"):
        tokenize_shards(config.model_copy(update={"encoding": EncodingConfig(sampled=3)}), CPU)


def test_bfloat16_gives_mostly_the_same_codes_and_is_said(config: TokenizeConfig, tmp_path: Path) -> None:
    quick = config.model_copy(
        update={"out": tmp_path / "quick", "encoding": EncodingConfig(precision="bf16")}
    )
    codes = [
        np.concatenate(
            [row["tokens.npy"] for shard in tokenize_shards(one, CPU).shards for row in rows(shard)]
        )
        for one in (config, quick)
    ]
    assert (codes[0] == codes[1]).mean() > 0.9
    assert TokenSetMeta.of(ShardSet.open(quick.out)).encoding == "best codes, bf16"


def rows(shard: Shard) -> list[dict[str, Any]]:
    return list(cast(Any, WebDataset(str(shard.path), shardshuffle=False).decode()))


def test_wrong_sizes_and_wrong_shards_are_one_sentence(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        tokenize_shards(config.model_copy(update={"size": 18}), CPU)
    with pytest.raises(UserError, match="hold no tokens"):
        TokenSetMeta.of(ShardSet.open(config.images))
    assert next(iter(read_shard(ShardSet.open(config.images).shards[0])))[KEY] == "00000"
