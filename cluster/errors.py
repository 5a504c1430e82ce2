"""Mistakes that the user can mend."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As libraries tell of them that raise no OSError, such as safetensors'.
NO_ROOM_TOLD = re.compile("|".join([*(re.escape(os.strerror(number)) for number in NO_ROOM), "disk is full"]))


class UserError(Exception):
    """One clear line: what is wrong, where, and what to do. The command line prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """What an error of others says, in one line; what it is, if it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def no_room(error: BaseException | None) -> str | None:
    """In a line, why there was no room for what was to be written, if that is behind an error; else None."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in NO_ROOM) or NO_ROOM_TOLD.search(str(error)):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None if none is alike: for messages that ask 'did you mean …?'."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), None)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """The question, with a space after it, to put before the choices there are; nothing if none is like `word`."""
    guess = nearest(word, choices)
    return f"did you mean '{guess}'? " if guess else ""
