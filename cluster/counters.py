"""How often this process had to try again or to do without, counted where it happens for whoever exports it."""

import threading
from collections import Counter
from typing import Literal

Event = Literal["storage_read_retries", "storage_write_retries", "replaced_samples", "cache_hits", "cache_misses"]

_lock = threading.Lock()
_counts: Counter[Event] = Counter()


def count(event: Event, times: int = 1) -> None:
    """Add to what has happened in this process, from any thread."""
    with _lock:
        _counts[event] += times


def counted() -> Counter[Event]:
    """How often each has happened in this process so far; 0 for what never has."""
    with _lock:
        return _counts.copy()
