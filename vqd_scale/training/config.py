"""Configuration common to all training tasks. Periods and horizons are in images."""

from pathlib import Path

from pydantic import Field, PositiveInt

from vqd_scale.core.config import Config
from vqd_scale.data.loading.stream import StreamConfig
from vqd_scale.training.checkpoint.manager import CheckpointConfig
from vqd_scale.training.ema import EMAConfig
from vqd_scale.training.engine import EngineConfig
from vqd_scale.training.health import HealthConfig
from vqd_scale.training.logging.metrics import LogConfig
from vqd_scale.training.logging.sample_images import SampleImagesConfig
from vqd_scale.training.optim import OptimConfig
from vqd_scale.training.validation import ValidationConfig


class RunConfig(Config):
    """Configuration of a run, extended by each task."""

    run: Path
    """Run folder. If it already contains this run, training resumes from the newest valid checkpoint."""
    total_images: PositiveInt
    """Length of the run in images, rounded up to a full batch."""
    data: StreamConfig
    """Training data."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    validation: ValidationConfig | None = None
    """Validation set, evaluated periodically with the EMA weights."""
    sample_images: SampleImagesConfig | None = None
    """Image grid of fixed prompts, generated periodically; text-to-image models only."""
