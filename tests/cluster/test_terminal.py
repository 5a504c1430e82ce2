"""Text of others is printed as it stands, and a printed command is the command."""

import io
import os
import random
import shlex
import subprocess

import pytest
from rich.console import Console
from rich.table import Table

from cluster.terminal import command_line, plain

HOSTILE = [
    "[bold]x[/]",
    "[/]",
    "[link=http://x]y[/link]",
    "a[1]",
    "scan [left]",
    "C:\\scans\\",
    "\\",
    "\\[red]",
    "\\\\[",
    ":skull:",
    'it\'s "quoted" & $HOME; `id`',
    "röntgen 図 👩\u200d⚕️",
    "",
]


def printed(markup: str) -> str:
    out = io.StringIO()
    Console(file=out, width=60, highlight=False, emoji=False).print(markup, soft_wrap=True)
    return out.getvalue().removesuffix("\n")


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_is_printed_as_it_stands_wherever_it_stands(text: str) -> None:
    for line in ("{}", "{} is there", "[bold]{}[/]", "{}[red]!", "{}{}"):
        expected = line.replace("[bold]", "").replace("[/]", "").replace("[red]", "").format(text, text)
        assert printed(line.format(plain(text), plain(text))) == expected


def test_any_mixture_of_brackets_and_backslashes_is_printed_as_it_stands() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("\\[]/ab#@= ", k=draw.randrange(9)))
        assert printed(f"[bold]{plain(text)}[/]|{plain(text)}[red]") == f"{text}|{text}"


def test_in_a_table_too() -> None:
    table = Table("[a]", show_header=False)
    table.add_row(plain("[b] \x1b[31m"))
    out = io.StringIO()
    Console(file=out, width=60).print(table)
    assert "[b] \\x1b[31m" in out.getvalue()


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printed(plain("\x1b]0;owned\x07 a\rb\nc\td \x9b2J \u202edcba \x00")) == (
        "\\x1b]0;owned\\x07 a\\rb\\nc\\td \\u009b2J \\u202edcba \\x00"
    )
    assert printed(plain(os.fsdecode(b"r\xf6ntgen"))) == "r\\xf6ntgen"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_printed_command_is_the_command(text: str) -> None:
    arguments = ["medsynth", "train", text, "--set", f"name={text}", "--run", text]
    assert shlex.split(printed(plain(command_line(arguments)))) == arguments


def test_a_shell_reads_control_characters_back() -> None:
    for text in ("a\nb", "\x1b[31m it's \\ red", "\t\u202e\x9b", "[x]\r"):
        line = printed(plain(command_line(["printf", "%s", text])))
        assert "\n" not in line
        found = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
        assert found.stdout.decode() == text
