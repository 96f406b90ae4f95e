import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.training import rank_processes
from vqd_scale.data.shards.shard_io import KEY, Sample, ShardRecipe, write_shard_set
from vqd_scale.models.bundle import save_tokenizer, tokenizer_fingerprint
from vqd_scale.preparation.tokenize_shards import TokenSetMeta
from vqd_scale.text.clip import CaptionTokenizer
from vqd_scale.tokenizers.config import VQGANConfig
from vqd_scale.tokenizers.vqgan import VQGAN

ROOT = Path(__file__).parents[2]
CODES, SIDE, SAMPLES = 12, 3, 40
CAPTIONS = CaptionTokenizer(context_length=8, merges=300)
WORDS = ("red", "green", "blue", "white")

RunTool = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def token_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a tokenizer, token shards and a configuration that trains in seconds."""
    folder = tmp_path_factory.mktemp("tokens")
    shape = VQGANConfig(
        codebook_size=CODES, code_dim=4, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, norm="none"
    )
    torch.manual_seed(0)
    save_tokenizer(folder / "tokenizer", shape, VQGAN(shape).state_dict())
    meta = TokenSetMeta(
        codes=CODES,
        grid=(SIDE, SIDE),
        tokenizer=tokenizer_fingerprint(folder / "tokenizer"),
        captions=CAPTIONS.fingerprint,
        source={},
    )
    recipes = [
        ShardRecipe(f"{shard:06d}.tar", count, lambda shard=shard, count=count: _samples(shard, count))
        for shard, count in enumerate((17, 3, SAMPLES - 20))
    ]
    write_shard_set(folder / "shards", {"kind": "tokens", **asdict(meta)}, recipes, "tokens")
    poisoned = [
        ShardRecipe(
            "000000.tar", SAMPLES, lambda: [_poisoned(n, s) for n, s in enumerate(_samples(0, SAMPLES))]
        )
    ]
    write_shard_set(folder / "poisoned", {"kind": "tokens", **asdict(meta)}, poisoned, "tokens")
    (folder / "train.yaml").write_text(yaml.safe_dump(_config(folder)))
    return folder


def _samples(shard: int, count: int) -> list[Sample]:
    """Return tokens determined by the caption's word, a few of them random."""
    generator = np.random.default_rng(shard)
    samples: list[Sample] = []
    for number in range(count):
        word = int(generator.integers(len(WORDS)))
        tokens = np.full(SIDE * SIDE, 3 * word, np.uint16)
        tokens[generator.integers(SIDE * SIDE)] += 1
        caption = f"a {WORDS[word]} picture"
        samples.append(
            {
                KEY: f"{shard:03d}{number:04d}",
                "tokens.npy": tokens,
                "text.npy": CAPTIONS([caption])[0].astype(np.int32),
                "txt": caption,
            }
        )
    return samples


def _poisoned(number: int, sample: Sample) -> Sample:
    """Replace every fifth sample's codes by invalid ones."""
    if number % 5:
        return sample
    return {**sample, "tokens.npy": np.full(SIDE * SIDE, CODES + 1, np.uint16)}


def _config(folder: Path) -> dict[str, object]:
    return {
        "run": "set-by-each-test",
        "total_images": 160,
        "tokenizer": str(folder / "tokenizer"),
        "data": {"path": str(folder / "shards"), "global_batch_size": 8, "shuffle_window": 4},
        "engine": {"precision": "fp32", "param_persistence_threshold": 0},
        "denoiser": {
            "width": 16,
            "layers": 2,
            "heads": 2,
            "init_std": 0.2,
            "condition": {"kind": "text", "width": 16},
        },
        "text": {
            "kind": "tower",
            "context_length": 8,
            "width": 16,
            "heads": 2,
            "layers": 1,
            "bpe_merges": 300,
        },
        "diffusion": {"kind": "paper", "steps": 10},
        "objective": {"auxiliary_weight": 0.1, "adaptive_auxiliary": False},
        "timestep_sampler": {"kind": "importance", "warmup": 2},
        "optim": {"lr": 1e-3, "warmup_images": 32},
        "ema": {"half_life_images": 64},
        "checkpoint": {"every_images": 40},
        "log": {"every_images": 8},
    }


def command(tool: str, arguments: Sequence[str], ranks: int) -> list[str]:
    """Return the command that starts a tool on local ranks, as `vqd_scale.launchers.local` does."""
    launch = "import sys; from pathlib import Path; from vqd_scale.launchers.local import run_locally"
    call = f"sys.exit(run_locally(Path('tools/{tool}'), sys.argv[1:], {ranks}))"
    return [sys.executable, "-c", f"{launch}; {call}", *arguments]


@pytest.fixture(scope="session")
def run_tool(tmp_path_factory: pytest.TempPathFactory) -> RunTool:
    """Run one of the project's tools on local ranks, forked from a process that has imported it."""

    def run(tool: str, *arguments: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
        return rank_processes.run(
            f"vqd_scale.cli.{Path(tool).stem}",
            *arguments,
            ranks=ranks,
            output_folder=tmp_path_factory.mktemp("output"),
        )

    return run


@pytest.fixture(scope="session")
def launch_tool() -> RunTool:
    """Run one of the project's tools on local ranks as its users do."""

    def run(tool: str, *arguments: str, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command(tool, arguments, ranks), cwd=ROOT, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture
def start_tool() -> Callable[..., "subprocess.Popen[bytes]"]:
    """Start a tool in its own process group, to be killed."""

    def start(tool: str, *arguments: str, ranks: int = 1) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command(tool, arguments, ranks),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    return start
