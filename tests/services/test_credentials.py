"""Files with tokens: to whom they may be readable, what may stand in them, and which one goes first."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from services import credentials
from sweeps.errors import InputError


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in (credentials.TOKEN, credentials.TOKEN_FILE):
        monkeypatch.delenv(name, raising=False)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("server", "origin"),
    [
        ("http://127.0.0.1:8321", "http://127.0.0.1:8321"),
        ("http://localhost:8321/", "http://127.0.0.1:8321"),
        ("https://Sweeps.Example", "https://sweeps.example:443"),
        ("https://sweeps.example:443/lora/", "https://sweeps.example:443"),
        ("http://[::1]:8321", "http://[::1]:8321"),
    ],
)
def test_a_token_is_bound_to_scheme_host_and_port(server: str, origin: str):
    assert credentials.origin(server) == origin
    assert credentials.origin(origin) == origin


def test_one_server_has_no_other_ones_token(tmp_path: Path):
    write(tmp_path / "tokens", "https://a.example one\nhttps://b.example:8443 two\n\n")
    found = {
        server: credentials.token_for(server, tmp_path) for server in ("https://a.example", "https://b.example:8443")
    }
    assert found == {"https://a.example": "one", "https://b.example:8443": "two"}
    for other in ("http://a.example", "https://a.example:444", "https://a.example.evil", "https://b.example"):
        assert credentials.token_for(other, tmp_path) is None


def test_the_environment_goes_first_then_the_state_directory_then_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = "https://a.example"
    assert credentials.token_for(server, tmp_path) is None
    write(credentials.own_file(), f"{server} own\n")
    assert credentials.token_for(server, tmp_path) == "own"
    write(tmp_path / "tokens", f"{server} state\n")
    assert credentials.token_for(server, tmp_path) == "state"
    monkeypatch.setenv(credentials.TOKEN_FILE, str(write(tmp_path / "named", f"{server} named\n")))
    assert credentials.token_for(server, tmp_path) == "named"
    monkeypatch.setenv(credentials.TOKEN, " given \n")
    assert credentials.token_for(server, tmp_path) == "given"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int):
    write(tmp_path / "tokens", "https://a.example secret\n", mode)
    with pytest.raises(InputError, match=rf"mode 0600.*has {mode:04o}.*chmod 600") as raised:
        credentials.token_for("https://a.example", tmp_path)
    assert "secret" not in str(raised.value)
    with pytest.raises(InputError, match="mode 0600"):
        credentials.save(tmp_path / "tokens", "https://a.example", "other")


@pytest.mark.parametrize("text", ["https://a.example\n", "https://a.example one two\n", "lsw_secret one\n"])
def test_a_file_with_something_else_is_refused(tmp_path: Path, text: str):
    write(tmp_path / "tokens", text)
    with pytest.raises(InputError, match=r"required `SERVER TOKEN`|a server must be"):
        credentials.token_for("https://a.example", tmp_path)


def test_a_saved_token_replaces_that_server_s_and_no_other(tmp_path: Path):
    path = tmp_path / "deep" / "tokens"
    credentials.save(path, "https://a.example", "one")
    credentials.save(path, "https://b.example", "two")
    credentials.save(path, "https://A.example:443/", "three")
    assert credentials.read(path) == {"https://a.example:443": "three", "https://b.example:443": "two"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file with tokens must be"):
        credentials.save(tmp_path / "file" / "tokens", "https://a.example", "one")


def test_the_users_own_file_lies_in_the_configuration_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert credentials.own_file() == tmp_path / "config" / "lora-sweeps" / "tokens"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert credentials.own_file() == Path(os.path.expanduser("~/.config/lora-sweeps/tokens"))
