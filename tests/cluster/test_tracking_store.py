"""A tracking URI that leads nowhere: one line within ten seconds, whatever is wrong with it."""

import shutil
import sqlite3
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cluster.evaluations import evaluation_document
from cluster.registry import RegisteredModel, model_folder
from cluster.tracking import Tracker, TrackingError, check_tracking, default_tracking_uri, find_run
from cluster.tracking_store import URI, check_store, sqlite_file, without_secrets
from tests.servers import free_port

NAMES = ["a b", "100%", "a%20b", "a#b", "a?b", "rün", "a&b=c;d", "it's", "[x]"]


@pytest.mark.parametrize("name", NAMES)
def test_the_database_lies_in_the_working_folder_whatever_its_name(
    name: str, empty_mlflow_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(empty_mlflow_database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv(URI, raising=False)
    tracker = Tracker.start(experiment="e", run_name="r", tags={})
    tracker.log_text("x", "a.txt")
    assert tracker.read_text("a.txt") == "x"
    assert sqlite_file(tracker.tracking_uri) == folder / "mlflow.db"
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT name FROM runs").fetchall() == [("r",)]
    assert len(list((folder / "mlartifacts").rglob("a.txt"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    monkeypatch.setenv(URI, tracker.tracking_uri)  # as a worker is given it
    assert default_tracking_uri() == tracker.tracking_uri


def old(file: Path) -> None:
    with sqlite3.connect(file) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.execute("DROP TABLE logged_models")


def foreign(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE patients (name)")


def text(file: Path) -> None:
    file.write_text("step,loss\n1,0.5\n")


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (old, "is of another version of MLflow \\(schema 451aebb31d03\\): .*mlflow db upgrade sqlite:///"),
        (foreign, "is a database of another program: name another in MLFLOW_TRACKING_URI"),
        (text, "is no SQLite database: move it away, or mend MLFLOW_TRACKING_URI="),
        (cut_off, "cannot be used \\(.*malformed"),
        (folder, "cannot be read \\(Is a directory\\)"),
    ],
)
def test_a_database_that_is_none_of_this_mlflow_is_left_as_it_is(
    spoil: Callable[[Path], None], said: str, tracking_uri: str, tmp_path: Path
) -> None:
    file = tmp_path / "mlflow.db"
    spoil(file)
    before = file.read_bytes() if file.is_file() else b""
    for act in (check_tracking, lambda: Tracker.start(experiment="e", run_name="r", tags={})):
        began = time.monotonic()
        with pytest.raises(TrackingError, match=said) as error:
            act()
        assert time.monotonic() - began < 10
        assert "\n" not in str(error.value)
    assert (file.read_bytes() if file.is_file() else b"") == before


def test_a_database_that_another_process_holds(tracking_uri: str, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"cannot be used .*locked.*: end what holds it, and try again"):
        check_tracking()
    assert time.monotonic() - began < 10
    holder.execute("ROLLBACK")
    check_tracking()
    holder.close()


def test_where_no_database_is_none_is_made_by_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI, raising=False)
    check_tracking()
    for ask in (RegisteredModel.of, evaluation_document):
        with pytest.raises(TrackingError, match=f"there is no MLflow database {tmp_path}/mlflow.db; set {URI}"):
            ask("models:/polyp/1")
    with pytest.raises(TrackingError, match="there is no MLflow database"), model_folder("models:/polyp@champion"):
        pass
    assert find_run("0" * 32) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("htp://host:5000", "has an unknown scheme: did you mean 'http'\\? MLflow knows http://, https://"),
        ("localhost:5000", "has an unknown scheme: did you mean http://localhost:5000\\?"),
        ("127.0.0.1:5000", "has an unknown scheme: did you mean http://127.0.0.1:5000\\?"),
        ("./mlruns", "is a folder, which MLflow no longer writes to: set it to sqlite:///mlflow.db"),
        ("file:///tmp/mlruns", "is a folder, which MLflow no longer writes to"),
        ("http://", "no MLflow server answers at http: \\(it names no host\\)"),
        ("http:/127.0.0.1:5000", "it names no host"),
        ("http://127.0.0.1:port", "no MLflow server answers"),
        ("http://[::1", "no MLflow server answers"),
        ("sqlite://", "names no file: set it to sqlite:///mlflow.db"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////nowhere/at/all/mlflow.db", "there is no folder /nowhere/at/all for the database mlflow.db"),
        ("postgresql+nodriver://user:secret@127.0.0.1/db", "is no URL of a database"),
        ("mysql+pymysql://user:secret@127.0.0.1/db", "needs the Python package pymysql, which is not installed"),
        ("mssql+pyodbc://user:se/cret@127.0.0.1/db", "needs the Python package pyodbc|no URL of a database"),
    ],
)
def test_a_uri_that_leads_nowhere_is_explained(uri: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI, uri)
    began = time.monotonic()
    with pytest.raises(TrackingError, match=said) as error:
        check_tracking()
    assert time.monotonic() - began < 10
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert "cret@" not in str(error.value)


def test_secrets_are_taken_out_of_uris_that_have_some() -> None:
    assert without_secrets("http://u:p@h:5000/x/") == "http://h:5000/x"
    assert without_secrets("postgresql://u:p/q@r@h/db") == "postgresql://h/db"
    for uri in ("sqlite:////home/a@b/mlflow.db", "http://h:5000/a@b", "databricks"):
        assert without_secrets(uri) == uri


class Odd(BaseHTTPRequestHandler):
    """A server that is well by its own word; `answers` has its status and body of other questions."""

    answers: tuple[int, bytes, str] = (200, b"", "")

    def do_GET(self) -> None:
        status, body, version = self.answers
        if self.path == "/health":
            status, body = 200, b"OK"
        elif self.path == "/version":
            status, body = (200, version.encode()) if version else (404, b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - http.server's name

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ((200, b"<html>log in</html>", ""), "is not that of an MLflow server of this version"),
        ((404, b"nothing here", ""), "is not that of an MLflow server of this version"),
        ((401, b"", ""), "access refused; set MLFLOW_TRACKING_USERNAME"),
        ((403, b"<html>no</html>", ""), "access refused; set MLFLOW_TRACKING_USERNAME"),
        ((500, b"", ""), "500"),
        ((200, b"{}", "2.9.2"), "is MLflow 2.9.2, which is too old for the MLflow 3"),
    ],
)
def test_a_server_that_answers_otherwise_is_explained(
    answers: tuple[int, bytes, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, "answers", answers)
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv(URI, f"http://127.0.0.1:{server.server_port}")
        began = time.monotonic()
        with pytest.raises(TrackingError, match=said) as error:
            check_tracking()
        assert time.monotonic() - began < 10
        assert "\n" not in str(error.value)
        server.shutdown()


def test_a_database_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a driver that is always there, for none of a real server is installed."""
    monkeypatch.setattr("sqlalchemy.engine.url.URL.get_dialect", lambda self: _Dialect)
    with pytest.raises(TrackingError, match=r"no database server answers at 127.0.0.1:.* start it, or mend"):
        check_store(f"postgresql://user:secret@127.0.0.1:{free_port()}/mlflow")


class _Dialect:
    @staticmethod
    def import_dbapi() -> object:
        return sqlite3
