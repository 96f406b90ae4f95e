"""Import and export of folders of diffusers' VQDiffusionPipeline, with equal images."""

import importlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.exchange.microsoft_files import GUMBEL_SLIM, ITHQ_SLIM, VQ_SLIM
from tests.tokenizers.plain_implementation import build
from vqd_scale.core.errors import UserError
from vqd_scale.diffusion.config import ConstantGuidance, LegacyDiffusers, Paper, Released
from vqd_scale.diffusion.guidance import apply_guidance
from vqd_scale.diffusion.sampling_plan import SamplerContext, SamplerNoise
from vqd_scale.models.bundle import Bundle, Model
from vqd_scale.models.conditions import conditions_of
from vqd_scale.models.config import BundleConfig
from vqd_scale.models.exchange.diffusers import plan_diffusers
from vqd_scale.models.exchange.export import export_diffusers
from vqd_scale.models.generate import model_identity
from vqd_scale.models.pipeline import TextToImage, image_slots
from vqd_scale.nn.config import (
    ClassCondition,
    Convolutional,
    DenoiserConfig,
    FullyConnected,
    NoCondition,
    TextCondition,
)
from vqd_scale.text.config import Tower
from vqd_scale.tokenizers.codebook.reduction import Reduced

STEPS, CODES, SIDE = 12, 9, 8
PROMPTS = ["a red circle", "two blue stars", "", "a dog in the rain by the sea and many more words"]
NETWORK = DenoiserConfig(width=32, layers=2, heads=2, condition=TextCondition(width=16), init_std=0.2)
CONFIG = BundleConfig(
    codebook_size=CODES,
    grid=(SIDE, SIDE),
    denoiser=NETWORK,
    text=Tower(context_length=24, width=16, heads=2, layers=2, bpe_merges=300),
    diffusion=Released(steps=STEPS),
)
WITHOUT_NULL = CONFIG.model_copy(
    update={
        "text": Tower(context_length=24, width=16, heads=2, layers=2, bpe_merges=300, null_condition="empty")
    }
)


def random_bundle(config: BundleConfig = CONFIG, codec: Any = VQ_SLIM) -> Bundle:
    torch.manual_seed(0)
    model = Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return Bundle(config, model, build(codec))


