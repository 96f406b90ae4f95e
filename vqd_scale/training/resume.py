"""Identity of a run: which settings may change when it resumes, and the check of its folder at each start.

``config.yaml`` contains the configuration of the last start, ``inputs.json`` a fingerprint of what each input
path contained. A folder in which no step was saved belongs to no run yet.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from vqd_scale.core.atomic_io import (
    DAMAGED,
    PARTIAL,
    Location,
    parse_location,
    publish_json,
    publish_text,
    read_json,
)
from vqd_scale.core.config import read_yaml, to_yaml
from vqd_scale.core.errors import UserError
from vqd_scale.core.outputs import EXPORT, JOBS, TRAINING, check_output, reserve
from vqd_scale.core.provenance import modified_files, provenance
from vqd_scale.core.renamed_keys import RENAMED
from vqd_scale.core.run_lock import RunLock
from vqd_scale.core.s3 import S3Path
from vqd_scale.data.config import StreamConfig
from vqd_scale.data.shards.shard_index import INDEX, ShardSet
from vqd_scale.models.bundle import weights_file
from vqd_scale.training.checkpoint.manifest import is_checkpoint
from vqd_scale.training.config import RunConfig

ConfigType = TypeVar("ConfigType", bound=RunConfig)

logger = logging.getLogger(__name__)

CHANGEABLE: Mapping[str, str] = {
    "run": "a moved or copied folder is the same run",
    "total_images": "the learning-rate schedule follows the new end",
    "checkpoint": "no influence on the training",
    "log": "no influence on the training",
    "health": "which batches are skipped is recorded in the metrics",
    "validation": "no influence on the training",
    "sample_images": "no influence on the training",
    "engine": "weights and moments are float32 slices in every precision and stage",
    "ema": "the average continues with the new decay",
    "optim.lr": "used from the next step on",
    "optim.warmup_images": "used from the next step on",
    "optim.warmup_start_lr": "used from the next step on",
    "optim.schedule": "used from the next step on",
    "optim.lr_scaling": "used from the next step on",
    "optim.gradient_clipping": "used from the next step on",
    "optim.weight_decay": "used from the next step on",
    "optim.weight_decay_on": "used from the next step on",
    "optim.betas": "used from the next step on",
    "data.global_batch_size": "the order of the samples stays that of the first batch size",
    "data.num_workers": "not part of the order",
    "data.prefetch_batches": "not part of the order",
    "data.max_bad_fraction": "not part of the order",
    "data.ranged_reads": "not part of the order",
    "denoiser.attention": "equal up to rounding",
    "denoiser.gradient_checkpointing": "equal up to rounding",
    "network.attention": "equal up to rounding",
}
"""Keys, or parents of keys, that may change when a run resumes, each with the reason."""

_FILES = ("config.yaml", "inputs.json", "environment.json", "metrics.jsonl", "wandb-id.txt")
_INPUTS = TypeAdapter(dict[str, str])
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def claim(config: RunConfig, lock: RunLock) -> int:
    """Lock the run folder, check that it contains no other run, and write the resolved configuration to it.

    Args:
        config: Configuration of the run.
        lock: Lock of its folder, acquired here.

    Returns:
        Lanes of the run's order: its first batch size.

    Raises:
        UserError: The folder contains another run or files of someone else, or another process trains in it.
    """
    folder, checkpoints = config.run, config.run / "checkpoints"
    reserve(folder, TRAINING, _FILES, siblings=[JOBS])
    # A link in its place would be found after the last step.
    check_output(folder / "export", EXPORT)
    lock.acquire()
    record, values = folder / "inputs.json", config.model_dump(mode="json")
    stored = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else values
    inputs = read_json(record, "record of inputs", _INPUTS) if record.exists() else {}
    differing = list(_differences("", stored, config, inputs))
    lanes = _lanes(stored) or config.data.lanes
    if config.data.order_lanes not in (None, lanes):
        differing.append(("data.order_lanes", lanes, config.data.order_lanes))
    if differing and _has_saved_step(checkpoints):
        key, stored_value, value = differing[0]
        raise UserError(
            f"{folder}: contains a run with another '{key}' ({json.dumps(value)[:200]} is given); continue "
            f"it with {key}={json.dumps(stored_value)}, or begin another run with run={folder}-2."
        )
    if not _has_saved_step(checkpoints):
        lanes = config.data.lanes
    if differing:
        _delete_initial_weights(checkpoints)
        inputs = dict[str, str]()
        list(_differences("", values, config, inputs))
    publish_json(record, inputs)
    publish_text(folder / "config.yaml", to_yaml(with_lanes(config, lanes)))
    publish_json(folder / "environment.json", {**provenance(), "modified_files": modified_files()})
    return lanes


def with_lanes(config: ConfigType, lanes: int) -> ConfigType:
    """Return a run's configuration with the lanes of its order, which are explicit only if they must be."""
    data = config.data
    explicit = None if lanes == data.global_batch_size else lanes
    return config.model_copy(update={"data": data.model_copy(update={"order_lanes": explicit})})


