"""What medsynth's own loggers say in a rank, as lines of JSON that tell of which run, stage and rank they are."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

PACKAGES = ("cluster", "data_shards", "trainers")
"""Each module's logger has the module's name, so these are the parents of all that a rank may use."""

SECRETS = (
    # A user and a password in a URL; the password may hold slashes and at signs.
    (re.compile(r"//(?:[^\s\"'/:@]*:[^\s\"']*|[^\s\"'/]+)@"), "//"),
    # Parameters of signed URLs, and headers, also as they stand in a dictionary.
    (
        re.compile(
            r"(?i)\b(X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)\b[\"']*\s*[=:]\s*[\"']*)[^\s&\"',;}]+"
        ),
        r"\1…",
    ),
    (re.compile(r"(?i)\b((?:Proxy-)?Authorization[\"']*\s*[=:]\s*[\"']*)[^\r\n\"']+"), r"\1…"),
    (re.compile(r"(?i)\b(Bearer|Basic)\s+[\w.~+/=-]{16,}"), r"\1 …"),
    (
        re.compile(
            r"(?i)((?:password|passwd|secret(?:_access)?_key|session_token|access_token|api_?key|AWSAccessKeyId|"
            r"(?<![\w-])(?:Signature|sig|Credential))[\"']*\s*[=:]\s*[\"']*)[^\s&\"',;}]+"
        ),
        r"\1…",
    ),
)
"""What is left out of logs: a pattern, and what stands in its place."""


def redacted(text: str) -> str:
    """The text without passwords, signatures and tokens."""
    for pattern, place in SECRETS:
        text = pattern.sub(place, text)
    return text


class JsonLines(logging.Formatter):
    """A record as one line of JSON: what it says and when, then `origin`.

    The extra attribute `metrics` of a record, figures by name, is an object of its own; those that are not finite
    are strings in it ("nan"), for JSON has no such numbers. Passwords, signatures and tokens are left out.
    """

    def __init__(self, origin: Mapping[str, str | int]) -> None:
        super().__init__()
        self._origin = dict(origin)

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {"time": time, "level": record.levelname, "logger": record.name}
        line |= {"message": redacted(record.getMessage()), **self._origin}
        if metrics := getattr(record, "metrics", None):
            line["metrics"] = {n: value if math.isfinite(value) else str(value) for n, value in metrics.items()}
        if record.exc_info:
            line["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line)


@contextmanager
def json_logs(stream: TextIO, origin: Mapping[str, str | int]) -> Iterator[None]:
    """Inside the block, what medsynth's loggers say from INFO on goes to `stream` as JsonLines, and nowhere else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines(origin))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # the root's handlers would say it once more, in their own form
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
