import json
from pathlib import Path

import pytest
from benchmarks.main import main
from benchmarks.s3 import S3Problem, benchmark_s3

from vqd_scale.core.errors import UserError
from vqd_scale.core.s3_client import client_of
from vqd_scale.core.s3_endpoint import S3Endpoint

pytestmark = pytest.mark.s3

SMALL = S3Problem(shards=2, samples=24, image_bytes=50_000, lanes=4, shuffle_window=4)


def test_all_sides_read_equal_bytes_and_clean_up(server: str) -> None:
    del server
    before = client_of(S3Endpoint()).call_s3("list_buckets")["Buckets"]
    figures = benchmark_s3(1, SMALL)
    assert figures["megabytes_in_members"] == pytest.approx(2.4, abs=0.1)
    assert {
        "ours",
        "samples_in_lanes",
        "alternative",
        "s3fs_readahead",
        "ratio_to_s3fs",
        "memory_ratio",
    } <= figures.keys()
    assert json.loads(json.dumps(figures)) == figures
    assert client_of(S3Endpoint()).call_s3("list_buckets")["Buckets"] == before


def test_missing_store_raises_user_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(UserError, match="set AWS_ENDPOINT_URL"):
        benchmark_s3(1, SMALL)
    with pytest.raises(SystemExit):
        main(["s3", "--output", str(tmp_path / "s3.json")])
    assert "set AWS_ENDPOINT_URL" in capsys.readouterr().err
