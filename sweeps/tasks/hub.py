"""Whether the Hugging Face hub can be had from here: asked once, before anything that would try again and again."""

from __future__ import annotations

_TIMEOUT_S = 10


def hub_reachable() -> bool:
    """Whether the hub answers, whatever it says; False where HF_HUB_OFFLINE tells not to ask."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_TIMEOUT_S)
    # The client, and with it what it raises, is another one in other versions of huggingface_hub.
    except Exception:
        return False
    return True
