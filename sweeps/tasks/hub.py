"""Whether the Hugging Face hub can be had from here: asked once, before anything that would try again and again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

_TIMEOUT_S = 10


def hub_reachable() -> bool:
    """Whether the hub answers, whatever it says; False where HF_HUB_OFFLINE tells not to ask."""
    import huggingface_hub.constants

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_S)
    # The client, and with it what it raises, is another one in other versions of huggingface_hub.
    except Exception:
        return False
    return True


@contextmanager
def offline_unless_reachable(config: ModuleType) -> Iterator[None]:
    """Has what is cached taken from the cache, at once, where the hub does not answer.

    Args:
        config: of the package that asks; it has a HF_HUB_OFFLINE of its own beside huggingface_hub's.
    """
    with nullcontext() if hub_reachable() else offline(config):
        yield


@contextmanager
def offline(config: ModuleType) -> Iterator[None]:
    """Has nobody ask the hub; see `offline_unless_reachable`."""
    import huggingface_hub.constants

    # datasets has no argument for it: under `local_files_only` it still asks for the data set's README.
    switches = [config, huggingface_hub.constants]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
