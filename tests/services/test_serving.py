"""`lora-sweeps serve` as an administrator meets it: what it refuses to start with, and in which words."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from services.settings import NOT_SETTINGS, Settings, read_settings
from sweeps.errors import InputError
from tests.services.service_support import Served, serving
from tests.support import run_cli


def refused(home: Path, *options: str, **env: str) -> str:
    """Why the service does not start: on standard error, without a trace, with exit code 2."""
    done = run_cli("serve", *options, cwd=home.parent, timeout_s=60, LORA_SWEEPS_HOME=str(home), **env)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert "serving" not in done.stderr
    return " ".join(done.stderr.split())


def test_beyond_loopback_it_wants_tokens_and_then_somebody_who_encrypts(tmp_path: Path):
    home = tmp_path / "home"
    words = refused(home, "--host", "0.0.0.0", "--port", "0", "--behind-proxy")
    assert "only once there are tokens; found none for 0.0.0.0" in words
    assert "lora-sweeps token create" in words
    served = Served("", home, "", None)  # type: ignore[arg-type]
    served.add_token("ann", "admin", expires_at_s=1.0)
    assert "found none for 0.0.0.0" in refused(home, "--host", "0.0.0.0", "--port", "0", "--behind-proxy")
    served.add_token("ann", "admin")
    words = refused(home, "--host", "0.0.0.0", "--port", "0")
    assert "must not travel in clear; found 0.0.0.0 without TLS" in words
    assert "--tls-certificate and --tls-key, or --behind-proxy" in words


def test_a_setting_that_nobody_reads_is_refused_with_the_nearest_one(tmp_path: Path):
    words = refused(tmp_path / "home", "--port", "0", LORA_SWEEPS_USER_TRIAL="9", LORA_SWEEPS_CANCEL_S="soon")
    assert "LORA_SWEEPS_USER_TRIAL: no such setting; did you mean LORA_SWEEPS_USER_TRIALS?" in words
    assert "LORA_SWEEPS_CANCEL_S: Input should be a valid number" in words


def test_one_service_looks_after_a_state_directory(served: Served):
    words = refused(served.home, "--port", "0")
    assert f"one service looks after a state directory; another one has {served.home} now" in words


def test_a_port_that_is_taken_is_refused(tmp_path: Path, served: Served):
    port = served.url.rpartition(":")[2]
    assert f"must be able to listen on 127.0.0.1 port {port}; it cannot" in refused(tmp_path / "home", "--port", port)


def test_the_first_token_is_its_owners_alone_and_made_once(tmp_path: Path):
    home = tmp_path / "home"
    with serving(home, "--devices", "1") as first:
        with first.client() as client:
            audit = client.get("/v1/audit").json()["entries"]
        assert [one["action"] for one in audit] == ["token create"]
        assert stat.S_IMODE((home / "tokens").stat().st_mode) == 0o600
        assert stat.S_IMODE((home / "ledger.db").stat().st_mode) == 0o600
    with serving(home, "--devices", "1") as second:
        assert second.token == first.token
        with second.client() as client:
            assert len(client.get("/v1/audit").json()["entries"]) == 1


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*Settings.model_fields, *(name.lower() for name in NOT_SETTINGS)}))
def test_every_setting_is_known_by_its_name(name: str):
    with pytest.raises(InputError, match="LORA_SWEEPS_NOTHING: no such setting") as caught:
        read_settings({}, {f"LORA_SWEEPS_{name.upper()}": "", "LORA_SWEEPS_NOTHING": ""})
    assert str(caught.value).count("no such setting") == 1


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("PORT", "70000", "LORA_SWEEPS_PORT: .*less than or equal to 65535"),
        ("MODELS", "/nowhere", "LORA_SWEEPS_MODELS: must be a directory; /nowhere is none"),
        ("WEIGHTS", "ann=0", "LORA_SWEEPS_WEIGHTS: the weight of ann must be a number above 0; found 0"),
        ("WEIGHTS", "ann", "LORA_SWEEPS_WEIGHTS"),
        ("TLS_KEY", "key.pem", "tls_certificate and tls_key go together: set both or neither"),
        ("USER_DEVICE_HOURS", "0", "LORA_SWEEPS_USER_DEVICE_HOURS"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str, words: str):
    monkeypatch.setenv(f"LORA_SWEEPS_{name}", text)
    with pytest.raises(InputError, match=words):
        read_settings({}, os.environ)


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_SWEEPS_PORT", "1000")
    monkeypatch.setenv("LORA_SWEEPS_ALLOWED_HOSTS", "a.example, b.example,")
    settings = read_settings({"port": 2000, "host": None}, os.environ)
    assert (settings.port, settings.host) == (2000, "127.0.0.1")
    assert settings.allowed_hosts == ("a.example", "b.example")
    assert {"localhost", "127.0.0.1", "[::1]", "a.example", "b.example"} == set(settings.hosts)


def test_a_secret_among_the_settings_is_not_shown():
    settings = read_settings({"tracking_uri": "https://ann:canary@host"}, {})
    assert "canary" not in repr(settings)
    assert "canary" not in settings.model_dump_json()
