"""Mistakes that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One clear line: what is wrong, where, and what to do. The command line prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error of others says, in one line; what it is, if it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None if none is alike: for messages that ask 'did you mean …?'."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The question, with a space after it, to put before the choices there are; nothing if none is like `word`."""
    guess = nearest(word, choices)
    return f"did you mean '{guess}'? " if guess else ""