def load_diffusers_pipeline(folder: Path) -> Any:
    """Load diffusers' pipeline without its deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = importlib.import_module("diffusers").VQDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=[CONFIG, WITHOUT_NULL], ids=["learned", "empty"])
def pipelines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Any, Path]:
    """Return a model with random weights, and the same model loaded by diffusers."""
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    bundle = random_bundle(request.param)
    export_diffusers(bundle, folder)
    return bundle, load_diffusers_pipeline(folder), folder


Sides = tuple[Bundle, Any, Path]


def test_network_log_probabilities_equal_diffusers(pipelines: Sides) -> None:
    bundle, diffusers_pipeline, _ = pipelines
    tokens = torch.randint(0, CODES + 1, (3, SIDE * SIDE), generator=torch.Generator().manual_seed(0))
    text = torch.randn(3, 24, 16)
    for t in (0, 5, STEPS - 1):
        with torch.no_grad():
            log_probabilities = bundle.model.denoiser(tokens, torch.full((3,), t), text).log_softmax(-1)
            expected = diffusers_pipeline.transformer(
                tokens, encoder_hidden_states=text, timestep=torch.tensor(t)
            ).sample
        assert log_probabilities.std() > 0.5
        torch.testing.assert_close(log_probabilities.transpose(1, 2), expected, atol=1e-5, rtol=0)


def test_decoder_pixels_and_encoder_latents_equal_diffusers(pipelines: Sides) -> None:
    bundle, diffusers_pipeline, _ = pipelines
    tokens = torch.arange(2 * SIDE**2).remainder(CODES).view(2, SIDE, SIDE)
    with torch.no_grad():
        vectors = diffusers_pipeline.vqvae.quantize.get_codebook_entry(
            tokens.flatten(), shape=(2, SIDE, SIDE, 4)
        )
        expected = diffusers_pipeline.vqvae.decode(vectors, force_not_quantize=True).sample
        images = bundle.tokenizer.decode(tokens)
        torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
        latents = diffusers_pipeline.vqvae.encode(images.clamp(-1, 1)).latents
        torch.testing.assert_close(bundle.tokenizer.latents(images.clamp(-1, 1)), latents, atol=1e-5, rtol=0)  # pyright: ignore


def test_caption_ids_and_features_equal_diffusers(pipelines: Sides) -> None:
    bundle, diffusers_pipeline, _ = pipelines
    ids = bundle.model.text.tokenizer(PROMPTS)
    length = bundle.model.text.tokenizer.context_length
    expected = diffusers_pipeline.tokenizer(PROMPTS, padding="max_length", max_length=length).input_ids
    # Padded with token 0. diffusers drops the end token of long captions, so these are not compared.
    assert [list(row) for row in ids[:3]] == expected[:3]
    conditions = conditions_of(bundle, PROMPTS[:2], None)
    features = diffusers_pipeline._encode_prompt(PROMPTS[:2], 1, True)
    assert conditions is not None
    torch.testing.assert_close(torch.cat(conditions[::-1]), features, atol=1e-4, rtol=0)


def states_of(bundle: Bundle) -> dict[str, Tensor]:
    tokenizer: nn.Module = bundle.tokenizer
    return {f"model.{name}": value for name, value in bundle.model.state_dict().items()} | {
        f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()
    }


def test_export_import_round_trip_is_bit_equal(pipelines: Sides) -> None:
    bundle, _, folder = pipelines
    back = plan_diffusers(folder).bundle()
    before, after = states_of(bundle), states_of(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    # Initialization settings and origin do not describe the weights.
    started = back.config.denoiser.model_copy(update={"init_std": 0.2})
    assert (
        back.config.model_copy(update={"denoiser": started, "origin": bundle.config.origin}) == bundle.config
    )
    assert back.tokenizer.config == bundle.tokenizer.config  # pyright: ignore


def test_resaved_diffusers_folder_is_bit_equal(pipelines: Sides, tmp_path: Path) -> None:
    bundle, diffusers_pipeline, _ = pipelines
    diffusers_pipeline.save_pretrained(tmp_path / "again")
    after = states_of(plan_diffusers(tmp_path / "again").bundle())
    for name, value in states_of(bundle).items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("codec", [ITHQ_SLIM, GUMBEL_SLIM], ids=["ithq", "gumbel"])
def test_other_codebooks_decode_equal_images(tmp_path: Path, codec: Any) -> None:
    bundle = random_bundle(CONFIG.model_copy(update={"codebook_size": codec.codebook_size}), codec)
    export_diffusers(bundle, tmp_path / "pipeline")
    back = plan_diffusers(tmp_path / "pipeline").bundle()
    tokens = torch.arange(SIDE**2).remainder(codec.codebook_size).view(1, SIDE, SIDE)
    assert torch.equal(back.tokenizer.decode(tokens), bundle.tokenizer.decode(tokens))


def test_reduced_codebook_decodes_equal_images(tmp_path: Path) -> None:
    reduced = Reduced(build(GUMBEL_SLIM), CODES)
    bundle = replace(random_bundle(), tokenizer=reduced)
    export_diffusers(bundle, tmp_path / "pipeline")
    back = plan_diffusers(tmp_path / "pipeline").bundle()
    tokens = torch.arange(SIDE**2).remainder(CODES).view(1, SIDE, SIDE)
    assert torch.equal(back.tokenizer.decode(tokens), reduced.decode(tokens))


class RecordedNoise:
    """Recorded Gumbel noise of diffusers, for the package's sampler."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[Tensor] = []
        module = importlib.import_module("diffusers.schedulers.scheduling_vq_diffusion")

        def recorded(logits: Tensor, generator: torch.Generator) -> Tensor:
            uniform = torch.rand(logits.shape, generator=generator)
            self.steps.append(-torch.log(-torch.log(uniform + 1e-30) + 1e-30))
            return self.steps[-1] + logits

        monkeypatch.setattr(module, "gumbel_noised", recorded)

        def same(noise: SamplerNoise, states: int) -> Tensor:
            numbers = self.steps[noise.draw].transpose(1, 2)
            # The package's last step has a row for the mask as well, which has probability 0.
            return nn.functional.pad(numbers, (0, states - numbers.shape[-1]))

        monkeypatch.setattr(SamplerNoise, "gumbel", same)


