"""Plans a sweep with the model and the data at hand: for this machine, or for the workers of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from sweeps import nodes, storage
from sweeps.dtypes import with_dtype
from sweeps.home import Home
from sweeps.plan import Plan, make_plan, most_workers
from sweeps.reduction import Reduction
from sweeps.spec import SpecDocument


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What each worker of a cluster has.

    Attributes:
        memory_bytes: at least, all its GPUs' together; None where no node could say.
        gpus: a share of one, or whole ones; 0 where it trains on CPUs.
    """

    memory_bytes: int | None
    gpus: float


def plan_sweep(
    document: SpecDocument,
    home: Home,
    *,
    workers: int | None = None,
    timed: bool = False,
    place: Elsewhere | None = None,
) -> Plan:
    """Plans a sweep on this machine.

    Args:
        document: the spec.
        home: for what the task keeps.
        workers: jobs at once; None for what this machine can do.
        timed: whether a few steps are run to estimate the time.
        place: what the workers have, where they are not on this machine.

    Raises:
        SpecError: the model or the data cannot serve the spec.
    """
    from sweeps.training import let_go_of_memory  # loads torch, which lighter commands do without

    try:
        return _plan_on(document, home, workers, timed, place)
    finally:
        let_go_of_memory()  # the workers may be on the same GPU


def _plan_on(document: SpecDocument, home: Home, workers: int | None, timed: bool, place: Elsewhere | None) -> Plan:
    from lora_core.memory import base_bytes
    from sweeps import preflight

    document = with_dtype(document)
    spec, reduction = document.spec, Reduction.of(document.spec)
    fit = preflight.preflight(document, reduction, home.cache, whole=False)
    member = preflight.member_bytes(spec, reduction, fit)
    if place is not None:
        fit = preflight.on_cluster(document, fit, place.memory_bytes, place.gpus)
    most = preflight.most_members(spec, fit, member)
    plan = make_plan(spec, reduction, workers=workers or fit.workers, most_members=most)
    plan = plan.with_warning(preflight.why_one_gpu(fit))
    if member is not None:
        plan = plan.with_memory(base_bytes(fit.task.model), member.total)
    if not timed:
        return plan
    if reason := preflight.why_untimed(fit, plan.pack):
        return plan.without_time(reason)
    return plan.with_time(preflight.seconds_per_member_step(spec, reduction, fit.task, plan.pack))


def plan_for_cluster(
    found: nodes.Cluster, resources: nodes.Resources, document: SpecDocument, home: Home, *, trials: int
) -> Plan:
    """Plans a sweep for the connected cluster, whose nodes may have other memory than this machine.

    Args:
        found: the cluster.
        resources: what a worker takes of it.
        document: the spec.
        home: the state directory.
        trials: how many there are to be.

    Raises:
        SpecError: the model, the data or the workers cannot serve the spec.
    """
    wanted = document.spec.compute.workers
    workers = found.workers(resources, wanted)
    if wanted == "auto":
        # Nodes are not added for so many workers that the sampler would have nothing to learn from.
        workers = max(found.room_now(resources), min(workers, most_workers(document.spec, trials)))
    place = Elsewhere(nodes.worker_bytes(found, resources, workers), resources.gpus)
    plan = plan_sweep(document, home, workers=workers, place=place)
    unused = found.unused(resources) if document.spec.compute.gpus_per_worker == "auto" else ""
    return plan.with_warning(unused).with_warning(_untried(found, home))


def _untried(found: nodes.Cluster, home: Home) -> str:
    """Why the place for checkpoints was not tried out on nodes that may join; empty where it was, or need not be."""
    place = storage.configured_place() or str(home.path)
    if found.growth is None or len(found.nodes) > 1 or storage.is_url(place):
        return ""
    return f"nodes that join must see {place}; none is there yet, so it was not tried"
