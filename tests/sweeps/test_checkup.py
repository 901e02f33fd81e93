"""The rules of `doctor`, on facts made up: each status of each rule, and that nothing unknown is said to be ok."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sweeps import checkup
from sweeps.checkup import Check, Needs
from sweeps.errors import ClusterError, TrackingError
from sweeps.examination import needs_of
from sweeps.node_facts import PACKAGES, Disk, Gpu, NodeFacts, file_system
from sweeps.source_facts import Source, SourceFacts
from sweeps.spec import parse_spec

GB = 10**9
H200 = Gpu("NVIDIA H200", 150 * GB, 149 * GB)

WELL = NodeFacts(
    host="one",
    versions={"Python": "3.12.3", "lora-sweeps": "0.1.0"} | dict.fromkeys(PACKAGES, "2.0"),
    source="aaaa",
    gpus=(H200,),
    gpu_error="",
    torch_cuda="12.8",
    driver_gpus=1,
    visible_devices=None,
    memory_bytes=64 * GB,
    free_bytes=60 * GB,
    disks=(),
    shm_bytes=8 * GB,
    open_files=65536,
    auth_mode="token",
)

MODEL = Source("task.model", "/models/llama", "model")
FROM_HUB = Source("task.model", "meta/llama", "model")

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/share /mnt/my\\040share nfs4 rw 0 0
bucket /mnt/bucket fuse.s3fs rw 0 0
server:/home /home nfs rw 0 0
/dev/sdb1 /home ext4 rw 0 0
"""


def with_versions(**versions: str) -> NodeFacts:
    return replace(WELL, versions=WELL.versions | {name.replace("_", "-"): value for name, value in versions.items()})


def holds(check: Check, status: str, *words: str) -> bool:
    """Whether a check says so; what is not well must say what to do, and what is must not."""
    assert check.status == status, check
    assert bool(check.way_out) == (status in ("warning", "failed")), check
    return all(word in f"{check.found} {check.way_out}" for word in words)


# -- versions ----------------------------------------------------------------------------------------------------------


def test_equal_versions_are_ok():
    assert holds(checkup.versions(WELL, "one", Needs(), WELL), "ok", "torch 2.0")


@pytest.mark.parametrize(
    ("node", "status", "said"),
    [
        (with_versions(ray="2.1"), "failed", "ray 2.1 (driver: 2.0)"),
        (with_versions(lora_sweeps="0.2.0"), "failed", "lora-sweeps 0.2.0 (driver: 0.1.0)"),
        (with_versions(torch="2.1"), "warning", "torch 2.1 (driver: 2.0)"),
        (with_versions(peft=""), "warning", "peft missing (driver: 2.0)"),
        (with_versions(torch="2.0+cpu"), "ok", "torch 2.0+cpu"),
        (with_versions(torch=""), "failed", "no torch"),
        (replace(WELL, source="bbbb"), "warning", "another state of its source"),
    ],
)
def test_versions_are_held_to_the_drivers(node: NodeFacts, status: str, said: str):
    assert holds(checkup.versions(node, "one", Needs(), WELL), status, said)


def test_what_only_some_specs_need_is_missed_where_the_spec_needs_it():
    bare = with_versions(transformers="")
    assert holds(checkup.versions(bare, "one", Needs()), "ok")
    assert holds(checkup.versions(bare, "one", Needs(packages=("transformers",))), "failed", "lora-sweeps[hf]")


def test_a_model_over_several_gpus_needs_accelerate():
    text = """\
name: several
task: {type: causal_lm, model: /no/such/model, data: {train: /no/such/train.jsonl}}
lora: {target_modules: [c_attn]}
parameters: {rank: {values: [2, 4]}, lr: {min: 1e-4, max: 1e-2}, alpha: {values: [4, 8]}}
compute: {gpus_per_worker: GPUS}
"""
    bare = with_versions(accelerate="")
    for gpus, status in (("2", "failed"), ("1", "ok"), ("0.5", "ok"), ("auto", "ok")):
        needs = needs_of(parse_spec(text.replace("GPUS", gpus), "several.yaml"))
        assert holds(checkup.versions(bare, "one", needs), status), gpus
    several = needs_of(parse_spec(text.replace("GPUS", "2"), "several.yaml"))
    assert holds(checkup.versions(bare, "one", several), "failed", "no accelerate", "lora-sweeps[hf]")