def test_every_step_equals_diffusers_for_equal_tokens_and_noise(
    pipelines: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, diffusers_pipeline, _ = pipelines
    RecordedNoise(monkeypatch)
    # Enough images that one token in ten thousand may differ in a step.
    prompts = [*PROMPTS[:2], "a cat", "a hat"] * 40
    count = len(prompts)
    visited = [torch.full((count, SIDE * SIDE), CODES)]

    def visit(step: int, t: int, tokens: Tensor) -> None:
        del step, t
        visited.append(tokens.clone())

    expected = diffusers_pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        callback=visit,
        output_type="np",
    ).images
    pipe = TextToImage(bundle)
    predict = apply_guidance(
        *pipe.predictions(conditions_of(bundle, prompts, None)), ConstantGuidance(scale=5.0)
    )
    config = LegacyDiffusers(steps=STEPS)
    sampler = config.build()
    plan = sampler.plan(pipe.transition, STEPS - 1)
    slots = image_slots(0, count)
    for number, step in enumerate(plan):
        tokens = visited[number]
        context = SamplerContext(
            pipe.transition,
            step,
            SamplerNoise(0, slots, SIDE * SIDE, number),
            free=torch.ones_like(tokens, dtype=torch.bool),
            first_masks=torch.full((count,), SIDE * SIDE),
            first=STEPS - 1,
        )
        next_tokens = sampler.advance(tokens, predict(tokens, step.network_time), context)
        equal = (next_tokens == visited[number + 1]).double().mean()
        assert equal >= 0.9999, f"step {number}"
        # The comparison is not trivial: tokens are sampled and vary.
        assert number == 0 or (tokens != CODES).any()
    assert visited[-1].unique().numel() > CODES // 2

    images = pipe.generate_batch(prompts, slots, config, guidance=ConstantGuidance(scale=5.0))
    levels = torch.from_numpy(np.round(expected * 255)).permute(0, 3, 1, 2)
    same = (images.double() - levels).abs().amax((1, 2, 3)) <= 1
    # A single differing token changes all later tokens of its own image.
    assert same.float().mean() >= 0.9


def broken(folder: Path, path: str, change: dict[str, Any]) -> None:
    values = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps({**values, **change}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_diffusers(random_bundle(), tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_published_folder_without_null_embeddings_is_refused(folder: Path) -> None:
    name = "learned_classifier_free_sampling_embeddings"
    index = json.loads((folder / "model_index.json").read_text())
    del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"lacks the key '{name}' .the published fp16 revision has none"):
        TextToImage.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("path", "change", "sentence"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline"},
            "describes a 'StableDiffusionPipeline'",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": "<|endoftext|>"}, "padded with '<.endoftext.>'"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act: Input should be 'quick_gelu'"),
        ("transformer/config.json", {"activation_fn": "geglu"}, "should be 'geglu-approximate'"),
        ("transformer/config.json", {"num_layers": None}, "num_layers: Input should be a valid integer"),
        ("transformer/config.json", {"num_layers": 1}, r"unknown transformer/transformer_blocks\.1"),
        ("transformer/config.json", {"num_vector_embeds": 12}, "scheduler has 10 classes"),
        (
            "transformer/config.json",
            {"sample_size": 7},
            r"height_emb.weight has the shape \[8, 32\], not \[7, 32\]",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 50}, "50 timesteps.*trained with 12"),
        ("scheduler/scheduler_config.json", {"alpha_cum_end": 1.5}, "keep_last"),
        ("vqvae/config.json", {"num_vq_embeddings": 5}, "the tokenizer has 5 codes|has the shape"),
        ("vqvae/config.json", {"norm_type": "spatial"}, "norm_type: Input should be 'group'"),
    ],
)
def test_folder_of_another_model_is_refused(
    folder: Path, path: str, change: dict[str, Any], sentence: str
) -> None:
    broken(folder, path, change)
    with pytest.raises(UserError, match=sentence):
        TextToImage.load(folder, device="cpu")


