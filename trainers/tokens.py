"""How many tokens texts are, and what of them a text encoder does not read."""

from collections.abc import Sequence
from typing import Any


def num_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Of each text as a whole, with the tokens that begin and end it."""
    return [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []


def unread_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The words at the end of `text` that are cut off at `max_tokens`, one cut in two among them; "" if all is read."""
    if num_tokens(tokenizer, [text])[0] <= max_tokens:
        return ""
    num_read = max_tokens - tokenizer.num_special_tokens_to_add()
    tokens = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    if not tokenizer.is_fast:  # it tells no places in the text, so these are its own spelling of the words
        return str(tokenizer.decode(tokens["input_ids"][num_read:]))
    start = int(tokens["offset_mapping"][num_read][0])
    if text[max(start - 1, 0) : start + 1].isalnum():  # within a word
        start = 1 + max(text.rfind(space, 0, start) for space in " \t\r\n") or start
    return text[start:].strip()
