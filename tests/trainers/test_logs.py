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


@pytest.mark.parametrize(
    "text",
    [
        "https://b.s3.amazonaws.com/k?X-Amz-Credential=SECRET%2F20261129&X-Amz-Expires=60&X-Amz-Signature=SECRET",
        "GET https://h/k?x-amz-security-token=SECRET/+==&a=b failed",
        "{'X-Amz-Security-Token': 'SECRET', 'Host': 'h'}",
        "https://storage.googleapis.com/k?X-Goog-Signature=SECRET",
        "https://h/k?AWSAccessKeyId=SECRET&Signature=SECRET&Expires=1",
        "https://h.blob.core.windows.net/k?sv=1&sig=SECRET",
        "Authorization: Bearer SECRET",
        "headers={'Authorization': 'Basic U0VDUkVU+SECRET/==', 'Accept': '*'}",
        "authorization=Basic SECRET",
        "Authorization: AWS4-HMAC-SHA256 Credential=SECRET/20261129/us-east-1/s3/aws4_request, Signature=SECRET",
        "the token: Bearer eyJhbGciOi.SECRET-x_y",
        "http://user:SECRET/SECRET@host:5000/x",
        "http://user:SECRET@SECRET@host/x",
        "postgresql+psycopg://mlflow:12/SECRET@db:5432/mlflow",
        "http://SECRET@host/x",
        "aws_secret_access_key = SECRET",
        'password="SECRET"',
        "AWS_SESSION_TOKEN=SECRET",
    ],
)
def test_secrets_are_left_out_wherever_they_stand(text: str, stream: io.StringIO) -> None:
    with json_logs(stream, ORIGIN):
        logging.getLogger("cluster.storage").warning("before %s after", text)
        try:
            raise OSError(text)
        except OSError:
            logging.getLogger("cluster.storage").exception("failed")
    assert "SECRET" not in stream.getvalue()
    assert lines(stream)[0]["message"].startswith("before ")


@pytest.mark.parametrize(
    "text",
    [
        "reading s3://bucket/x@y/00.tar again: an error of 3:04 pm, mail a@b.de",
        "models:/polyp@champion at http://host:5000, the signature is of version 2",
        "basic training; the bearer of news: step 5",
    ],
)
def test_what_is_no_secret_stays(text: str, stream: io.StringIO) -> None:
    with json_logs(stream, ORIGIN):
        logging.getLogger("cluster.storage").warning(text)
    assert lines(stream)[0]["message"] == text


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
