"""What an administrator sets, and what is refused of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.settings import Settings, read_settings
from sweeps.errors import InputError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("LORA_SWEEPS_")]:
        monkeypatch.delenv(name)


def read(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any] | None = None, **variables: str) -> Settings:
    environment = {f"LORA_SWEEPS_{name}": value for name, value in variables.items()}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_settings(options or {}, environment)


def test_nothing_set_listens_on_loopback_and_limits_nobody(monkeypatch: pytest.MonkeyPatch):
    settings = read(monkeypatch)
    assert (settings.host, settings.port, settings.on_loopback) == ("127.0.0.1", 8321, True)
    assert settings.hosts == ("127.0.0.1", "localhost", "[::1]")
    assert (settings.user_running, settings.user_trials, settings.user_device_hours) == (None, None, None)
    assert settings.entrypoints == ()


def test_lists_and_weights_are_written_with_commas(monkeypatch: pytest.MonkeyPatch):
    settings = read(
        monkeypatch, ALLOWED_HOSTS="a.example, b.example", ENTRYPOINTS="x:f,y:g", WEIGHTS="ann=2, bob=0.5", HOST="::"
    )
    assert settings.hosts == ("localhost", "127.0.0.1", "[::1]", "a.example", "b.example")
    assert settings.entrypoints == ("x:f", "y:g")
    assert settings.weights == {"ann": 2.0, "bob": 0.5}
    assert not settings.on_loopback


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    assert read(monkeypatch, {"port": 9000, "host": None}, PORT="9001", HOST="localhost").port == 9000


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"USER_RUNING": "2"}, "LORA_SWEEPS_USER_RUNING: no such setting; did you mean LORA_SWEEPS_USER_RUNNING?"),
        ({"PORT": "70000"}, "LORA_SWEEPS_PORT: Input should be less than or equal to 65535"),
        ({"WEIGHTS": "ann"}, "LORA_SWEEPS_WEIGHTS"),
        ({"WEIGHTS": "ann=0"}, "the weight of ann must be a number above 0; found 0"),
        ({"WEIGHTS": "ann=nan"}, "the weight of ann must be a number above 0; found nan"),
        ({"MODELS": "/nowhere/at/all"}, "LORA_SWEEPS_MODELS: must be a directory; /nowhere/at/all is none"),
        ({"TLS_KEY": "/x"}, "tls_certificate and tls_key go together"),
        ({"USER_DEVICE_HOURS": "0"}, "LORA_SWEEPS_USER_DEVICE_HOURS: Input should be greater than 0"),
    ],
)
def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str):
    with pytest.raises(InputError) as refused:
        read(monkeypatch, **variables)
    assert said in str(refused.value)


def test_all_wrong_settings_are_named_at_once_and_no_secret_with_them(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError) as refused:
        read(monkeypatch, PORT="x", PLANNERS="0", NOPE="1", TRACKING_URI="https://a:canary@b")
    for name in ("PORT", "PLANNERS", "NOPE"):
        assert f"LORA_SWEEPS_{name}" in str(refused.value)
    assert "canary" not in str(refused.value)


def test_a_tracking_uri_with_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch):
    assert "canary" not in repr(read(monkeypatch, TRACKING_URI="https://a:canary@b"))


def test_roots_are_followed_to_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert read(monkeypatch, DATA=str(tmp_path / "link")).data == tmp_path / "real"
