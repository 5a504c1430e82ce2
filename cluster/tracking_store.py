"""Whether a tracking URI leads to a store that MLflow can use: one quick question, before mlflow asks for minutes."""

import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from cluster.errors import UserError, did_you_mean, first_line
from cluster.knock import knock

URI = "MLFLOW_TRACKING_URI"
CERTIFICATES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE")  # as MLflow and requests read them
SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SCHEMES = ("http", "https", "sqlite", *DATABASE_PORTS)
ANSWER_SECONDS = 4
MIGRATION_SECONDS = 2  # another process may be making the tables just now
# mlflow and SQLAlchemy print tracebacks of what they raise as well.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


class TrackingError(UserError):
    """The MLflow server or database does not answer, or refuses."""


def without_secrets(uri: str) -> str:
    """The URI without user and password, fit for terminals, files and error messages."""
    try:
        parts = urlsplit(uri)
    except ValueError:  # of brackets that hold no IPv6 address
        return re.sub(r"//.*@", "//", uri)
    if "@" not in parts.netloc:
        # A password with a slash in it ends the network location too early: no host has such a port.
        has_slash = re.search(r":(?!\d*$)", parts.netloc) and "@" in parts.path
        return (re.sub(r"//.*@", "//", uri) if has_slash else uri).rstrip("/")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI, whose path is percent-encoded as SQLAlchemy reads it; None for any other URI."""
    match = re.fullmatch(r"sqlite(?:\+pysqlite)?:///([^?]+)(?:\?.*)?", uri, re.DOTALL)
    return Path(unquote(match[1])) if match and match[1] != ":memory:" else None


def sqlite_uri(file: Path) -> str:
    """The URI of a SQLite file: its path is absolute and, where it must be, percent-encoded.

    Of a URI that names no driver mlflow takes the path as it is, and makes that folder too.
    """
    path = str(file.absolute())
    encoded = path.replace("%", "%25").replace("?", "%3F")
    return f"{SQLITE}{path}" if path == encoded else f"sqlite+pysqlite:///{encoded}"


@contextmanager
def impatient(seconds: int = ANSWER_SECONDS, retries: int = 1) -> Iterator[None]:
    """Inside the block, mlflow waits so long for an answer, and asks so often again; else it would for many minutes.

    The user's own settings of these count more.
    """
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    }
    own = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def check_store(uri: str, *, for_writing: bool = False) -> None:
    """Raise TrackingError, within ten seconds, unless the store of a tracking URI answers and MLflow can use it."""
    scheme = re.split(r"[:+]", uri, maxsplit=1)[0] if re.match(r"[\w.-]+(\+\w+)?:", uri) else ""
    if scheme in ("http", "https"):
        _check_server(uri, for_writing)
    elif scheme == "sqlite":
        _check_sqlite(uri, for_writing)
    elif scheme in DATABASE_PORTS:
        _check_database(uri, scheme)
    elif scheme in ("", "file") or len(scheme) == 1:
        raise TrackingError(
            f"{URI}={without_secrets(uri)} is a folder, which MLflow no longer writes to: set it to {SQLITE}mlflow.db"
        )
    elif not uri.startswith("databricks") and scheme not in {
        found.name for found in metadata.entry_points(group="mlflow.tracking_store")
    }:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        # An address without its scheme, such as localhost:5000, is the most frequent of these.
        guess = f"did you mean http://{uri}? " if re.fullmatch(r"[\w.-]+:\d+", uri) else did_you_mean(scheme, SCHEMES)
        raise TrackingError(f"{URI}={without_secrets(uri)} has an unknown scheme: {guess}MLflow knows {known}")


# --- servers ---


def _check_server(uri: str, for_writing: bool) -> None:
    place = without_secrets(uri)
    try:
        if not urlsplit(uri).hostname:
            raise ValueError("it names no host")
        _get(uri, "/health")
        version = _get(uri, "/version") if for_writing else ""
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # asked again later, with credentials
            return
        is_ill = error.code == 429 or error.code >= 500
        what = "does not answer questions now" if is_ill else "is no MLflow server"
        raise TrackingError(f"{place} {what}: HTTP {error.code}: mend it, or {URI}") from None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise TrackingError(
                f"the certificate of {place} is not to be trusted "
                f"({reason.verify_message}): set {CERTIFICATES[0]} to the file of the authority that signed it"
            ) from None
        raise TrackingError(f"no MLflow server answers at {place} ({reason}): start it, or mend {URI}") from None
    ours = metadata.version("mlflow")
    if re.match(r"\d+\.", version) and int(version.split(".")[0]) < int(ours.split(".")[0]):
        raise TrackingError(f"{place} is MLflow {version}, which is too old for the MLflow {ours} here: update it")


def _get(uri: str, path: str) -> str:
    """What a server answers to a question that needs no login; nothing where it does not know it."""
    try:
        question = f"{without_secrets(uri)}{path}"
        with urllib.request.urlopen(question, timeout=ANSWER_SECONDS, context=_trust(uri)) as answer:
            return str(answer.read(100).decode(errors="replace"))
    except urllib.error.HTTPError:
        if path == "/health":
            raise
        return ""


def _trust(tracking_uri: str) -> ssl.SSLContext | None:
    """Whom MLflow itself trusts, by its own variables."""
    if not tracking_uri.startswith("https"):
        return None
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()
    name = next((name for name in CERTIFICATES if os.environ.get(name)), CERTIFICATES[0])
    file = os.environ.get(name)
    try:
        return ssl.create_default_context(cafile=file)
    except OSError as error:  # as is ssl.SSLError, of a file that holds none
        raise TrackingError(f"{name}={file} holds no certificates ({error.strerror or error}): mend it") from None


# --- databases ---


def _check_sqlite(uri: str, for_writing: bool) -> None:
    file = sqlite_file(uri)
    if file is None:
        raise TrackingError(f"{URI}={uri} names no file: set it to {SQLITE}mlflow.db, or {SQLITE}/FOLDER/mlflow.db")
    mend = f"mend {URI}={uri}"
    if not file.parent.is_dir():
        raise TrackingError(f"there is no folder {file.parent} for the database {file.name}: make it, or {mend}")
    if not file.exists():
        if not os.access(file.parent, os.W_OK):
            raise TrackingError(f"no database can be made in {file.parent}, which is not writable: {mend}")
        return  # MLflow makes it
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
    except OSError as error:
        raise TrackingError(f"the database {file} cannot be read ({error.strerror}): {mend}") from None
    if head and head != b"SQLite format 3\0":
        raise TrackingError(f"{file} is no SQLite database: move it away, or {mend}")
    if for_writing and not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise TrackingError(f"the database {file} is not writable, or its folder is not: change that, or {mend}")
    _check_tables(uri, str(file), {"timeout": ANSWER_SECONDS}, for_writing)


def _check_database(uri: str, scheme: str) -> None:
    import sqlalchemy.exc
    from sqlalchemy.engine import make_url

    place = without_secrets(uri)
    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as error:
        package = getattr(error, "name", None) or first_line(error)
        raise TrackingError(
            f"{place} needs the Python package {package}, which is not installed: install it, or name another "
            f"driver in {URI}, such as {scheme}+DRIVER://…"
        ) from None
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise TrackingError(f"{URI}={place} is no URL of a database: {first_line(error)}") from None
    if url.host:
        address = f"{url.host}:{url.port or DATABASE_PORTS[scheme]}"
        try:
            knock(f"tcp://{address}", ANSWER_SECONDS)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise TrackingError(
                f"no database server answers at {address} ({reason}): start it, or mend {URI}"
            ) from None
    limit = {} if scheme == "mssql" else {"connect_timeout": ANSWER_SECONDS}
    _check_tables(uri, place, limit, for_writing=False)


def _check_tables(uri: str, place: str, connect_args: dict[str, Any], for_writing: bool) -> None:
    """Raise TrackingError unless a database is MLflow's, of this version, and not locked; or empty."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args=connect_args, poolclass=sqlalchemy.NullPool)
    deadline = time.monotonic() + MIGRATION_SECONDS
    try:
        while True:
            with engine.connect() as connection:
                tables = set(sqlalchemy.inspect(connection).get_table_names())
                found = None
                if "alembic_version" in tables:
                    found = connection.scalar(sqlalchemy.text("SELECT version_num FROM alembic_version"))
                if for_writing:
                    connection.rollback()
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                    connection.rollback()
            if not tables or found is None or found == _latest_schema():
                break
            if time.monotonic() > deadline:
                raise TrackingError(
                    f"{place} is of another version of MLflow (schema {found}): if of an older one, back it up and run "
                    f"'mlflow db upgrade {without_secrets(uri)}'; else install the MLflow that wrote it"
                )
            time.sleep(0.5)
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        remedy = "end what holds it, and try again" if "locked" in reason else f"mend it, or {URI}"
        raise TrackingError(f"the database {place} cannot be used ({reason}): {remedy}") from None
    finally:
        engine.dispose()
    if tables and "experiments" not in tables:
        raise TrackingError(f"{place} is a database of another program: name another in {URI}")


@cache
def _latest_schema() -> str:
    """Of the MLflow that is installed here."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    return str(_get_latest_schema_revision())
