"""Options of the commands."""

from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from cluster.errors import UserError


class OneValueEach(TyperCommand):
    """A command that refuses an option given twice if it takes one value: the first would be dropped without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # as while the shell completes a line
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(given).items():
                is_single = isinstance(option, TyperOption) and not (option.multiple or option.is_flag or option.count)
                if times > 1 and is_single:
                    raise UserError(f"{option.opts[0]} is given {times} times, and takes one value: leave one")
        return super().parse_args(ctx, args)


def refuse_repeats(app: typer.Typer) -> None:
    """Make every command that `app` has by now refuse single-valued options that are given twice."""
    for command in app.registered_commands:
        command.cls = OneValueEach
    for group in app.registered_groups:
        if group.typer_instance is not None:
            refuse_repeats(group.typer_instance)
