"""Whose sweep starts next: weighted fair shares of device-hours, priorities, limits. Pure.

    share of a user    device-hours used within the window / the user's weight: the smallest is next
    priority above 0   before everybody else's; otherwise it orders a user's own sweeps only

Nobody overtakes: the next sweep waits until enough devices are free for it, and the others wait behind it. So a large
sweep is not starved by small ones. Users at a limit of theirs are passed over, and so is what has become too large.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sweep that could start."""

    sweep: str
    owner: str
    priority: int
    devices: float
    submitted_at_s: float


@dataclass(frozen=True, slots=True)
class Busy:
    """A sweep that has devices."""

    sweep: str
    owner: str
    devices: float


@dataclass(frozen=True, slots=True)
class Rules:
    """What the administrator allows.

    Attributes:
        devices: that all sweeps together may use.
        user_running: sweeps of one user at once; None: any number.
        user_device_hours: of one user within the window; None: any number.
        weights: users' shares where they are not 1.
    """

    devices: float
    user_running: int | None = None
    user_device_hours: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now.

    Attributes:
        start: sweeps to start, in this order.
        reasons: why each of the others waits.
    """

    start: tuple[str, ...]
    reasons: dict[str, str]


def decide(waiting: Sequence[Waiting], busy: Sequence[Busy], used_hours: Mapping[str, float], rules: Rules) -> Decision:
    """Decides which sweeps start now.

    Args:
        waiting: the queue, in any order.
        busy: what runs.
        used_hours: device-hours that each user has used within the window.
        rules: the administrator's.
    """
    queue, running, start, reasons = list(waiting), list(busy), [], {}
    while True:
        allowed = []
        for one in queue:
            if one.devices > rules.devices:
                has = f"the service has {rules.devices:g} now: cancel it, or give the service more"
                reasons[one.sweep] = f"takes {one.devices:g} devices, and {has}"
            elif reason := _at_limit(one.owner, running, used_hours, rules):
                reasons[one.sweep] = reason
            else:
                allowed.append(one)
        if not allowed:
            break
        ranked = sorted(allowed, key=lambda one: _rank(one, running, used_hours, rules))
        head, free = ranked[0], rules.devices - sum(one.devices for one in running)
        if head.devices > free:
            reasons[head.sweep] = (
                f"next; waits for devices: takes {head.devices:g}, of which {max(0.0, free):g} are free"
            )
            for place, one in enumerate(ranked[1:], start=2):
                reasons[one.sweep] = f"number {place} in the queue"
            break
        start.append(head.sweep)
        running.append(Busy(head.sweep, head.owner, head.devices))
        queue.remove(head)
    return Decision(tuple(start), {sweep: reason for sweep, reason in reasons.items() if sweep not in start})


def over_hours(owner: str, used_hours: Mapping[str, float], rules: Rules) -> str:
    """Why a user may use no more devices for now; empty where they may."""
    limit, used = rules.user_device_hours, used_hours.get(owner, 0.0)
    if limit is None or used < limit:
        return ""
    return f"{owner} has used {used:.1f} of {limit:g} device-hours; older ones stop counting in time"


def _at_limit(owner: str, running: Sequence[Busy], used_hours: Mapping[str, float], rules: Rules) -> str:
    own = sum(one.owner == owner for one in running)
    if rules.user_running is not None and own >= rules.user_running:
        return f"{owner} has {own} running, of at most {rules.user_running}"
    return over_hours(owner, used_hours, rules)


def _rank(
    one: Waiting, running: Sequence[Busy], used_hours: Mapping[str, float], rules: Rules
) -> tuple[float, float, float, float, float, str]:
    weight = rules.weights.get(one.owner, 1.0)
    # Equal shares, as on the first day, are told apart by what runs now.
    now = sum(other.devices for other in running if other.owner == one.owner) / weight
    return (
        -max(0, one.priority),
        used_hours.get(one.owner, 0.0) / weight,
        now,
        -one.priority,
        one.submitted_at_s,
        one.sweep,
    )
