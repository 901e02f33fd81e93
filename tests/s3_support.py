"""An S3 API on this machine: moto's server, which keeps what it gets in memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

BUCKET = "sweeps"


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
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def unused_port() -> int:
    """A port of 127.0.0.1 on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def s3_server(port: int | None = None) -> Iterator[S3]:
    """Serves an empty bucket, `BUCKET`, as long as the context lasts."""
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=port or unused_port(), verbose=False)
    server.start()
    try:
        s3 = S3("http://{}:{}".format(*server.get_host_and_port()))
        client = boto3.client(
            "s3",
            endpoint_url=s3.url,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="not-a-secret",
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield s3
    finally:
        server.stop()
