from pathlib import Path

import pytest

from tests.tiny_models import write_model
from vqd_scale.data.sources.shapes import ShapesConfig, write_shapes


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle with random weights that generates 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of the shapes dataset with their captions, in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    write_shapes(
        ShapesConfig(image_size=16, train_samples=1, held_out_samples=60, samples_per_shard=25, seed=0),
        folder,
    )
    return folder / "held_out"