def fingerprint(path: Location) -> str | None:
    """Return a digest of what an input contains, wherever it lies; ``None`` if it is not there.

    A dataset is identified by its index, a model by its weights. Of a large file, only some blocks are read.

    Raises:
        UserError: The dataset's index cannot be read.
    """
    if isinstance(path, S3Path) or (path / INDEX).is_file():
        shards = ShardSet.open(path, look=False)
        columns = (shards.names, shards.counts, shards.sizes, shards.digests, shards.captions)
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    file = weights_file(path) if path.is_dir() else path
    if not file.is_file():
        return None
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for block in range(_BLOCKS):
            content.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
            digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _differences(
    key: str,
    stored: Any,  # noqa: ANN401 - plain values
    value: Any,  # noqa: ANN401 - a configuration or a value of one
    inputs: dict[str, str],
) -> Iterator[tuple[str, Any, Any]]:
    """Yield key and both values wherever a setting that must not change differs from the stored one.

    Args:
        key: Dotted key of the values; empty for whole configurations.
        stored: Stored value, written by this or another version: a key that it lacks has its default.
        value: Given value.
        inputs: Fingerprints of the inputs at the first start, by key; missing ones are added.
    """
    if key in CHANGEABLE or key == "data.order_lanes":
        return
    if isinstance(value, BaseModel) and isinstance(stored, Mapping):
        yield from _field_differences(key, cast(Mapping[str, Any], stored), value, inputs)
    elif isinstance(value, tuple) and isinstance(stored, list) and len(value) == len(stored):
        for number, pair in enumerate(zip(stored, value, strict=True)):
            yield from _differences(f"{key}.{number}", *pair, inputs)
    elif isinstance(value, Path | S3Path):
        expected = inputs.get(key) or (fingerprint(parse_location(stored)) if stored else None)
        actual = fingerprint(value)
        if str(value) != stored if actual is None else actual != expected:
            yield key, stored, str(value)
        elif actual is not None:
            inputs[key] = actual
    elif to_jsonable_python(value) != stored:
        yield key, stored, to_jsonable_python(value)


def _field_differences(
    key: str, stored: Mapping[str, Any], config: BaseModel, inputs: dict[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    fields = type(config).model_fields
    prefix = f"{key}." if key else ""
    stored = {_present_name(name, fields): value for name, value in stored.items()}
    if "kind" in stored and stored["kind"] != getattr(config, "kind", None):
        yield f"{prefix}kind", stored["kind"], getattr(config, "kind", None)
        return
    for name, field in fields.items():
        default = None if field.is_required() else to_jsonable_python(field.default)
        yield from _differences(f"{prefix}{name}", stored.get(name, default), getattr(config, name), inputs)
    for name in stored.keys() - fields.keys():
        logger.warning("config.yaml: %s%s is ignored, as this version has no such key.", prefix, name)


def _lanes(stored: Mapping[str, Any]) -> int | None:
    """Return the lanes of the order in a stored configuration of this or an older version."""
    data = stored.get("data")
    if not isinstance(data, Mapping):
        return None
    values = {_present_name(name, StreamConfig.model_fields): value for name, value in data.items()}
    return values.get("order_lanes") or values.get("global_batch_size")


def _present_name(name: str, fields: Collection[str]) -> str:
    successors = (name, *RENAMED.get(name, ()))
    return next((successor for successor in successors if successor in fields), name)


def _has_saved_step(checkpoints: Path) -> bool:
    names = [path.name for path in checkpoints.glob("*") if is_checkpoint(path) or DAMAGED in path.name]
    return any(name.strip("0") for name in names)


def _delete_initial_weights(checkpoints: Path) -> None:
    for checkpoint in filter(is_checkpoint, checkpoints.glob("*")):
        # Renamed first, so that a partly deleted folder is not taken for a checkpoint.
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(checkpoint.name + PARTIAL)))
