"""The command line against a service: the same words as in its state directory, the same exit codes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from services import credentials
from sweeps.events import DriverStarted, SweepCreated, SweepEnded
from sweeps.ledger import Ledger
from sweeps.plan import make_plan
from sweeps.reduction import Reduction
from tests.services.client_support import finished_sweep, settle
from tests.services.service_support import TINY_SPEC, Served
from tests.support import Here, command, environment, run_cli
from tests.sweeps.support import make_created, make_spec

LONG_SPEC = TINY_SPEC.replace("name: tiny", "name: long").replace("steps: 4", "steps: 200000")


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Here) -> Here:
    """Runs a command in an empty working directory, with an environment for it."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("LORA_SWEEPS", "MLFLOW"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return here


@pytest.fixture
def there(cli: Here, served: Served) -> Here:
    """The same, of a service, whose token lies in a file."""
    path = Path("tokens").absolute()
    credentials.save(path, served.url, served.token)
    return lambda *arguments, **env: cli(
        *arguments, "--server", served.url, **({"LORA_SWEEPS_TOKEN_FILE": str(path)} | env)
    )


SAME = [
    ("list",),
    ("list", "--json"),
    ("status", "SWEEP"),
    ("status", "SWEEP", "--json"),
    ("best", "SWEEP"),
    ("best", "SWEEP", "--json"),
    ("report", "SWEEP"),
    ("report", "SWEEP", "--format", "json"),
    ("report", "SWEEP", "--format", "html"),
    ("logs", "SWEEP"),
    ("logs", "SWEEP", "--follow", "--offset", "10"),
    ("export", "SWEEP", "--format", "peft", "--output", "out"),
    ("export", "SWEEP", "--format", "trl", "--alpha", "2*rank", "--output", "out", "--json"),
    ("export", "SWEEP", "--format", "axolotl"),
    ("export", "SWEEP", "--adapter", "out", "--json"),
    ("export", "SWEEP", "--adapter", "out", "--trial", "1"),
    ("export", "SWEEP", "--format", "nosuch"),
    ("export", "SWEEP", "--format", "peft", "--trial", "99"),
    ("export", "SWEEP", "--format", "peft", "--alpha", "nonsense"),
]


def _written() -> dict[str, bytes]:
    """All files of the working directory that a command may have written."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != "tokens"}


@pytest.mark.parametrize("arguments", SAME, ids=" ".join)
def test_a_command_prints_and_writes_the_same_here_and_there(
    cli: Here, there: Here, served: Served, arguments: tuple[str, ...]
):
    sweep = finished_sweep(served)
    settle(served)
    asked = [sweep if one == "SWEEP" else one for one in arguments]
    here = cli(*asked, LORA_SWEEPS_HOME=str(served.home))
    files = _written()
    for path in files:
        Path(path).unlink()
    assert there(*asked) == here
    assert _written() == files
    assert bool(files) == (arguments[0] == "export" and here.code == 0)
    assert "Traceback" not in here.err
    if here.code == 0:
        assert here.out
    else:
        assert here.err.startswith("error: ")


def test_watching_prints_the_same_outcome_here_and_there(cli: Here, there: Here, served: Served):
    sweep = finished_sweep(served)
    here = cli("watch", sweep, LORA_SWEEPS_HOME=str(served.home))
    remote = there("watch", sweep)
    assert (here.code, remote.code) == (0, 0)
    assert remote.out.replace(f" --server {served.url}", "") == here.out
    assert f"{sweep}: finished after" in here.out
    assert "classes collapse" in here.out
    assert f"{sweep}: running" in remote.err
    as_json = [cli("watch", sweep, "--json", LORA_SWEEPS_HOME=str(served.home)), there("watch", sweep, "--json")]
    assert as_json[0].out == as_json[1].out
    assert json.loads(as_json[0].out)["mlflow"]["delivered"] is True


def test_a_name_and_last_go_here_and_there(cli: Here, there: Here, served: Served):
    """Here they mean every sweep of the state directory, there one's own first."""
    finished_sweep(served)
    here = json.loads(cli("status", "tiny", "--json", LORA_SWEEPS_HOME=str(served.home)).out)
    own = [one for one in json.loads(there("list", "--json").out) if one["owner"] == here["owner"]]
    assert json.loads(there("status", "tiny", "--json").out)["sweep"] == here["sweep"]
    assert json.loads(there("status", "last", "--json").out)["sweep"] == own[0]["sweep"]
    assert there("best", "nosuch").code == 2


def test_the_server_may_stand_in_the_environment(cli: Here, served: Served):
    sweep = finished_sweep(served)
    done = cli("watch", sweep, LORA_SWEEPS_SERVER=served.url, LORA_SWEEPS_TOKEN=served.token)
    assert done.code == 0
    assert "--server" not in done.out
    assert served.token not in done.out + done.err
    here = cli("list", "--server", "", LORA_SWEEPS_SERVER=served.url, LORA_SWEEPS_TOKEN=served.token)
    assert (here.code, here.out) == (0, "")
    assert "no sweeps yet: start one with `lora-sweeps run SPEC`" in here.err


