"""What is printed for people: text of others as it is, and commands that can be copied as they stand."""

import re
import shlex
from collections.abc import Sequence

from rich.console import Console

from cluster import storage

console = Console(highlight=False, emoji=False)
"""Of every command: it colours nothing by itself, and ':skull:' in a caption stays these seven characters."""

# Control characters, marks that turn the direction of a line, and halves of characters, which bytes that are no UTF-8
# become in file names: a terminal would obey the first two, and could not be sent the last.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NOTHING = "[none][/none]"


def say_starting(what: str) -> None:
    """Before what takes seconds to import or to start, and says nothing itself."""
    console.print(f"Starting: {what}", soft_wrap=True, markup=False)


def ask(*uris: str) -> None:
    """Say of which places a server is asked, for it may take its time.

    Raises UserError within seconds if no S3 server answers; of MLflow, `cluster.tracking.connect` finds that out.
    """
    for uri in uris:
        if uri.startswith(("models:/", "runs:/")):
            console.print(f"Asking MLflow for {visible(uri)}", soft_wrap=True, markup=False)
        elif storage.is_remote(uri):
            console.print(f"Asking S3 for {visible(uri)}", soft_wrap=True, markup=False)
            storage.check_answers(uri)


def plain(text: object) -> str:
    """Text of others, such as names, captions and errors, to put into a line of rich's markup.

    It is printed as it stands, whatever brackets are in it, and in one line; a control character is shown by its
    escape sequence, as the four characters \\x1b, and not obeyed.
    """
    line = visible(text)
    backslashes = line[len(line.rstrip("\\")) :]
    # rich.markup.escape leaves a bracket after a backslash, and a backslash before a tag, to be read as markup. Here a
    # tag that changes nothing stands behind each, so that neither depends on what follows.
    line = line.replace("[", rf"\[{_NOTHING}")
    return f"{line}{backslashes}{_NOTHING}" if backslashes else line


def visible(text: object) -> str:
    """The same for what is printed without markup."""
    return _UNSAFE.sub(_escape_sequence, str(text))


def command_line(arguments: Sequence[object]) -> str:
    """The command of these arguments in one line, to be copied into a shell: print it by `plain`, with soft_wrap.

    shlex.split gives them back, but for those with control characters or line breaks: they are written as $'\\n',
    which bash and zsh read.
    """
    return " ".join(_quoted(str(argument)) for argument in arguments)


def _quoted(argument: str) -> str:
    if not _UNSAFE.search(argument):
        return shlex.quote(argument)
    escaped = argument.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{_UNSAFE.sub(_escape_sequence, escaped)}'"


def _escape_sequence(found: re.Match[str]) -> str:
    """As Python and the shells both write a character that is not to be sent."""
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # what Python makes of a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}")
