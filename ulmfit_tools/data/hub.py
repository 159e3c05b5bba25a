"""Whether the Hub can be reached, asked once and briefly."""

from huggingface_hub import constants, get_session


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether the Hub answers within `timeout` seconds; never asks where `HF_HUB_OFFLINE` is set.

    Without this, an unknown name on a machine without a network costs a minute of retries, each with its own line.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the session's errors differ with the HTTP library below it; all of them mean no
        return False
    return True
