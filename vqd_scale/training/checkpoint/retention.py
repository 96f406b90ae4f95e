"""Retention of a run's checkpoints: which exist, which are damaged, and which are deleted."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from vqd_scale.core.atomic_io import PARTIAL, set_aside
from vqd_scale.training.checkpoint.manifest import DamageError, is_checkpoint, verified
from vqd_scale.training.config import CheckpointConfig
from vqd_scale.training.periods import is_due

logger = logging.getLogger(__name__)


def prune(
    folder: Path,
    config: CheckpointConfig,
    in_use: Path | None = None,
    damages: Mapping[str, str] | None = None,
) -> None:
    """Delete checkpoints beyond the retention policy; only valid ones count.

    Args:
        folder: Checkpoint folder of the run.
        config: Retention policy.
        in_use: Checkpoint that is not deleted.
        damages: Damage of checkpoints that are verified already, by name; empty for valid ones.
    """
    checkpoints = named_checkpoints(folder)[::-1]
    valid_count = 0
    for checkpoint in checkpoints if len(checkpoints) > config.keep_last else []:
        if valid_count < config.keep_last:
            verdict = (damages or {}).get(checkpoint.name)
            if damage := damage_of(checkpoint) if verdict is None else verdict:
                set_aside_damaged(checkpoint, damage, "and an older checkpoint is kept")
            else:
                valid_count += 1
            continue
        permanent = config.keep_every_images
        is_kept = permanent is not None and is_due(permanent, int(checkpoint.name), config.every_images)
        if is_kept or checkpoint == in_use:
            continue
        # Rename before deleting, so a partly deleted folder is not taken for a checkpoint.
        partial = checkpoint.rename(checkpoint.with_name(checkpoint.name + PARTIAL))
        shutil.rmtree(partial, ignore_errors=True)


def damage_of(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """Verify this rank's part of a checkpoint's files, and describe the damage; empty if there is none."""
    try:
        verified(folder, rank, ranks)
    except DamageError as damage:
        return str(damage)
    return ""


def set_aside_damaged(folder: Path, damage: str, consequence: str) -> None:
    """Rename a damaged checkpoint, and warn of the damage and its consequence."""
    renamed = set_aside(folder)
    logger.warning("%s: not used, %s; set aside as '%s', %s.", folder, damage, renamed.name, consequence)


def named_checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoints, valid or not, by images seen."""
    return sorted(filter(is_checkpoint, folder.glob("*")), key=lambda path: int(path.name))
