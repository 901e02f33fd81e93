"""An S3 API on this machine: moto's server, which keeps what it gets in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support import free_port

BUCKET = "sweeps"
_KEY, _SECRET = "key", "not-a-secret"


@dataclass(frozen=True)
class S3:
    """A running server.

    Attributes:
        url: its address.
    """

    url: str

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> Any:
        """The bucket, as boto3 has it."""
        import boto3

        session = boto3.session.Session(_KEY, _SECRET, region_name="us-east-1")
        return session.resource("s3", endpoint_url=self.url).Bucket(BUCKET)


@contextlib.contextmanager
def s3_server(port: int | None = None) -> Iterator[S3]:
    """Serves an empty bucket, `BUCKET`, as long as the context lasts."""
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port or free_port(), verbose=False)
    server.start()
    try:
        s3 = S3("http://{}:{}".format(*server.get_host_and_port()))
        s3.bucket().create()
        yield s3
    finally:
        server.stop()
