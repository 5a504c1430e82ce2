"""The bounds of what a user may set when a model draws: one place for every command, sweep, recipe and server."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import UserError

TRAIN_TIMESTEPS = 1000
"""Of a model that does not say how many it was trained with, as FLUX: more steps than that it does not know."""
MOST_CHARACTERS = 10_000
"""Of a prompt: some twenty times what any text encoder here reads."""
EXACT = 2**53
"""Up to here a float holds every whole number."""


@dataclass(frozen=True)
class Bounds:
    """A number's type and its range, both ends included."""

    kind: type[int] | type[float]
    low: int
    high: int

    def check(self, name: str, value: Any, *, high: int | None = None) -> float:
        """`value` as a number of this kind; `high` takes the place of the upper end.

        Raises UserError for one out of range, NaN, text, a boolean, or a fraction where a whole number is asked for.
        """
        high = self.high if high is None else high
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and self.kind is int and isinstance(value, float):
            is_number = math.isfinite(value) and value == int(value) and abs(value) <= EXACT
        if not is_number or not self.low <= value <= high:
            kind = "a whole number" if self.kind is int else "a number"
            raise UserError(f"{name} must be {kind} from {self.low} to {high}, not {_shown(value)}")
        return self.kind(value)


GUIDANCE_SCALE = Bounds(float, 0, 100)
TRUE_CFG_SCALE = Bounds(float, 1, 100)
NUM_INFERENCE_STEPS = Bounds(int, 1, 10_000)
"""For a model at hand, the upper end is the number of timesteps that it was trained with."""
SEED = Bounds(int, 0, 2**63 - 1)
NUM_IMAGES = Bounds(int, 1, 1_000_000)
BATCH_SIZE = Bounds(int, 1, 4096)

SETTINGS = {
    "guidance_scale": GUIDANCE_SCALE,
    "true_cfg_scale": TRUE_CFG_SCALE,
    "num_inference_steps": NUM_INFERENCE_STEPS,
}


def check_settings(settings: Mapping[str, Any], *, most_steps: int | None = None) -> dict[str, Any]:
    """The same settings, their numbers within bounds; `most_steps` are the model's training timesteps.

    Raises UserError for the first that is not.
    """
    checked = dict(settings)
    for name, bounds in SETTINGS.items():
        if name in checked:
            checked[name] = bounds.check(
                name, checked[name], high=most_steps if name == "num_inference_steps" else None
            )
    if "negative_prompt" in checked:
        check_text("negative_prompt", checked["negative_prompt"])
    return checked


def check_prompt(prompt: Any) -> str:
    """The prompt. Raises UserError if it is no text, or empty."""
    text = check_text("prompt", prompt)
    if not text.strip():
        raise UserError("prompt must say what to draw: it is empty")
    return text


def check_text(name: str, text: Any) -> str:
    """The text. Raises UserError if it is none, too long, or holds characters that no file can."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be text, not {_shown(text)}")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{name} has {len(text):,} characters: at most {MOST_CHARACTERS:,}")
    if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise UserError(f"{name} holds a character that is no text, such as NUL or half of a surrogate pair")
    return text


def _shown(value: Any) -> str:
    """`value` as the user gave it, cut short."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
