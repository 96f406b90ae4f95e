"""Prompts of an evaluation: selection and order of captions or classes, and their digest."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vqd_scale.core.arrays import NDArray
from vqd_scale.core.errors import UserError
from vqd_scale.core.rng import Purpose, integers, permutation
from vqd_scale.data.loading.sample_readers import SampleLocation, caption_of
from vqd_scale.data.shards.decode import BadSample, decode_json
from vqd_scale.data.shards.shard_index import ShardSet
from vqd_scale.data.shards.shard_io import ShardReader
from vqd_scale.data.sources.shapes import Scene
from vqd_scale.evaluation.config import Captions, Classes, Nothing, PromptsConfig


@dataclass(frozen=True)
class EvaluationPrompt:
    """Prompt of one image.

    Attributes:
        text: Caption, class index, or empty string.
        member: Index of the sample in the dataset; -1 without a dataset.
        key: Key of the sample.
        caption: Index of the caption among the sample's captions.
        scene: Scene that the image should show; only for samples of the embedded shapes dataset.
    """

    text: str
    member: int = -1
    key: str = ""
    caption: int = 0
    scene: Scene | None = None


def choose_prompts(config: PromptsConfig, shards: ShardSet | None) -> list[EvaluationPrompt]:
    """Return the prompts in image order, a deterministic function of configuration and dataset.

    Args:
        config: Prompt selection.
        shards: Dataset of the captions.

    Raises:
        UserError: Captions are selected without a dataset, the dataset has too few, or one cannot be read.
    """
    if isinstance(config, Classes):
        return [
            EvaluationPrompt(str(number * config.classes // config.count)) for number in range(config.count)
        ]
    if isinstance(config, Nothing):
        return [EvaluationPrompt("")] * config.count
    if shards is None:
        raise UserError("prompts: captions need the shards that they come from; give --data.")
    members, captions = _select_items(config, shards)
    numbers, indices = (column.tolist() for column in shards.locate(np.array(members)))
    prompts: dict[int, EvaluationPrompt] = {}
    reader_of = lru_cache(maxsize=1)(ShardReader)
    for row in sorted(range(len(members)), key=lambda row: members[row]):
        reader = reader_of(shards.shard(numbers[row]))
        prompts[row] = _prompt(reader, indices[row], captions[row], members[row])
    return [prompts[row] for row in range(len(members))]


def prompts_digest(prompts: Sequence[EvaluationPrompt]) -> str:
    """Return the hex SHA-256 of the ordered prompts: key, caption index and text of each."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.key, prompt.caption, prompt.text]).encode() + b"\n")
    return digest.hexdigest()


def _select_items(config: Captions, shards: ShardSet) -> tuple[list[int], list[int]]:
    """Return the sample index and caption index of each selected item."""
    if config.caption == "each":
        counts = _caption_counts(shards)
        all_members = np.repeat(np.arange(len(counts)), counts)
        all_captions = np.concatenate([np.arange(count) for count in counts])
    else:
        all_members = np.arange(shards.count)
        all_captions = np.zeros(shards.count, np.int64)
    items = len(all_members)
    if items < config.count:
        kind = "captions" if config.caption == "each" else "images with captions"
        raise UserError(f"{shards.folder}: holds {items} {kind}, fewer than prompts.count={config.count}.")
    order = permutation(config.seed, Purpose.EVALUATION, 0, items) if config.shuffled else np.arange(items)
    members, captions = all_members[order[: config.count]], all_captions[order[: config.count]]
    if config.caption == "random":
        # One random number per sample of the dataset, so the choice is independent of ``count``.
        words = integers(config.seed, Purpose.CAPTION_CHOICE, 0, shards.count)[members]
        captions = words * _caption_counts(shards)[members] >> 32
    return members.tolist(), captions.tolist()


def _caption_counts(shards: ShardSet) -> NDArray[np.int64]:
    counts: list[int] = []
    for shard in shards.shards:
        reader = ShardReader(shard)
        counts.extend(reader.captions(member) for member in range(shard.count))
    return np.array(counts, np.int64)


def _prompt(reader: ShardReader, member: int, caption: int, number: int) -> EvaluationPrompt:
    key = reader.key(member)
    try:
        text = caption_of(SampleLocation(reader, member, caption))
        described: Mapping[str, object] = {}
        if "json" in reader.extensions(member):
            described = decode_json(reader.read(member, "json"))
    except BadSample as error:
        raise UserError(
            f"{reader.shard.path}: sample '{key}' {error}; an evaluation needs every caption of its set."
        ) from None
    scene = Scene.from_json(dict(described)) if "figures" in described else None
    return EvaluationPrompt(text, number, key, caption, scene)
