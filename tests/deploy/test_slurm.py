"""The batch script starts one Ray over a job's nodes, and one sweep on it; the programs it calls only take notes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from services.cli import cli
from tests.deploy.manifests import DEPLOY, Fakes, check_options

SCRIPT = DEPLOY / "slurm" / "sweep.sbatch"


class Job:
    """A SLURM job on two nodes, as the script sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "shared" / "state"
        self.fakes = Fakes(folder / "fakes")
        self.fakes.add("scontrol", "printf 'node-7\\nnode-8\\n'")
        self.fakes.add("srun", f'cp "$RAY_AUTH_TOKEN_PATH" {folder}/token; stat -c %a "$RAY_AUTH_TOKEN_PATH"')
        self.fakes.add("lora-sweeps", 'echo \'[{"sweep": "x-1", "name": "slurm-4242"}]\'')
        (folder / "spec.yaml").write_text("name: x\n")

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        told = {
            "LORA_SWEEPS_HOME": str(self.home),
            "LORA_SWEEPS_DATABASE_FILE": "/home/me/ledger-url",
            "MLFLOW_TRACKING_URI": "http://mlflow:5000",
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_GPUS_PER_TASK": "1",
        }
        environment = {name: value for name, value in (told | changes).items() if value}
        return self.fakes.run("bash", SCRIPT, *words, cwd=self.folder, **environment)

    def step(self) -> list[str]:
        """The words after srun's own options."""
        (words,) = [words for words in self.fakes.calls() if words[0] == "srun"]
        return words[words.index("ray") :]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_shell_reads_it():
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_its_options_for_sbatch_come_before_everything_else_and_bound_the_job():
    lines = SCRIPT.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines[:first] if "#SBATCH" in line)
    assert not [line for line in lines[first:] if "#SBATCH" in line]
    assert {"nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-task", "mem", "time"} <= set(options)
    assert options["ntasks-per-node"] == "1", "one Ray a node"
    assert "exclusive" in options, "another Ray on the node would be taken for this one"


def test_one_ray_over_all_nodes_runs_the_sweep(job: Job):
    done = job.run("spec.yaml")
    assert done.returncode == 0, done.stderr
    calls = job.fakes.calls()
    assert [words[0] for words in calls] == ["scontrol", "srun"]
    assert calls[0] == ["scontrol", "show", "hostnames", "node-[7-8]"]
    assert calls[1][1:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    step = job.step()
    ray, sweep = step[: step.index("--")], step[step.index("--") + 1 :]
    assert ray == [
        *("ray", "symmetric-run", "--address", "node-7:24242", "--min-nodes", "2", "--num-cpus=8", "--num-gpus=1"),
    ]
    assert sweep == ["lora-sweeps", "run", "spec.yaml", "--name", "slurm-4242", "--address", "auto"]
    check_options(cli.commands["run"], sweep[2:])


def test_rays_part_is_options_that_ray_has(job: Job):
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    assert job.run("spec.yaml").returncode == 0
    step = job.step()
    left = curate_and_validate_ray_start_args(step[2 : step.index("--")])
    assert left == ["--num-cpus=8", "--num-gpus=1"]
    check_options(start, left)


def test_the_token_is_the_jobs_own_readable_by_its_user_and_gone_afterwards(job: Job):
    done = job.run("spec.yaml")
    (told,) = job.fakes.environments("srun")
    assert told["RAY_AUTH_MODE"] == "token"
    assert Path(told["RAY_AUTH_TOKEN_PATH"]) == job.home / "ray-token-4242"
    token = (job.folder / "token").read_text()
    assert re.fullmatch(r"[0-9a-f]{48}", token)
    assert "600" in done.stdout.splitlines()
    assert not list(job.home.iterdir())
    assert not any(token in word for words in job.fakes.calls() for word in words)


def test_a_job_that_is_started_anew_goes_on_with_its_sweep(job: Job):
    assert job.run("spec.yaml", SLURM_RESTART_COUNT="1").returncode == 0
    assert job.step()[-5:] == ["run", "--resume", "slurm-4242", "--address", "auto"]


def test_a_job_that_is_started_anew_before_it_had_a_sweep_begins_it(job: Job):
    job.fakes.add("lora-sweeps", "echo '[]'")
    assert job.run("spec.yaml", SLURM_RESTART_COUNT="1").returncode == 0
    assert job.step()[-6:] == ["run", "spec.yaml", "--name", "slurm-4242", "--address", "auto"]


def test_another_jobs_sweep_is_gone_on_with_by_name(job: Job):
    assert job.run(RESUME="slurm-17").returncode == 0
    assert job.step()[-5:] == ["run", "--resume", "slurm-17", "--address", "auto"]


def test_the_sweeps_exit_code_is_the_jobs(job: Job):
    job.fakes.add("srun", "exit 3")
    assert job.run("spec.yaml").returncode == 3
    assert not list(job.home.iterdir())


@pytest.mark.parametrize("missing", ["LORA_SWEEPS_HOME", "LORA_SWEEPS_DATABASE_FILE", "MLFLOW_TRACKING_URI"])
def test_it_says_what_it_lacks(job: Job, missing: str):
    done = job.run("spec.yaml", **{missing: ""})
    assert done.returncode != 0
    assert missing in done.stderr
    assert job.fakes.calls() == []


def test_a_spec_that_is_not_there_is_refused(job: Job):
    done = job.run("other.yaml")
    assert done.returncode == 2
    assert "takes a spec that can be read; found 'other.yaml'" in done.stderr
    assert job.fakes.calls() == []


def test_an_environment_of_ones_own_comes_first(job: Job):
    assert job.run("spec.yaml", ENVIRONMENT="/shared/venv").returncode == 0
    (told,) = job.fakes.environments("srun")
    assert told["PATH"].startswith("/shared/venv/bin:")