# -- GPUs and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "in_ray", "status", "said"),
    [
        ({}, 1, "ok", "NVIDIA H200 with 150.0 GB"),
        ({"gpus": ()}, 0, "ok", "CPU"),
        ({"gpus": (), "driver_gpus": None}, None, "ok", "CPU"),
        ({"gpus": (), "torch_cuda": ""}, 2, "failed", "CUDA build of torch"),
        ({"gpus": (), "driver_gpus": None}, 2, "failed", "nvidia-smi"),
        ({"gpus": (), "visible_devices": ""}, 2, "failed", "CUDA_VISIBLE_DEVICES"),
        ({"gpus": ()}, 2, "failed", "new enough for CUDA 12.8"),
        ({"gpus": (), "torch_cuda": ""}, None, "failed", "CUDA build of torch"),
        ({"gpus": (), "visible_devices": ""}, None, "warning", "CUDA_VISIBLE_DEVICES"),
        ({}, 0, "warning", "--num-gpus=1"),
        ({"gpus": (replace(H200, free_bytes=50 * GB),)}, 1, "warning", "100.0 GB of GPU 0"),
        ({"gpus": (replace(H200, free_bytes=None),)}, 1, "ok", "H200"),
        ({"gpus": None, "gpu_error": "libcudart is missing"}, 1, "failed", "libcudart is missing"),
    ],
)
def test_gpus_of_ray_are_held_to_those_of_torch(changes: dict[str, object], in_ray: float, status: str, said: str):
    assert holds(checkup.gpus(replace(WELL, **changes), "one", in_ray), status, said)


