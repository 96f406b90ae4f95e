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
from vqd_scale.evaluation.extractors import (
    FEATURES,
    LOGITS,
    Extractor,
    Inception,
    RandomNetwork,
    build_extractor,
    checked_weights,
)
from vqd_scale.evaluation.feature_metrics import inception_score, kernel_distance, neighbourhoods
from vqd_scale.evaluation.frechet import FeatureStatistics, frechet_distance
from vqd_scale.tokenizers.vqgan import VQGAN, VQGANConfig

CPU = torch.device("cpu")
TOKENIZER = VQGAN(
    VQGANConfig(codebook_size=9, code_dim=4, channels=8, channel_multipliers=(1, 2), norm="none")
)


class Pictures(Dataset[Tensor]):
    """Random pictures of soft stripes, as torch-fidelity takes them."""

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
    return build_extractor(Inception.model_validate(config.model_dump() | {"layer": layer}), TOKENIZER, CPU)


def features_of(of: Extractor, pictures: Pictures) -> dict[str, Tensor]:
    parts = [of(part) for part in pictures.tensor.split(16)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.fixture(autouse=True)
def scipy_of_pytorch_fid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give pytorch-fid the `sqrtm` that it was written for; scipy 1.18 and newer no longer take `disp`."""

    def sqrtm(matrix: NDArray[np.float64], disp: bool = True) -> object:
        root = linalg.sqrtm(matrix)
        return root if disp else (root, float("nan"))

    monkeypatch.setattr(fid_score, "linalg", SimpleNamespace(sqrtm=sqrtm))


def compare(config: Inception, count: int) -> None:
    drawn, real = Pictures(count, 0, 0.8), Pictures(count, 1, 1.0)
    shallow, deep = extractor(config, "64"), extractor(config, "2048")
    ours, others = (features_of(shallow, pictures)[FEATURES] for pictures in (drawn, real))
    theirs = torch_fidelity.calculate_metrics(
        input1=drawn,
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
    distance = frechet_distance(FeatureStatistics.of(ours), FeatureStatistics.of(others))
    assert distance == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert distance > 0.01
    kid = kernel_distance(ours, others, subsets=10, size=count // 2)
    assert kid.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert kid.deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    score = inception_score(features_of(deep, drawn)[LOGITS], 4)
    assert score.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert score.deviation == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    numpy_features = [values.double().numpy() for values in (ours, others)]
    moments = [(values.mean(axis=0), np.cov(values, rowvar=False)) for values in numpy_features]
    assert distance == pytest.approx(fid_score.calculate_frechet_distance(*moments[0], *moments[1]), rel=1e-4)


def test_figures_are_torch_fidelitys_and_pytorch_fids(
    weights: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both sides shrink alike: a 16th of the work.
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    compare(weights, count=72)


@pytest.mark.long
def test_figures_are_torch_fidelitys_at_inceptions_own_size(weights: Inception) -> None:
    compare(weights, count=72)


def test_features_are_pytorch_fids_where_neither_resizes(
    weights: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import inception

    state = torch.load(weights.weights, weights_only=True)

    def from_the_file(*_: object, **__: object) -> object:
        return state

    monkeypatch.setattr(inception, "load_state_dict_from_url", from_the_file)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    network = inception.InceptionV3(resize_input=False, normalize_input=False).eval()
    pictures = torch.randint(0, 256, (3, 3, 75, 75), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        theirs = network((pictures.float() - 128) / 128)[0][:, :, 0, 0]
    ours = extractor(weights, "2048")(pictures)[FEATURES]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_weights_that_are_missing_or_others_are_refused(weights: Inception) -> None:
    with pytest.raises(UserError, match=r"nowhere.pth: the weights of Inception are missing; fetch https"):
        build_extractor(Inception(weights=weights.weights.with_name("nowhere.pth")), TOKENIZER, CPU)
    with pytest.raises(UserError, match="not the weights of Inception that were named: their SHA-256 is"):
        build_extractor(Inception(weights=weights.weights), TOKENIZER, CPU)
    other = weights.weights.with_name("other.pth")
    torch.save({"fc.weight": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="do not fit torch-fidelity's Inception"):
        build_extractor(Inception(weights=other, sha256=sha256_of(other)), TOKENIZER, CPU)
    assert checked_weights(other, None, "anything", "") == sha256_of(other)


def two_clouds() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(70, 5, generator=generator) * 0.7 + 0.3,
        torch.randn(90, 5, generator=generator),
    )


def test_precision_and_recall_are_torch_fidelitys() -> None:
    drawn, real = two_clouds()
    ours = neighbourhoods(drawn, real, 3)
    precision, recall = calculate_precision_recall_part(drawn, real, 3)
    assert (ours.precision, ours.recall) == (pytest.approx(precision), pytest.approx(recall))
    assert 0 < ours.recall < ours.precision <= 1


def test_density_and_coverage_are_those_of_their_definition() -> None:
    drawn, real = two_clouds()
    ours = neighbourhoods(drawn, real, 3)
    distances = np.linalg.norm(real.numpy()[:, None] - drawn.numpy()[None], axis=-1)
    among = np.sort(np.linalg.norm(real.numpy()[:, None] - real.numpy()[None], axis=-1), axis=1)
    within = distances <= among[:, 3:4]
    assert ours.density == pytest.approx(within.sum() / (3 * len(drawn)))
    assert ours.coverage == pytest.approx(within.any(axis=1).mean())
    torch.testing.assert_close(ours.nearest.numpy(), distances.min(axis=0).astype(np.float32))


def test_equal_sets_are_whole_and_distant_ones_nothing() -> None:
    drawn, _ = two_clouds()
    same, far = neighbourhoods(drawn, drawn, 3), neighbourhoods(drawn, drawn + 100, 3)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_sets_that_are_too_small_say_so() -> None:
    drawn, real = two_clouds()
    with pytest.raises(UserError, match=r"set kid.size to 70"):
        kernel_distance(drawn, real, subsets=2, size=71)
    with pytest.raises(UserError, match="too few for 71 parts"):
        inception_score(drawn, 71)
    with pytest.raises(UserError, match="too few for 70 neighbours"):
        neighbourhoods(drawn, real, 70)


def test_a_random_network_is_a_function_of_its_seed() -> None:
    pictures = Pictures(4, 0, 1.0).tensor
    first, same, other = (
        build_extractor(RandomNetwork(seed=seed), TOKENIZER, CPU)(pictures)[FEATURES] for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.std(dim=0).min() > 0
