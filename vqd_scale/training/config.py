"""What every training run is told, whatever it trains. Periods and horizons count images."""

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
    """A run of any task; the tasks' own configurations extend it."""

    run: Path
    """The run's folder; a folder that holds this run already is gone on with."""
    total_images: PositiveInt
    """Where the run ends, rounded up to a whole batch."""
    data: StreamConfig
    """What it reads; ``data.global_batch_size`` is the global batch."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    validation: ValidationConfig | None = None
    """If given, samples that are not trained on and judge the averaged weights now and then."""
    sample_images: SampleImagesConfig | None = None
    """If given, a text-to-image model's sheet of the same prompts, drawn now and then."""