def test_no_gpu_is_said_where_the_spec_or_its_model_wants_one():
    bare = {"one": replace(WELL, gpus=())}
    assert checkup.devices(bare, Needs()) == []
    assert holds(checkup.devices(bare, Needs(gpus_per_worker=2.0))[0], "warning", "asks for 2")
    assert holds(checkup.devices(bare, Needs(base_bytes=16 * GB))[0], "warning", "16.0 GB")
    assert checkup.devices(bare, Needs(base_bytes=GB // 10)) == []


def test_a_model_is_held_to_a_workers_gpu_memory():
    two = {"one": WELL, "two": replace(WELL, gpus=())}
    assert holds(checkup.devices(two, Needs(base_bytes=100 * GB))[0], "ok", "100.0 GB of the 150.0 GB")
    assert holds(checkup.devices(two, Needs(0.5, base_bytes=100 * GB))[0], "failed", "a worker has 75.0 GB")
    assert checkup.devices(two, Needs(0, base_bytes=100 * GB)) == []


@pytest.mark.parametrize(
    ("free", "base", "gpus", "status"),
    [
        (60 * GB, None, (), "ok"),
        (60 * GB, 100 * GB, (H200,), "warning"),
        (60 * GB, 100 * GB, (), "failed"),
        (GB, None, (), "warning"),
        (GB // 10, None, (), "failed"),
        (None, None, (), "skipped"),
    ],
)
def test_memory_is_held_to_the_model(free: int | None, base: int | None, gpus: tuple[Gpu, ...], status: str):
    facts = replace(WELL, free_bytes=free, gpus=gpus)
    assert holds(checkup.memory(facts, "one", Needs(base_bytes=base)), status)


def test_every_worker_of_a_node_has_a_base_model_of_its_own():
    cpus, needs = replace(WELL, gpus=()), Needs(base_bytes=10 * GB)
    assert holds(checkup.memory(cpus, "one", needs, room=3), "ok")
    assert holds(checkup.memory(cpus, "one", needs, room=6), "warning", "10.0 GB, 60.0 GB for 6 workers")
    assert holds(checkup.memory(cpus, "one", needs, room=8), "failed", "80.0 GB for 8 workers", "compute.workers")
    assert holds(checkup.memory(cpus, "one", replace(needs, workers=2), room=8), "ok")
    # Workers with GPUs have it in the main memory only while they load it, at once.
    assert holds(checkup.memory(WELL, "one", needs, room=8), "warning", "80.0 GB for 8 workers")
    assert holds(checkup.memory(WELL, "one", replace(needs, gpus_per_worker=0), room=8), "failed")
    # A node without room for any, or of which that is not known.
    assert holds(checkup.memory(cpus, "one", Needs(), room=0), "ok")


# -- disks and limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "needed", "status", "said"),
    [
        (Disk("cache", "/c", 50 * GB, 100 * GB, "ext4"), 0, "ok", "50.0 GB free of 100.0 GB"),
        (Disk("cache", "/c", 3 * GB, 100 * GB, "ext4"), 0, "warning", "3.0 GB"),
        (Disk("cache", "/c", 50 * GB, 100 * GB, "ext4"), 60 * GB, "warning", "up to 60.0 GB"),
        (Disk("cache", "/c", GB // 10, 100 * GB, "ext4"), 0, "failed", "100 MB"),
        (Disk("cache", "/c", 50 * GB, 100 * GB, "ext4", "Read-only file system"), 0, "failed", "Read-only"),
        (Disk("cache", "/c", None, 0, "", "Stale file handle"), 0, "failed", "Stale file handle"),
        (Disk("Ray's session", "/r", 40 * GB, 1000 * GB, "ext4"), 0, "warning", "96 % full"),
        (Disk("cache", "/c", 40 * GB, 1000 * GB, "ext4"), 0, "ok", "40.0 GB"),
    ],
)
def test_disks_must_be_writable_and_have_room(found: Disk, needed: int, status: str, said: str):
    assert holds(checkup.disk(found, "one", needed_bytes=needed), status, said)


def test_disks_that_are_well_are_said_in_a_line():
    well, ill = Disk("cache", "/c", 50 * GB, 100 * GB, "ext4"), Disk("Ray's session", "/r", 0, 100 * GB, "ext4")
    checks = checkup.disks(
        replace(WELL, disks=(well, replace(well, use=checkup.STATE), ill)), "one", checkpoint_bytes=GB
    )
    assert [check.status for check in checks] == ["failed", "ok"]
    assert "for cache, state directory (up to 1.0 GB)" in checks[1].found


@pytest.mark.parametrize(("n_bytes", "status"), [(8 * GB, "ok"), (64 * 2**20, "warning"), (None, "skipped")])
def test_shared_memory_holds_rays_objects(n_bytes: int | None, status: str):
    assert holds(checkup.shared_memory(replace(WELL, shm_bytes=n_bytes), "one"), status)


@pytest.mark.parametrize(("most", "status"), [(65536, "ok"), (1024, "warning")])
def test_ray_needs_many_open_files(most: int, status: str):
    assert holds(checkup.open_files(replace(WELL, open_files=most), "one"), status)


# -- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_s", "uncertainty_s", "status"),
    [
        (0.1, 0.02, "ok"),
        (-5.0, 0.02, "warning"),
        (1.5, 1.0, "ok"),
        (-300.0, 0.02, "failed"),
        (90.0, 40.0, "warning"),
        (10.0, 70.0, "skipped"),
    ],
)
def test_a_clock_is_judged_by_what_is_certain(ahead_s: float, uncertainty_s: float, status: str):
    assert holds(checkup.clock("one", ahead_s, uncertainty_s), status)


def test_a_clock_is_told_with_its_uncertainty():
    assert checkup.clock("one", -0.25, 0.0125).found == "-250 ms against the driver's, give or take 12 ms"


# -- where state lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib", "ext4"),
        ("/tmp", "tmpfs"),
        ("/tmpx", "ext4"),
        ("/mnt/my share/a", "nfs4"),
        ("/mnt/bucket/a", "fuse.s3fs"),
        ("/home/alice", "ext4"),
    ],
)
def test_a_path_lies_on_what_was_last_mounted_above_it(path: str, kind: str):
    assert file_system(path, MOUNTS) == kind


def test_a_system_without_a_table_of_mounts_does_not_say():
    assert file_system("/var", "") == ""


@pytest.mark.parametrize(
    ("kind", "sqlite", "cluster", "status"),
    [
        ("ext4", True, True, "ok"),
        ("nfs4", True, True, "failed"),
        ("lustre", True, False, "warning"),
        ("nfs4", False, True, "ok"),
        ("fuse.gcsfuse", False, True, "failed"),
        ("", True, True, "skipped"),
    ],
)
def test_sqlite_and_locks_need_a_file_system_of_their_own(kind: str, sqlite: bool, cluster: bool, status: str):
    assert holds(checkup.state_file_system("/state", kind, sqlite=sqlite, cluster=cluster), status)


def test_a_place_that_is_another_one_on_a_node_fails():
    assert holds(checkup.exchanged("one", "/state", ""), "ok", "/state")
    assert holds(checkup.exchanged("one", "/state", "it is not there"), "failed", "it is not there", "LORA_SWEEPS_HOME")


# -- what a spec reads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "found", "at_driver", "status", "said"),
    [
        (MODEL, SourceFacts(True, GB, "aa"), SourceFacts(True, GB, "aa"), "ok", "1.0 GB"),
        (MODEL, SourceFacts(True, GB, "aa"), None, "ok", "1.0 GB"),
        (MODEL, SourceFacts(True, GB, "bb"), SourceFacts(True, GB, "aa"), "failed", "not as at the driver"),
        (MODEL, SourceFacts(False), SourceFacts(True, GB, "aa"), "failed", "is not there"),
        (FROM_HUB, SourceFacts(True, GB), None, "ok", "in the cache, 1.0 GB"),
        (FROM_HUB, SourceFacts(False, GB, reachable=True, lacking="tokenizer"), None, "failed", "hub has no tokenizer"),
        (MODEL, SourceFacts(True, GB, "aa", lacking="tokenizer"), None, "failed", "/models/llama has no tokenizer"),
        (FROM_HUB, SourceFacts(False, GB, reachable=True), None, "ok", "downloaded of 1.0 GB"),
        (FROM_HUB, SourceFacts(False, hub="GatedRepoError: ask"), None, "failed", "HF_TOKEN"),
        (FROM_HUB, SourceFacts(False, hub="HF_HUB_OFFLINE tells not to ask"), None, "failed", "hf download meta/llama"),
    ],
)
def test_a_source_must_be_there_or_to_be_had(
    what: Source, found: SourceFacts, at_driver: SourceFacts | None, status: str, said: str
):
    assert holds(checkup.source(what, "one", found, at_driver), status, said)


