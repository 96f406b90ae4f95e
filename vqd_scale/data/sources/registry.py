"""Registry of the image sources; ``tools/make_shards.py`` has a command for each."""

from vqd_scale.data.sources.base import ImageSource
from vqd_scale.data.sources.coco import CocoConfig
from vqd_scale.data.sources.cub200 import CubConfig
from vqd_scale.data.sources.ffhq import FFHQConfig
from vqd_scale.data.sources.imagefolder import ImageFolderConfig
from vqd_scale.data.sources.imagenet import ImageNetConfig
from vqd_scale.data.sources.oxford102 import OxfordConfig
from vqd_scale.data.sources.parquet import ParquetConfig

IMAGE_SOURCES: tuple[type[ImageSource], ...] = (
    CocoConfig,
    CubConfig,
    OxfordConfig,
    ImageNetConfig,
    FFHQConfig,
    ImageFolderConfig,
    ParquetConfig,
)
