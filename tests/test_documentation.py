"""What the documents say is so: every command of the README runs, and pages made from code are up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sweeps.export import FORMATS
from sweeps.spec import load_spec, parse_spec
from tests.documents import script
from tests.support import ROOT, environment, run_cli

README = (ROOT / "README.md").read_text()


def readme_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_every_command_of_the_readme_runs(tmp_path: Path):
    """In the repository, as the README says, but with state and tracking in a directory of the test's own."""
    commands = readme_commands()
    assert commands[0] == "make demo"
    assert (
        "lora-sweeps run examples/digits.yaml"
        in subprocess.run(
            ["make", "--dry-run", "--no-print-directory", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    state = {"LORA_SWEEPS_HOME": str(tmp_path / "state"), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    for line in commands:
        words = shlex.split(line)
        if words == ["make", "demo"]:
            # The environment is there already: it runs this test. What is left of `make demo` is the sweep.
            words = ["make", "--silent", "--no-print-directory", "--old-file=install", "demo", f"VENV={sys.prefix}"]
            done = subprocess.run(words, cwd=ROOT, env=environment(**state), capture_output=True, text=True)
        elif words[:2] == ["lora-sweeps", "run"]:
            continue  # the line that `make demo` has just run
        else:
            words = [str(tmp_path / word) if word == "best-peft" else word for word in words]
            done = run_cli(*words[1:], cwd=ROOT, **state)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if words[0] == "make":
            check_demo_output(done.stdout)
    assert json.loads((tmp_path / "best-peft" / "adapter_config.json").read_text())["r"] in (2, 4, 8, 16)


def check_demo_output(stdout: str) -> None:
    """The demo's output is the README's, but for the sweep's id, the time and paths."""
    shown = README.split("It ends with\n\n```text\n")[1].split("```")[0]
    labels = [line.split()[0] for line in shown.splitlines() if line and not line.startswith(" ")]
    assert [line.split()[0] for line in stdout.splitlines() if line and not line.startswith(" ")] == labels
    # Another processor sums in another order and so searches another way; what must hold there too:
    counts = re.search(r"trials +64: (\d+) finished, (\d+) pruned, (\d+) diverged, 0 failed", stdout)
    assert counts is not None
    assert sum(map(int, counts.groups())) == 64
    best = re.search(r"best +eval/loss ([0-9.]+) nats", stdout)
    assert best is not None
    assert float(best[1]) < 0.3, "init scale 1 alone reaches 0.30; tuning it must do better"
    assert "4 of 4 classes collapse; twins: 8 bit-identical, 8 identical up to rounding" in stdout


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_valid_spec(path: Path):
    assert load_spec(path).spec.name == path.stem


def test_the_spec_in_the_readme_is_the_example_in_short():
    block = re.search(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    shown = parse_spec(block[1], "README.md").spec
    example = load_spec(ROOT / "examples" / "digits.yaml").spec
    assert shown.parameters == example.parameters
    assert shown.search == example.search
    assert shown.train == example.train


def test_every_task_in_the_guide_is_a_valid_one():
    blocks = re.findall(r"```yaml\n(task:.*?)```", (ROOT / "docs" / "tasks.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        head = ", head_lr: 0.1" if "sequence_classification" in block else ""
        rest = f"lora: {{target_modules: [x]}}\nparameters: {{rank: 2, lr: 1{head}}}\n"
        parse_spec(f"name: x\n{block}\n{rest}", "tasks.md")


def test_the_spec_page_is_made_from_the_schema():
    location = importlib.util.spec_from_file_location("make_spec", ROOT / "docs" / "make_spec.py")
    assert location is not None
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    assert module.PATH.read_text() == module.document(), "docs/spec.md is out of date: make docs"


def test_what_the_export_page_shows_is_what_the_exporters_write():
    module = script("make_export")
    page = module.PATH.read_text()
    assert page == module.document(page), "docs/export.md is out of date: python docs/make_export.py"
    assert set(module.SHOWN) == set(FORMATS)


def test_what_the_task_page_shows_is_what_plan_says():
    module = script("make_tasks")
    page = module.PATH.read_text()
    assert page == module.document(page), "docs/tasks.md is out of date: python docs/make_tasks.py"


def test_the_tables_of_the_service_page_are_made_from_its_settings_and_routes():
    page = (ROOT / "docs" / "service.md").read_text()
    module = script("make_service")
    assert page == module.document(page), "docs/service.md is out of date: python docs/make_service.py"


def test_links_between_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make check test" in script
    assert "make check test" in README
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_constraints_pin_everything_and_name_no_build():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line) for line in lines)
    names = {line.split("==")[0].lower() for line in lines}
    assert {"ray", "torch", "optuna", "mlflow", "pydantic", "transformers", "peft"} <= names


def test_examples_read_the_same_as_plain_yaml_would():
    """No trick of ours: PyYAML, which many editors use, sees the same structure."""
    text = (ROOT / "examples" / "digits.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(parse_spec(text, "digits.yaml").yaml.value)
