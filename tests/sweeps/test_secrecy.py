"""What is a secret in an address, and what is not."""

from __future__ import annotations

import pytest

from sweeps.secrecy import has_secret, hide_passwords


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("https://TOKEN:@host", "https://***@host"),
        ("https://ann:pw@host", "https://***@host"),
        ("s3://AK:SK@bucket", "s3://***@bucket"),
        ("postgresql://ann:s3c/r@t@host/db", "postgresql://ann:***@host/db"),
        ("postgresql+psycopg://ann:pw@host/db", "postgresql+psycopg://ann:***@host/db"),
        ("postgresql://h/db?user=u&password=hunter2", "postgresql://h/db?user=u&password=***"),
        ("postgresql://h/db?sslpassword=a&sslmode=on", "postgresql://h/db?sslpassword=***&sslmode=on"),
        ("https://h/?api_key=a&access_token=b#c", "https://h/?api_key=***&access_token=***#c"),
        ("mssql://?odbc_connect=UID%3Du%3BPWD%3Da", "mssql://?odbc_connect=UID%3Du%3BPWD%3D***"),
        ("host=h user=u password='hunter 2' port=1", "host=h user=u password=*** port=1"),
        ('{"uri": "https://T@h"}', '{"uri": "https://***@h"}'),
    ],
)
def test_secrets_are_masked_once(text: str, hidden: str) -> None:
    assert hide_passwords(text) == hidden
    assert has_secret(text)
    assert hide_passwords(hidden) == hidden
    assert not has_secret(hidden)


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////home/ann/mlflow.db",
        "postgresql://ann@host/db",
        "http://127.0.0.1:5000/mlflow",
        "https://host/path?q=a@b",
        "CUDA out of memory, max_tokens=512",
        '{"uri": "x?password=", "next": "y"}',
        "see http://x:1, ann@host",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_passwords(text) == text
    assert not has_secret(text)
