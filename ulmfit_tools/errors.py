"""Errors that a user can cause, each a single line that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A wrong input, told in one line: what was received, what is allowed and what to do.

    The command line prints the line alone and exits with code 2; a Python caller sees an ordinary `ValueError`.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error line that suggests what was probably meant.

    Args:
        name: What was received.
        allowed: The names that exist.

    Returns:
        ` Did you mean "x"?` with the closest allowed name, or an empty string where none is close.
    """
    matches = get_close_matches(str(name), list(allowed), n=1)
    return f' Did you mean "{matches[0]}"?' if matches else ""
