"""Machines with networks of their own on this one: network namespaces without names, which end with who holds them.

head      the first machine, with a bridge to which the others are plugged
holder    a process in whose namespace a machine's processes run; it ends when its standard input does, and with it
          goes the namespace, also where the tests are killed
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

_PREFIX = "10.87.0."
"""Of addresses that exist inside the namespaces only."""


@dataclass(frozen=True)
class Machine:
    """A machine of a small network.

    Attributes:
        address: its IP address.
        inside: words before a command that is to run on it.
        plug: its end of the cable on the head's side; empty for the head.
        head_inside: words before a command on the head.
    """

    address: str
    inside: tuple[str, ...]
    plug: str
    head_inside: tuple[str, ...]

    def cut_off(self) -> None:
        """Pulls the cable: nobody reaches it, it reaches nobody, and no connection is closed."""
        _run(*self.head_inside, "ip", "link", "set", self.plug, "down")

    def plug_in(self) -> None:
        """Puts the cable back."""
        _run(*self.head_inside, "ip", "link", "set", self.plug, "up")


@contextlib.contextmanager
def network(size: int) -> Iterator[list[Machine]]:
    """Machines that reach each other and nobody else, the head first; skips the test where that is not permitted."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"the program {program} is not installed")
    if os.geteuid() != 0:
        pytest.skip("network namespaces are made by root, and the tests run as another user")
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(_holder()) for _ in range(size)]
        insides = [("nsenter", "--target", str(holder), "--net") for holder in holders]
        head = insides[0]
        _try(*head, "ip", "link", "add", "bridge0", "type", "bridge")
        _run(*head, "ip", "address", "add", f"{_PREFIX}1/24", "dev", "bridge0")
        _run(*head, "ip", "link", "set", "bridge0", "up")
        for number, (holder, inside) in enumerate(zip(holders, insides, strict=True), start=1):
            _run(*inside, "ip", "link", "set", "lo", "up")
            if number > 1:
                ends = ["type", "veth", "peer", "name", "eth0", "netns", str(holder)]
                _try(*head, "ip", "link", "add", f"plug{number}", *ends)
                _run(*head, "ip", "link", "set", f"plug{number}", "master", "bridge0", "up")
                _run(*inside, "ip", "address", "add", f"{_PREFIX}{number}/24", "dev", "eth0")
                _run(*inside, "ip", "link", "set", "eth0", "up")
        yield [
            Machine(f"{_PREFIX}{number}", inside, f"plug{number}" if number > 1 else "", head)
            for number, inside in enumerate(insides, start=1)
        ]


@contextlib.contextmanager
def _holder() -> Iterator[int]:
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo made && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != b"made\n":
            pytest.skip(f"network namespaces are not permitted: {process.stderr.read().decode().strip()}")
        yield process.pid


def _try(*words: str) -> None:
    """Runs what may not be permitted."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"`{' '.join(words)}` is not permitted: {done.stderr.strip()}")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