# -- tokens, and how it is summed up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "file_mode", "in_environment", "status"),
    [
        ("token", 0o100600, False, "ok"),
        ("token", 0o100644, False, "failed"),
        ("token", None, True, "ok"),
        ("token", None, False, "skipped"),
        ("", 0o100600, False, "warning"),
    ],
)
def test_a_cluster_asks_for_a_token_that_nobody_else_reads(
    mode: str, file_mode: int | None, in_environment: bool, status: str
):
    assert holds(checkup.token(mode, "/token", file_mode, in_environment=in_environment), status)


def test_a_node_without_lora_sweeps_says_what_to_install():
    assert holds(
        checkup.silent("one", "ModuleNotFoundError: No module named 'sweeps'"), "failed", "install lora-sweeps"
    )
    assert holds(checkup.silent("one", "no answer within 60 s"), "failed", "the node's log")


def test_the_summary_counts_what_was_skipped_only_where_something_was():
    checks = [
        Check("a", "ok", "x"),
        Check("b", "ok", "x"),
        Check("c", "warning", "x", "y"),
        Check("d", "failed", "x", "y"),
    ]
    assert checkup.summary(checks) == "4 checks: 2 ok, 1 warning, 1 failed"
    assert checkup.summary([Check("a", "skipped", "x")]) == "1 check: 0 ok, 0 warnings, 0 failed, 1 skipped"


# -- exceptions --------------------------------------------------------------------------------------------------------


def test_an_error_with_a_way_out_is_told_with_it():
    error = TrackingError("tracking.uri must answer; it does not; start it (`mlflow server`)")
    assert checkup.refused("MLflow", error) == Check(
        "MLflow", "failed", "tracking.uri must answer; it does not", "start it (`mlflow server`)"
    )


def test_an_error_that_nobody_foresaw_is_a_failure_and_hides_secrets():
    check = checkup.refused("ledger", RuntimeError("cannot open postgresql://me:hunter2@host/db"))
    assert holds(check, "failed", "RuntimeError", "report it")
    assert "hunter2" not in check.found


def test_other_versions_of_ray_are_told_in_a_line():
    ray_says = "Version mismatch: The cluster was started with:\n    Ray: 2.49.0\n    Python: 3.12.3\nThis process: ..."
    error = ClusterError("the Ray cluster must be there; it cannot be used: Version mismatch: The cluster was:")
    error.__cause__ = RuntimeError(ray_says)
    check = checkup.refused("Ray", error)
    assert holds(check, "failed", "Ray: 2.49.0 Python: 3.12.3", "the same versions of Ray and Python")
    assert "\n" not in check.found
