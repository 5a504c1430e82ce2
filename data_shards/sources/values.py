"""What a value of a table means, whatever held it: missing, text, several texts, or refused.

| in the table | means |
|---|---|
| null, NaN, NaT, blank text, and the words that programs write for these (MISSING) | missing |
| text, and bytes of UTF-8 | text, without blanks around it |
| a number | its text; a whole one without a fraction: 12.0 is `12` |
| a list | captions: each of its texts is one; in other columns refused |
| anything else: true and false, dates, infinity, objects, a list written as text | refused |

A CSV file has no types, so what pandas or R write there for a missing value comes as text. No caption, patient or
file is called so, and one that was would be lost or split wrongly less often than all that have no value.
"""

import re
import unicodedata
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

MISSING = frozenset(("", "nan", "NaN", "NAN", "<NA>", "NA", "N/A", "n/a", "#N/A", "NaT", "None", "null", "NULL"))
LIST_AS_TEXT = re.compile(r"""\[\s*['"].*['"]\s*\]|\{\s*['"].*\}""", re.DOTALL)
WHOLE = re.compile(r"(-?\d+)\.0+")


class BadValueError(Exception):
    """A value that a column cannot hold, in words that follow the column's name."""


def text(value: Any) -> str:
    """One text, empty if the value is missing. Raises BadValueError."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadValueError("bytes that are no text") from None
    if isinstance(value, str):
        value = str(value).strip()
        return "" if value in MISSING or not (value.isprintable() or any(map(_is_visible, value))) else value
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas', which need not be installed
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise BadValueError(f"{_kind(value)}, neither text nor a number")
    return _number(value)


def texts(value: Any) -> tuple[str, ...]:
    """The texts of a list, or the one text. Raises BadValueError."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(found for each in value if (found := text(each)))
    found = text(value)
    if LIST_AS_TEXT.fullmatch(found):
        raise BadValueError(
            "a list written as text: write a row for each caption, or the table as JSON Lines or Parquet"
        )
    return (found,) if found else ()


def label(value: Any) -> str:
    """The text of what is only ever compared, as a patient's: where a column has gaps, programs write 12 as 12.0."""
    found = unicodedata.normalize("NFC", text(value))
    whole = WHOLE.fullmatch(found)
    return whole[1] if whole else found


def _is_visible(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) in ("Cs", "Co")


def _number(value: int | float | Decimal) -> str:
    if isinstance(value, int):
        return str(value)
    if value.is_nan() if isinstance(value, Decimal) else value != value:
        return ""
    if value in (float("inf"), float("-inf")):
        raise BadValueError("infinity")
    return str(int(value)) if value == int(value) else str(value)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list | tuple | np.ndarray):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
