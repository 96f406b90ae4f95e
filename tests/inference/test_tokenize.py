import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset.compat import WebDataset

from vqd_scale.core.errors import UserError
from vqd_scale.data.index import ShardSet
from vqd_scale.data.shards import KEY, Sample, ShardRecipe, read_shard, write_shard_set
from vqd_scale.inference.bundle import load_tokenizer, save_tokenizer
from vqd_scale.inference.tokenize import CaptionsConfig, TokenizeConfig, TokenSetMeta, tokenize_shards
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.base import to_signal
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
    rows: list[dict[str, Any]] = []
    for shard in shards.shards:
        rows.extend(cast(Any, WebDataset(str(shard.path), shardshuffle=False).decode()))
    for number, row in enumerate(rows):
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


def test_wrong_sizes_and_wrong_shards_are_one_sentence(config: TokenizeConfig) -> None:
    with pytest.raises(UserError, match="not a multiple"):
        tokenize_shards(config.model_copy(update={"size": 18}), CPU)
    with pytest.raises(UserError, match="hold no tokens"):
        TokenSetMeta.of(ShardSet.open(config.images))
    assert next(iter(read_shard(ShardSet.open(config.images).shards[0])))[KEY] == "00000"
