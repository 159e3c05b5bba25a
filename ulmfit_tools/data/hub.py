"""The Hub: whether it can be reached is asked once and briefly, and where it cannot, only the local cache is read."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import constants, get_session


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the Hub answers within `timeout` seconds; never asks where `HF_HUB_OFFLINE` is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the session's errors differ with the HTTP library below it; all of them mean no
        return False
    return True


@contextmanager
def hub_or_cache(online: bool) -> Iterator[None]:
    """Keeps a block to the local cache where the Hub is not there.

    Without this, each unknown name on a machine without a network costs half a minute of retries, each with a line of
    its own. The switches are those that `HF_HUB_OFFLINE` sets on import, put back at the end.
    """
    if online:
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
