import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from vqd_scale.core.terminal import escaped, escaped_output, shortened
from vqd_scale.reports.plots import image_grid

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\u202e"


def test_output_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        print(f"{HOSTILE}ä\tb\r{chr(0xDCFF)}")
        print("\x1b[A", end="", file=sys.stderr)
    output = capsys.readouterr()
    assert output.out == "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7f\\u202eä\tb\r\\udcff\n"
    # tqdm moves between nested bars.
    assert output.err == "\x1b[A"


@pytest.mark.parametrize(
    "words",
    [
        ("sample.py", "/tmp/" + HOSTILE, "a star"),
        ("sample.py", "x", "a star", "--" + HOSTILE),
        ("train.py", "configs/demo/train.yaml", f"{HOSTILE}=1"),
        ("train.py", "configs/demo/train.yaml", f"run.{HOSTILE}" + "x" * 100_000 + "=1"),
    ],
)
def test_names_of_users_reach_the_terminal_escaped_and_capped(words: tuple[str, ...]) -> None:
    command = [sys.executable, f"tools/{words[0]}", *words[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert not {"\x1b", "\x9b", "\x7f", "\u202e"} & set(result.stdout + result.stderr)
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 5000


def test_caption_of_a_million_characters_is_drawn_at_once() -> None:
    images = np.zeros((2, 64, 64, 3), np.uint8)
    began = time.monotonic()
    image_grid(images, ["x" * 1_000_000, f"{HOSTILE} " * 100_000], columns=2)
    # Without the bound it takes minutes.
    assert time.monotonic() - began < 10


def test_long_text_keeps_both_ends() -> None:
    text = shortened("a" * 600 + "b" * 600, 100)
    assert (len(text), text[:75], text[-25:]) == (100, "a" * 74 + "…", "b" * 25)
    assert shortened("short", 100) == escaped("short") == "short"
