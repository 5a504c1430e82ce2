"""What a rank's own loggers say, line by line."""

import io
import json
import logging
from typing import Any

import pytest

from trainers.logs import json_logs

ORIGIN: dict[str, str | int] = {
    "run": "first",
    "mlflow_run_id": "abc",
    "stage": "denoiser",
    "rank": 1,
    "world_size": 2,
    "node": "n",
}


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    def refuse(number: str) -> None:
        raise ValueError(f"{number} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]


def test_a_line_says_what_where_and_when(stream: io.StringIO) -> None:
    with json_logs(stream, ORIGIN):
        record = logging.LogRecord("trainers.x", logging.WARNING, __file__, 1, "a\n%s", ("ü",), None)
        record.created = 1764079200.25
        logging.getLogger("trainers.x").handle(record)
    (line,) = lines(stream)
    said = {"level": "WARNING", "logger": "trainers.x", "message": "a\nü"}
    assert line == {"time": "2025-11-25T14:00:00.250+00:00"} | said | ORIGIN


def test_figures_and_exceptions_have_places_of_their_own(stream: io.StringIO) -> None:
    logger = logging.getLogger("data_shards.stream")
    with json_logs(stream, ORIGIN):
        logger.info("step 2", extra={"metrics": {"step": 2, "loss": float("nan"), "grad_norm": 0.5}})
        try:
            raise OSError("broken")
        except OSError:
            logger.exception("failed")
    told, failed = lines(stream)
    assert told["metrics"] == {"step": 2, "loss": "nan", "grad_norm": 0.5}
    assert failed["level"] == "ERROR"
    assert failed["exception"].splitlines()[-1] == "OSError: broken"
    assert "metrics" not in failed


def test_passwords_in_urls_are_left_out(stream: io.StringIO) -> None:
    with json_logs(stream, ORIGIN):
        logging.getLogger("cluster.storage").warning("no answer of %s", "http://user:pass@word@host:9000/bucket")
    assert lines(stream)[0]["message"] == "no answer of http://host:9000/bucket"


def test_only_medsynths_own_loggers_are_changed_and_only_inside(
    stream: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    with json_logs(stream, ORIGIN):
        for name in ("cluster.x", "data_shards.x", "trainers.x.y", "botocore", "trainersandmore"):
            logging.getLogger(name).warning("inside")
        logging.getLogger("cluster.x").debug("too much")
    logging.getLogger("trainers.x").warning("outside")
    assert [line["logger"] for line in lines(stream)] == ["cluster.x", "data_shards.x", "trainers.x.y"]
    assert [record.name for record in caplog.records] == ["botocore", "trainersandmore", "trainers.x"]
