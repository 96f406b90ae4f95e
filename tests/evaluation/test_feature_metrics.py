from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from pytorch_fid import fid_score
from scipy import linalg
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import calculate_precision_recall_part

from tests.evaluation.inception import write_random_inception
from vqd_scale.core.arrays import NDArray
from vqd_scale.core.atomic_io import sha256_of
from vqd_scale.core.errors import UserError
from vqd_scale.evaluation.config import Inception, RandomNetwork
from vqd_scale.evaluation.extractors import FEATURES, LOGITS, Extractor, checked_weights
from vqd_scale.evaluation.feature_metrics import inception_score, kernel_distance, neighbor_metrics
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

CPU = torch.device("cpu")
TOKENIZER = VQGAN(
    VQGANConfig(codebook_size=9, code_dim=4, channels=8, channel_multipliers=(1, 2), norm="none")
)


class RandomImages(Dataset[Tensor]):
    """Random images of soft stripes, as a dataset for torch-fidelity."""

    def __init__(self, count: int, seed: int, brightness: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        small = torch.rand(count, 3, 5, 5, generator=generator) * brightness
        self.tensor = (torch.nn.functional.interpolate(small, (40, 40)) * 255).byte()

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensor[index]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Inception:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_random_inception(path)
    return Inception(weights=path, sha256=sha256_of(path))


def extractor(config: Inception, layer: str) -> Extractor:
    return Inception.model_validate(config.model_dump() | {"layer": layer}).build(TOKENIZER, CPU)


def features_of(of: Extractor, images: RandomImages) -> dict[str, Tensor]:
    parts = [of(part) for part in images.tensor.split(16)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(autouse=True)
def scipy_of_pytorch_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give pytorch-fid a `sqrtm` with the argument `disp`, which scipy 1.18 removed."""

    def sqrtm(matrix: NDArray[np.float64], disp: bool = True) -> object:
        root = linalg.sqrtm(matrix)
        return root if disp else (root, float("nan"))

    monkeypatch.setattr(fid_score, "linalg", SimpleNamespace(sqrtm=sqrtm))


def compare(config: Inception, count: int) -> None:
    generated, real = RandomImages(count, 0, 0.8), RandomImages(count, 1, 1.0)
    shallow, deep = extractor(config, "64"), extractor(config, "2048")
    generated_features, real_features = (
        features_of(shallow, images)[FEATURES] for images in (generated, real)
    )
    fidelity_metrics = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=real,
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        feature_layer_fid="64",
        feature_layer_kid="64",
        feature_extractor_weights_path=str(config.weights),
        kid_subset_size=count // 2,
        kid_subsets=10,
        isc_splits=4,
        batch_size=16,
        verbose=False,
        save_cpu_ram=True,
    )
    distance = frechet_distance(FeatureStatistics.of(generated_features), FeatureStatistics.of(real_features))
    assert distance == pytest.approx(fidelity_metrics["frechet_inception_distance"], rel=1e-4)
    assert distance > 0.01
    kid = kernel_distance(generated_features, real_features, subsets=10, size=count // 2)
    assert kid["mean"] == pytest.approx(fidelity_metrics["kernel_inception_distance_mean"], rel=1e-4)
    assert kid["deviation"] == pytest.approx(fidelity_metrics["kernel_inception_distance_std"], rel=1e-4)
    score = inception_score(features_of(deep, generated)[LOGITS], 4)
    assert score["mean"] == pytest.approx(fidelity_metrics["inception_score_mean"], rel=1e-4)
    assert score["deviation"] == pytest.approx(fidelity_metrics["inception_score_std"], rel=1e-4)
    numpy_features = [values.double().numpy() for values in (generated_features, real_features)]
    moments = [(values.mean(axis=0), np.cov(values, rowvar=False)) for values in numpy_features]
    assert distance == pytest.approx(fid_score.calculate_frechet_distance(*moments[0], *moments[1]), rel=1e-4)


def test_figures_equal_torch_fidelity_and_pytorch_fid(
    weights: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both sides shrink equally, to a 16th of the work.
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    compare(weights, count=72)


@pytest.mark.long
def test_figures_equal_torch_fidelity_at_inception_size(weights: Inception) -> None:
    compare(weights, count=72)


def test_features_equal_pytorch_fid_without_resizing(
    weights: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import inception

    state = torch.load(weights.weights, weights_only=True)

    def from_the_file(*_: object, **__: object) -> object:
        return state

    monkeypatch.setattr(inception, "load_state_dict_from_url", from_the_file)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    network = inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    images = torch.randint(0, 256, (3, 3, 75, 75), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        pytorch_fid_features = network((images.float() - 128) / 128)[0][:, :, 0, 0]
    package_features = extractor(weights, "2048")(images)[FEATURES]
    torch.testing.assert_close(package_features, pytorch_fid_features, rtol=1e-4, atol=1e-5)


def test_missing_and_mismatched_weights_are_refused(weights: Inception) -> None:
    with pytest.raises(UserError, match=r"nowhere.pth: the weights of Inception are missing; fetch https"):
        Inception(weights=weights.weights.with_name("nowhere.pth")).build(TOKENIZER, CPU)
    with pytest.raises(UserError, match="not the weights of Inception that were named: their SHA-256 is"):
        Inception(weights=weights.weights).build(TOKENIZER, CPU)
    other_file = weights.weights.with_name("other.pth")
    torch.save({"fc.weight": torch.zeros(1)}, other_file)
    with pytest.raises(UserError, match="do not fit torch-fidelity's Inception"):
        Inception(weights=other_file, sha256=sha256_of(other_file)).build(TOKENIZER, CPU)
    assert checked_weights(other_file, None, "anything", "") == sha256_of(other_file)


def two_clouds() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(70, 5, generator=generator) * 0.7 + 0.3,
        torch.randn(90, 5, generator=generator),
    )


def test_precision_and_recall_equal_torch_fidelity() -> None:
    generated, real = two_clouds()
    metrics = neighbor_metrics(generated, real, 3)
    precision, recall = calculate_precision_recall_part(generated, real, 3)
    assert (metrics.precision, metrics.recall) == (pytest.approx(precision), pytest.approx(recall))
    assert 0 < metrics.recall < metrics.precision <= 1


def test_density_and_coverage_equal_definition() -> None:
    generated, real = two_clouds()
    metrics = neighbor_metrics(generated, real, 3)
    distances = np.linalg.norm(real.numpy()[:, None] - generated.numpy()[None], axis=-1)
    among = np.sort(np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=-1), axis=1)
    within = distances <= among[:, 3:4]
    assert metrics.density == pytest.approx(within.sum() / (3 * len(generated)))
    assert metrics.coverage == pytest.approx(within.any(axis=1).mean())
    torch.testing.assert_close(metrics.nearest.numpy(), distances.min(axis=0).astype(np.float32))


def test_metrics_of_equal_and_distant_sets() -> None:
    generated, _ = two_clouds()
    same, far = neighbor_metrics(generated, generated, 3), neighbor_metrics(generated, generated + 100, 3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_too_small_sets_are_refused() -> None:
    generated, real = two_clouds()
    with pytest.raises(UserError, match=r"set kid.size to 70"):
        kernel_distance(generated, real, subsets=2, size=71)
    with pytest.raises(UserError, match="too few for 71 parts"):
        inception_score(generated, 71)
    with pytest.raises(UserError, match="too few for 70 neighbors"):
        neighbor_metrics(generated, real, 70)


def test_random_network_is_a_function_of_its_seed() -> None:
    images = RandomImages(4, 0, 1.0).tensor
    first_features, repeated_features, other_seed_features = (
        RandomNetwork(seed=seed).build(TOKENIZER, CPU)(images)[FEATURES] for seed in (0, 0, 1)
    )
    assert torch.equal(first_features, repeated_features)
    assert not torch.equal(first_features, other_seed_features)
    assert first_features.std(dim=0).min() > 0