def test_a_wrong_spec_is_refused_in_the_words_of_validate(cli: Here, there: Here):
    Path("bad.yaml").write_text(TINY_SPEC.replace("steps: 4", "steps: many").replace("name: tiny", "name: a b"))
    here, remote = cli("validate", "bad.yaml"), there("submit", "bad.yaml")
    assert here == remote
    assert remote.code == 2
    assert remote.err.startswith("error: 2 faults\nbad.yaml:1: name: required")
    assert there("submit", "nosuch.yaml") == cli("validate", "nosuch.yaml")


def test_a_sweep_is_submitted_watched_left_cancelled_and_extended(there: Here, served: Served):
    Path("long.yaml").write_text(LONG_SPEC)
    submitted = there("submit", "long.yaml", "--shared", "--priority", "-1")
    assert submitted.code == 0, submitted.err
    sweep = submitted.out.split()[1].rstrip(":")
    assert submitted.out.startswith(f"sweep         {sweep}: queued")
    assert "4 trials (random) in packs of 4 on 1 worker; 1 class certified" in submitted.out
    assert "alpha is searched and init_scale is not" in submitted.out
    assert f"watch         lora-sweeps watch {sweep} --server {served.url}" in submitted.out

    watching = subprocess.Popen(
        command("watch", sweep, "--server", served.url),
        env=environment(LORA_SWEEPS_TOKEN=served.token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stderr is not None
    assert f"{sweep}: queued" in watching.stderr.readline()
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == 130
    assert out == ""
    assert f"{sweep} goes on: `lora-sweeps cancel {sweep} --server {served.url}` ends it" in err
    assert "Traceback" not in err
    assert served.status(sweep)["state"] in ("queued", "starting", "running")

    cancelled = there("cancel", sweep)
    assert cancelled.code == 0
    assert cancelled.out.startswith(f"sweep         {sweep}: ")
    ended = there("watch", sweep)
    assert ended.code == 1
    assert f"{sweep}: cancelled after" in ended.out
    assert f"cancelled; go on with `lora-sweeps resume {sweep} --server" in ended.err
    assert there("cancel", sweep).out == f"sweep         {sweep}: cancelled\n"

    extended = json.loads(there("extend", sweep, "--trials", "6", "--json").out)
    assert (extended["plan"]["trials"], extended["priority"], extended["shared"]) == (6, -1, True)
    assert there("extend", sweep, "--trials", "5").code == 2
    there("cancel", sweep)
    assert there("watch", sweep, "--json").code == 1
    resumed = there("resume", sweep)
    assert resumed.out.startswith(f"sweep         {sweep}: queued")
    there("cancel", sweep)
    assert there("watch", sweep).code == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "last", "--merge", "out"), "--merge needs the model, which a service does not send"),
        (("export", "last", "--format", "peft", "--output", "taken"), "--output must be a directory"),
        (("export", "last", "--adapter", "taken"), "--adapter must be a directory"),
        (("submit", "long.yaml", "--priority", "101"), "-100<=x<=100"),
        (("submit", "long.yaml", "--name", "../x"), "name"),
        (("extend", "last"), "--trials"),
        (("status", "../../healthz"), "by its id, its name or `last`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_request_is_refused_in_words(there: Here, served: Served, arguments: tuple[str, ...], words: str):
    sweep = finished_sweep(served)
    Path("long.yaml").write_text(LONG_SPEC)
    Path("taken").write_text("")
    done = there(*(sweep if one == "last" else one for one in arguments))
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_a_token_file_that_others_can_read_is_refused(there: Here):
    os.chmod("tokens", 0o644)
    done = there("list")
    assert done.code == 2
    assert "must be its owner's alone (mode 0600)" in done.err
    assert "has 0644" in done.err


def test_a_token_in_clear_is_warned_of_in_one_line(cli: Here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.connection._WAITS_S", ())
    done = cli("list", "--server", "http://192.0.2.1.invalid", LORA_SWEEPS_TOKEN="lsw_x")
    assert done.code == 2
    assert done.err.startswith("warning: http://192.0.2.1.invalid is not encrypted: the token")
    assert done.err.count("warning:") == 1


# -- without a service -------------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand(tmp_path: Path) -> str:
    """A sweep of this state directory that somebody ran by hand, and that was killed."""
    spec = make_spec()
    plan = make_plan(spec, Reduction.of(spec), workers=1, most_members=None).model_dump(mode="json")
    created: SweepCreated = make_created(spec).model_copy(update={"plan": plan, "tracking_uri": "sqlite:///mlflow.db"})
    (tmp_path / ".lora-sweeps").mkdir()
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        ledger.create("test-1", created)
        ledger.append("test-1", [DriverStarted(resumed=False)])
    return "test-1"


def test_what_takes_a_service_says_so_without_one(cli: Here, by_hand: str):
    Path("spec.yaml").write_text(TINY_SPEC)
    for arguments, words in (
        (
            ("submit", "spec.yaml"),
            "neither --server URL nor LORA_SWEEPS_SERVER: name one, or `lora-sweeps run spec.yaml`",
        ),
        (("resume", "last"), f"`lora-sweeps run --resume {by_hand}`"),
        (("extend", "last", "--trials", "99"), f"`lora-sweeps run --resume {by_hand} --trials 99`"),
        (("cancel", "last"), f"{by_hand} is interrupted, and nothing drives it"),
        (("logs", "last"), "a log is kept of sweeps that a service runs"),
        (("best", "last"), f"{by_hand} is interrupted and has none"),
    ):
        done = cli(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert words in done.err


def test_a_sweep_by_hand_is_shown_and_watched(cli: Here, by_hand: str, tmp_path: Path):
    found = cli("status", "last")
    assert found.out.startswith(f"sweep         {by_hand}: interrupted\n")
    assert "owner" not in found.out
    assert "no trial has finished" in found.out
    watched = cli("watch", "last")
    assert watched.code == 1
    assert f"interrupted; go on with `lora-sweeps run --resume {by_hand}`" in watched.err
    assert "owner" not in cli("list").out
    with Ledger.in_directory(tmp_path / ".lora-sweeps") as ledger:
        ledger.append(by_hand, [SweepEnded(state="paused", reason="no GPU left")])
    assert cli("status", "last").out.startswith(f"sweep         {by_hand}: paused (no GPU left)\n")
    assert json.loads(cli("list", "--json").out)[0]["reason"] == "no GPU left"
    assert "paused: no GPU left; go on with" in cli("watch", "last").err


def test_a_driver_by_hand_is_asked_to_end(cli: Here, by_hand: str, tmp_path: Path):
    code = (
        "import signal, sys\nfrom sweeps.home import Home\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"with Home.open().driving({by_hand!r}):\n    print('drives', flush=True)\n    signal.pause()\n"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    with driver.stdout:
        assert driver.stdout.readline() == "drives\n"
        done = cli("cancel", "last")
        assert done.code == 0
        assert done.out.startswith(f"sweep         {by_hand}: ")
        assert driver.wait(timeout=30) == 7


def test_what_a_service_looks_after_is_left_to_it(cli: Here, served: Served):
    sweep = finished_sweep(served)
    for arguments in (("cancel", sweep), ("resume", sweep), ("extend", sweep, "--trials", "9")):
        done = cli(*arguments, LORA_SWEEPS_HOME=str(served.home))
        assert done.code == 2
        assert f"`lora-sweeps {arguments[0]} {sweep} --server URL` asks it" in done.err


def test_looking_makes_nothing(cli: Here):
    for arguments in (("list",), ("status", "last"), ("watch", "last"), ("logs", "last"), ("cancel", "last")):
        cli(*arguments)
    assert cli("token", "list").code == 0
    assert list(Path().iterdir()) == []


# -- login -------------------------------------------------------------------------------------------------------------


def _login(served: Served, text: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("login", "--server", served.url),
        input=text,
        cwd=cwd,
        env=environment(XDG_CONFIG_HOME=str(cwd / "config")),
        capture_output=True,
        text=True,
    )


def test_login_keeps_a_token_that_opens_something(served: Served, tmp_path: Path):
    path = tmp_path / "config" / "lora-sweeps" / "tokens"
    wrong = _login(served, f"{served.token[:-1]}\n", tmp_path)
    assert wrong.returncode == 2
    assert "found one that it does not know" in wrong.stderr
    assert not path.exists()
    right = _login(served, f" {served.token} \n", tmp_path)
    assert (right.returncode, right.stdout) == (0, "")
    assert served.token not in right.stderr
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert credentials.read(path) == {served.url: served.token}
    listed = run_cli("list", "--server", served.url, cwd=tmp_path, XDG_CONFIG_HOME=str(tmp_path / "config"))
    assert listed.returncode == 0, listed.stderr


# -- light -------------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "sqlalchemy", "ray", "mlflow", "optuna", "numpy", "matplotlib", "fastapi", "starlette", "uvicorn")


@pytest.mark.parametrize(
    "arguments",
    [("status", "SWEEP"), ("list",), ("watch", "SWEEP"), ("best", "SWEEP"), ("report", "SWEEP"), ("logs", "SWEEP"),
     ("export", "SWEEP", "--format", "peft", "--adapter", "out"), ("submit", "spec.yaml", "--name", "light"),
     ("cancel", "light")],
    ids=" ".join,
)  # fmt: skip
def test_asking_a_service_loads_nothing_heavy(served: Served, tmp_path: Path, arguments: tuple[str, ...]):
    (tmp_path / "spec.yaml").write_text(TINY_SPEC)
    sweep = finished_sweep(served)
    probe = (
        "import sys\nfrom services.cli import main\ntry:\n    main()\nexcept SystemExit as ended:\n"
        f"    print(ended.code or 0, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    asked = [sweep if one == "SWEEP" else one for one in arguments]
    done = subprocess.run(
        [sys.executable, "-c", probe, *asked, "--server", served.url],
        cwd=tmp_path,
        env=environment(LORA_SWEEPS_TOKEN=served.token),
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "0 []"