def test_missing_weights_and_files_are_named(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["out.bias"]
    save_file(weights, path)
    with pytest.raises(UserError, match=r"nothing found for model.denoiser.head.bias"):
        TextToImage.load(folder, device="cpu")
    path.unlink()
    with pytest.raises(UserError, match="there are no weights"):
        TextToImage.load(folder, device="cpu")


PART = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    "stray",
    [
        "old_model.safetensors",
        f"{PART}.fp16.safetensors",
        f"{PART}.non_ema.safetensors",
        "model.bin",
        f"{PART}.bin",
    ],
)
def test_stray_weights_beside_the_standard_name_are_ignored(folder: Path, stray: str) -> None:
    before = states_of(plan_diffusers(folder).bundle())
    weights = load_file(folder / "transformer" / f"{PART}.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "transformer" / stray)
    after = states_of(plan_diffusers(folder).bundle())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_weights_without_the_standard_name_must_be_alone(folder: Path) -> None:
    before = states_of(plan_diffusers(folder).bundle())
    part = folder / "transformer"
    (part / f"{PART}.safetensors").rename(part / f"{PART}.fp16.safetensors")
    after = states_of(plan_diffusers(folder).bundle())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    (part / "old_model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=rf"unclear which .*: {PART}\.fp16\.safetensors, old_model\.safetensors"
    ):
        plan_diffusers(folder)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    """Replace a component's weights by two files and their index."""
    weights = load_file(folder / f"{PART}.safetensors")
    (folder / f"{PART}.safetensors").unlink()
    files = {name: f"{PART}-{1 + n % 2:05d}-of-00002.safetensors" for n, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    index = folder / f"{PART}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index, files


def test_weights_of_an_index_are_those_it_names(folder: Path) -> None:
    before = states_of(plan_diffusers(folder).bundle())
    index, files = sharded(folder / "transformer")
    save_file({"stray": torch.zeros(1)}, folder / "transformer" / f"{PART}-00003-of-00003.safetensors")
    after = states_of(plan_diffusers(folder).bundle())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for change, sentence in (
        ({"out.bias": "../model.safetensors"}, "which is not in its folder"),
        ({"out.bias": "/etc/passwd"}, "which is not in its folder"),
        ({"surprise": files["out.bias"]}, "does not fit its files: 'surprise'"),
        ({"out.bias": "absent.safetensors"}, "no such file"),
    ):
        index.write_text(json.dumps({"weight_map": files | change}))
        with pytest.raises(UserError, match=sentence):
            plan_diffusers(folder)
    index.write_text(json.dumps({"weight_map": {name: files[name] for name in list(files)[1:]}}))
    with pytest.raises(UserError, match="does not fit its files"):
        plan_diffusers(folder)
    save_file({}, folder / "transformer" / f"{PART}.safetensors")
    with pytest.raises(UserError, match=r"unclear which .*index\.json"):
        plan_diffusers(folder)


JSON_FILES = [
    "model_index.json",
    "transformer/config.json",
    "vqvae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "learned_classifier_free_sampling_embeddings/config.json",
    "tokenizer/tokenizer_config.json",
]


@pytest.mark.parametrize("path", JSON_FILES)
@pytest.mark.parametrize("content", ["[]", "null", "5", '"text"', "[" * 5000, "{", "\ud800"])
def test_json_of_another_shape_is_refused(folder: Path, path: str, content: str) -> None:
    (folder / path).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=Path(path).name):
        plan_diffusers(folder)


NUMBERS = [
    (path, key)
    for path, keys in {
        "transformer/config.json": [
            "num_vector_embeds",
            "sample_size",
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "cross_attention_dim",
            "num_embeds_ada_norm",
        ],
        "vqvae/config.json": ["layers_per_block", "latent_channels", "num_vq_embeddings", "vq_embed_dim"],
        "text_encoder/config.json": [
            "hidden_size",
            "num_attention_heads",
            "num_hidden_layers",
            "max_position_embeddings",
            "vocab_size",
        ],
        "scheduler/scheduler_config.json": ["num_vec_classes", "num_train_timesteps", "alpha_cum_start"],
    }.items()
    for key in keys
]


@pytest.mark.parametrize(("path", "key"), NUMBERS)
def test_number_of_another_kind_or_size_is_refused(folder: Path, path: str, key: str) -> None:
    values = json.loads((folder / path).read_text())
    for value in ("8", True, [8], -1, 0, 2**20, 10**18, {"a": 1}):
        (folder / path).write_text(json.dumps({**values, key: value}))
        with pytest.raises(UserError):
            plan_diffusers(folder).exchange.check()


def test_pickled_weights_of_older_versions_are_read(folder: Path) -> None:
    before = states_of(plan_diffusers(folder).bundle())
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    weights["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(weights, folder / "text_encoder" / "pytorch_model.bin")
    path.unlink()
    after = states_of(plan_diffusers(folder).bundle())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_identity_covers_each_file_of_each_layout(folder: Path) -> None:
    """A replaced shard, a replaced `.bin` and another layout of the same weights."""
    identity = model_identity("model", TextToImage.load(folder, device="cpu"))
    _, files = sharded(folder / "transformer")
    assert model_identity("model", TextToImage.load(folder, device="cpu")) == identity
    identities = [identity]
    for file in sorted(set(files.values())):
        path = folder / "transformer" / file
        weights = load_file(path)
        next(iter(weights.values())).view(-1)[0] += 1
        save_file(weights, path)
        identities.append(model_identity("model", TextToImage.load(folder, device="cpu")))
    vae = folder / "vqvae" / f"{PART}.safetensors"
    weights = load_file(vae)
    vae.unlink()
    for _ in range(2):
        torch.save(weights, vae.with_suffix(".bin"))
        identities.append(model_identity("model", TextToImage.load(folder, device="cpu")))
        next(iter(weights.values())).view(-1)[0] += 1
    assert identities[2] == identities[3]
    assert len({json.dumps(each) for each in identities}) == 4


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path)
    pipe = TextToImage.load(folder, device="cpu")
    assert pipe.bundle.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"denoiser": NETWORK.model_copy(update={"feed_forward": Convolutional()})}, "of this network"),
        ({"denoiser": NETWORK.model_copy(update={"feed_forward": FullyConnected(mlp_ratio=2)})}, "network"),
        ({"denoiser": NETWORK.model_copy(update={"qk_norm": True})}, "of this network"),
        ({"denoiser": NETWORK.model_copy(update={"timestep_embedding": "sinusoidal"})}, "of this network"),
        (
            {"denoiser": NETWORK.model_copy(update={"condition": NoCondition()}), "text": None},
            "of this network",
        ),
        ({"denoiser": NETWORK.model_copy(update={"condition": ClassCondition()}), "text": None}, "network"),
        ({"diffusion": Paper(steps=STEPS)}, "schedule of kind 'released'"),
        ({"grid": (4, 16)}, "square grids"),
        ({"text": CONFIG.text.model_copy(update={"normalize": False})}, "a text tower but CLIP's"),  # pyright: ignore
    ],
)
def test_settings_without_diffusers_counterpart_are_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        export_diffusers(random_bundle(CONFIG.model_copy(update=change)), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_tokenizer_unsupported_by_diffusers_is_refused(tmp_path: Path) -> None:
    plain = VQ_SLIM.model_copy(update={"norm": "none"})
    with pytest.raises(UserError, match="of this tokenizer"):
        export_diffusers(random_bundle(codec=plain), tmp_path / "pipeline")
