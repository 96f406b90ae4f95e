from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.tasks.config import TrainConfig
from vqd_scale.training.tasks.denoising import DenoisingTask

ALONE = World(0, 1, torch.device("cpu"))
CAPTIONS = CaptionTokenizer(8, 300)


def batch(first: int, captions: list[str]) -> TokenBatch:
    count = len(captions)
    return TokenBatch(
        tokens=torch.zeros(count, 9, dtype=torch.int64),
        text=torch.from_numpy(CAPTIONS(captions)),
        slots=torch.arange(first, first + count),
        valid=torch.ones(count, dtype=torch.bool),
        keys=captions,
    )


def task_of(token_world: Path, tmp_path: Path, dropout: float) -> DenoisingTask:
    overrides = [f"run={tmp_path}", f"condition_dropout={dropout}", "text.null_condition=learned"]
    return DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)


def test_condition_dropout_rate_does_not_depend_on_batch(token_world: Path, tmp_path: Path) -> None:
    task = task_of(token_world, tmp_path, 0.1)
    _, dropped = task.condition_inputs(batch(0, ["a red picture"] * 10_000))
    # Five standard deviations of a binomial share.
    assert abs(dropped.float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5
    _, some = task.condition_inputs(batch(137, ["a red picture"] * 50))
    assert torch.equal(some, dropped[137:187])


def test_null_embedding_learns_from_dropped_and_empty_captions(token_world: Path, tmp_path: Path) -> None:
    task = task_of(token_world, tmp_path, 0.5)
    null = task.model.text.null
    assert null is not None
    captions = ["a red picture", "a blue picture", "", "a green picture"] * 4
    _, dropped = task.condition_inputs(batch(0, captions))
    sees_null = dropped | torch.tensor([caption == "" for caption in captions])
    assert dropped.any()
    assert not dropped.all()
    losses = task.losses(task.module, batch(0, captions), 0).per_sample
    for loss, expected in zip(losses, sees_null, strict=True):
        (gradient,) = torch.autograd.grad(loss, [null], retain_graph=True)
        assert bool(gradient.any()) == bool(expected)


def test_mixed_datasets_must_have_equal_metadata(
    token_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grid and vocabulary of every dataset are checked, not only of the first."""
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])
    mixture = {"path": None, "sources": [{"path": config.data.path}, {"path": config.data.path, "weight": 3}]}
    mixed = config.model_copy(
        update={"data": StreamConfig.model_validate(config.data.model_dump() | mixture)}
    )
    task = DenoisingTask(mixed, ALONE)
    assert task.samples() == DenoisingTask(config, ALONE).samples()
    metas = iter([task.meta, replace(task.meta, grid=(9, 9))])

    def of(shards: ShardSet) -> TokenSetMeta:
        del shards
        return next(metas)

    monkeypatch.setattr(TokenSetMeta, "of", of)
    with pytest.raises(UserError, match=r"contains grids of \(9, 9\)"):
        DenoisingTask(mixed, ALONE)


def test_uninitialized_codebook_is_refused_for_embeddings(token_world: Path, tmp_path: Path) -> None:
    """A new tokenizer's zeros would be divided by their standard deviation and give a NaN loss."""
    overrides = [f"run={tmp_path}", "embedding_init_std=0.2"]
    with pytest.raises(UserError, match="are equal in some dimension, so embeddings cannot be"):
        DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)
