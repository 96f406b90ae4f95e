import os
import uuid
from collections.abc import Callable, Generator

import pytest

from tests.s3.ceph import s3_server
from tests.s3.proxy import FaultProxy, never
from vqd_scale.core import s3_client as endpoint_module
from vqd_scale.core.s3 import S3Path
from vqd_scale.core.s3_client import RetryPolicy, S3Endpoint


@pytest.fixture(scope="session")
def server() -> Generator[str]:
    """The URL of a real server; its credentials are this process's and its children's."""
    with s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture(scope="session")
def one_proxy(server: str) -> Generator[FaultProxy]:
    with FaultProxy(server) as running:
        yield running


@pytest.fixture
def proxy(one_proxy: FaultProxy) -> Generator[FaultProxy]:
    """The same server, through which a plan makes requests fail."""
    yield one_proxy
    one_proxy.follow(never)


@pytest.fixture(scope="session")
def new_folder(server: str) -> Callable[[], S3Path]:
    """Makes empty folders, each in a bucket of its own."""
    del server

    def make() -> S3Path:
        default, bucket = S3Endpoint(), f"tests-{uuid.uuid4()}"
        default.waited(default.call("create_bucket", Bucket=bucket))
        return S3Path(bucket, "some/folder")

    return make


@pytest.fixture
def folder(new_folder: Callable[[], S3Path]) -> S3Path:
    """An empty folder."""
    return new_folder()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Generator[RetryPolicy]:
    """Waits are short and few."""
    patience = RetryPolicy(attempts=5, first_wait=0.001, longest_wait=0.004, silence=1.0)
    monkeypatch.setattr(endpoint_module, "PATIENCE", patience)
    endpoint_module.filesystem_of.cache_clear()
    yield patience
    endpoint_module.filesystem_of.cache_clear()
