from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vqd_scale.core.config import load_config
from vqd_scale.core.errors import UserError
from vqd_scale.core.world import World
from vqd_scale.data.loading.batch import TokenBatch
from vqd_scale.data.loading.stream import StreamConfig
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.training.tasks.denoising import DenoisingTask, TrainConfig

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


def test_trap_34_a_tenth_of_the_captions_is_dropped_whatever_the_batch(
    token_world: Path, tmp_path: Path
) -> None:
    source = task_of(token_world, tmp_path, 0.1).source
    _, dropped = source.condition_inputs(batch(0, ["a red picture"] * 10_000))
    # Five standard deviations of a binomial share.
    assert abs(dropped.float().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 10_000) ** 0.5
    _, some = source.condition_inputs(batch(137, ["a red picture"] * 50))
    assert torch.equal(some, dropped[137:187])


def test_trap_34_the_null_embedding_learns_from_dropped_and_empty_captions_only(
    token_world: Path, tmp_path: Path
) -> None:
    task = task_of(token_world, tmp_path, 0.5)
    null = task.module.model.text.null
    assert null is not None
    captions = ["a red picture", "a blue picture", "", "a green picture"] * 4
    _, dropped = task.source.condition_inputs(batch(0, captions))
    sees_null = dropped | torch.tensor([caption == "" for caption in captions])
    assert dropped.any()
    assert not dropped.all()
    losses = task.losses(task.module, batch(0, captions), 0).per_sample
    for loss, expected in zip(losses, sees_null, strict=True):
        (gradient,) = torch.autograd.grad(loss, [null], retain_graph=True)
        assert bool(gradient.any()) == bool(expected)


def test_sets_that_are_mixed_must_be_alike(
    token_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many grids and vocabularies as there are sets: each is looked at, not the first one alone."""
    config = load_config(TrainConfig, token_world / "train.yaml", [f"run={tmp_path}"])
    both = {"path": None, "sources": [{"path": config.data.path}, {"path": config.data.path, "weight": 3}]}
    mixed = config.model_copy(update={"data": StreamConfig.model_validate(config.data.model_dump() | both)})
    task = DenoisingTask(mixed, ALONE)
    assert task.read == DenoisingTask(config, ALONE).read
    metas = iter([task.source.meta, replace(task.source.meta, grid=(9, 9))])

    def of(shards: ShardSet) -> TokenSetMeta:
        del shards
        return next(metas)

    monkeypatch.setattr(TokenSetMeta, "of", of)
    with pytest.raises(UserError, match=r"holds grids of \(9, 9\)"):
        DenoisingTask(mixed, ALONE)


def test_nothing_starts_from_a_codebook_that_was_never_placed(token_world: Path, tmp_path: Path) -> None:
    """The zeros that a tokenizer begins with would be divided by their deviation, and the loss be blamed."""
    overrides = [f"run={tmp_path}", "embedding_init_std=0.2"]
    with pytest.raises(UserError, match="do not differ, so nothing can start from them"):
        DenoisingTask(load_config(TrainConfig, token_world / "train.yaml", overrides), ALONE)
