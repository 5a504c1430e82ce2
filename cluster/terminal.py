"""Text of others on a terminal."""

from rich.markup import escape


def plain(text: object) -> str:
    """Text that prints literally: its square brackets are no markup, its control characters are shown, as \\x1b."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))
    return escape(shown)
