"""The stack: what must hold of any servers, with small ones in their place, and once the real three from up to down."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from cluster import stack, storage
from cluster.errors import UserError
from cluster.s3_server import ObjectFolder, only_for
from cluster.stack import Probe, Process, Server, Settings, State
from medsynth import app
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
ANSWERING = """
import http.server, subprocess, sys
port, children = int(sys.argv[1]), int(sys.argv[2])
for _ in range(children):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""
FAILING = "import sys; print('no such database'); sys.exit(3)"


def stand_in(name: str, option: str, folder: Path, port: int, *command: str) -> Server:
    return Server(
        name=name,
        command=command or (sys.executable, "-c", ANSWERING, str(port), "1"),
        environment=os.environ,
        log=folder / "logs" / f"{name}.log",
        ports={option: port},
        probes=[Probe(f"http://127.0.0.1:{port}/")],
    )


def two_servers(folder: Path, state: State) -> list[Server]:
    settings = state.settings
    return [
        stand_in("s3", "--s3-port", folder, settings.s3_port),
        stand_in("mlflow", "--mlflow-port", folder, settings.mlflow_port),
    ]


@pytest.fixture
def ports() -> dict[str, int]:
    return {name: free_port() for name in ("s3_port", "mlflow_port", "ray_port", "dashboard_port")}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a stack that is ended whatever the test found."""
    place = tmp_path / "stack"
    yield place
    link = State.read(place).short_folder
    stack.down(place)
    assert link is None or not link.exists()


def pids(folder: Path) -> dict[str, int]:
    return {name: processes[0].pid for name, processes in State.read(folder).servers.items()}


def is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_up_twice_starts_once_and_down_ends_children_too(folder: Path, ports: dict[str, int]) -> None:
    assert stack.up(folder, ports, two_servers) == ["s3", "mlflow"]
    first = State.read(folder)
    assert all(len(processes) == 2 for processes in first.servers.values())
    assert stack.up(folder, {}, two_servers) == []
    assert State.read(folder) == first
    assert [server.state for server in stack.status(folder, two_servers)] == ["up", "up"]
    assert stack.down(folder) == ["mlflow", "s3"]
    assert not [process for processes in first.servers.values() for process in processes if process.find()]
    assert is_free(ports["s3_port"])
    assert is_free(ports["mlflow_port"])
    assert stack.down(folder) == []
    assert (folder / "logs" / "s3.log").read_text().count("listening") == 1


def test_what_was_killed_is_started_again_and_its_orphans_are_ended(folder: Path, ports: dict[str, int]) -> None:
    stack.up(folder, ports, two_servers)
    before = State.read(folder).servers
    os.kill(before["s3"][0].pid, signal.SIGKILL)
    until(lambda: before["s3"][0].find() is None)
    assert before["s3"][1].find() is not None
    assert [server.state for server in stack.status(folder, two_servers)] == ["down", "up"]
    assert stack.up(folder, {}, two_servers) == ["s3"]
    assert before["s3"][1].find() is None
    assert State.read(folder).servers["mlflow"] == before["mlflow"]


def test_a_server_that_fails_shows_the_end_of_its_log_and_nothing_stays(folder: Path, ports: dict[str, int]) -> None:
    def servers(folder: Path, state: State) -> list[Server]:
        failing = stand_in("ray", "--ray-port", folder, state.settings.ray_port, sys.executable, "-c", FAILING)
        return [*two_servers(folder, state), failing]

    with pytest.raises(UserError) as error:
        stack.up(folder, ports, servers)
    assert str(error.value).startswith("ray ended right after its start")
    assert str(folder / "logs" / "ray.log") in str(error.value)
    assert str(error.value).endswith("no such database")
    assert State.read(folder).servers == {}
    assert is_free(ports["s3_port"])


def test_a_taken_port_is_named_with_its_owner_and_its_option(folder: Path, ports: dict[str, int]) -> None:
    with socket.create_server(("127.0.0.1", ports["mlflow_port"])), pytest.raises(UserError) as error:
        stack.up(folder, ports, two_servers)
    message = str(error.value)
    for part in (str(ports["mlflow_port"]), "--mlflow-port", f"process {os.getpid()}"):
        assert part in message
    assert is_free(ports["s3_port"])  # nothing was started


def test_settings_stay_until_the_servers_have_ended(folder: Path, ports: dict[str, int]) -> None:
    stack.up(folder, ports, two_servers)
    with pytest.raises(UserError, match="s3, mlflow already run with other settings"):
        stack.up(folder, {"bucket": "another"}, two_servers)
    stack.down(folder)
    assert State.read(folder).settings == Settings.model_validate(ports)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket": "../out"}, "--bucket: "),
        ({"s3_port": 5000}, "each server needs a port of its own, not 5000, 5000, 6379, 8265"),
    ],
)
def test_wrong_settings_are_told(folder: Path, changes: Mapping[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stack.up(folder, changes, two_servers)


def test_a_process_that_has_a_recorded_id_by_now_is_left_alone(folder: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        known = Process.of(stranger.pid)
        assert known.find() is not None
        folder.mkdir()
        for other in ({"began": known.began - 1}, {"boot": "another"}):
            State(servers={"s3": (known.model_copy(update=other),)}).write(folder)
            assert stack.down(folder) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_clock_that_is_set_changes_no_process(
    folder: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil tells when a process began by the machine's clock, as do some of its own comparisons."""
    stack.up(folder, ports, two_servers)
    create_time = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 5)
    assert [server.state for server in stack.status(folder, two_servers)] == ["up", "up"]
    assert stack.up(folder, {}, two_servers) == []
    assert stack.down(folder) == ["mlflow", "s3"]
    assert stack.down(folder) == []
    assert all(map(is_free, (ports["s3_port"], ports["mlflow_port"])))


def test_a_process_whose_name_holds_brackets_is_known() -> None:
    name = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", name], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        before = Process.of(process.pid)
        process.stdout.readline()
        assert Process.of(process.pid) == before
    finally:
        process.kill()
        process.communicate()


def test_who_does_not_listen_is_killed() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert stack.end([Process.of(process.pid)], seconds=0.5)
    assert process.wait(5) == -signal.SIGKILL
    process.stdout.close()


def test_two_at_once_start_one_stack(folder: Path, ports: dict[str, int]) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(stack.up, folder, ports, two_servers) for _ in range(2)]
    assert sorted(started.result() for started in both) == [[], ["s3", "mlflow"]]


def test_keys_are_the_owners_alone_and_no_variable_has_them(folder: Path, ports: dict[str, int]) -> None:
    stack.up(folder, ports, two_servers)
    assert folder.stat().st_mode & 0o777 == 0o700
    keys = (folder / stack.AWS_CREDENTIALS, folder / stack.RAY_TOKEN)
    assert [path.stat().st_mode & 0o777 for path in keys] == [0o600, 0o600]
    shown = "\n".join(stack.shell_lines(folder))
    assert str(keys[0]) in shown
    assert not [word for path in keys for word in path.read_text().split() if len(word) >= 32 and word in shown]


def test_a_damaged_state_is_told(folder: Path) -> None:
    folder.mkdir()
    (folder / stack.STATE).write_text("{")
    with pytest.raises(UserError, match=r"stack\.json is damaged"):
        stack.status(folder)
    (folder / stack.STATE).unlink()  # as the message says


def test_down_and_status_of_no_stack_make_none(folder: Path) -> None:
    assert stack.down(folder) == []
    assert [server.state for server in stack.status(folder)] == ["down", "down", "down"]
    assert not folder.exists()


# --- the S3 server ---


def test_objects_on_disk_are_those_that_were_put(tmp_path: Path) -> None:
    folder = ObjectFolder(tmp_path)
    folder.create_bucket("one")
    objects = {"a": b"1\n2", "a/b": b"", "a/": b"", "../x ü%2F": b"\0" * 10, "k" * 1000: b"long"}
    for key, value in objects.items():
        folder.put("one", key, '"etag"', value)
    folder.put("one", "a/b", '"etag"', b"again")
    folder.delete("one", "a/")
    folder.delete("one", "a/")
    (tmp_path / "one" / ".half").write_bytes(b"cut off")
    expected = {key: value for key, value in (objects | {"a/b": b"again"}).items() if key != "a/"}
    assert {key: value for key, etag, value in folder.objects("one") if etag == "etag"} == expected
    assert folder.buckets() == ["one"]


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("AWS4-HMAC-SHA256 Credential=mine/20260101/us-east-1/s3/aws4_request, Signature=0", "200 OK"),
        ("AWS4-HMAC-SHA256 Credential=other/20260101/us-east-1/s3/aws4_request, Signature=0", "403 Forbidden"),
        ("", "403 Forbidden"),
    ],
)
def test_the_s3_server_answers_only_the_key(authorization: str, status: str) -> None:
    found = []

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        return []

    guarded = only_for("mine", answer)
    list(guarded({"HTTP_AUTHORIZATION": authorization}, lambda status, headers: found.append(status)))
    assert found == [status]


# --- compose.yaml ---


def test_compose_is_for_this_machine_alone_pinned_checked_and_without_secrets() -> None:
    text = (ROOT / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"minio", "postgres", "mlflow", "ray"}
    for name, service in services.items():
        assert service["healthcheck"]["test"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        image = service.get("image") or service["build"]["dockerfile_inline"].split("FROM ")[1].split()[0]
        tag = image.rpartition(":")[2]
        assert "/" not in tag, f"{name}: {image} has no tag"
        assert tag != "latest", name
        for variable, value in service.get("environment", {}).items():
            if (
                any(word in variable for word in ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY"))
                and "_PATH" not in variable
            ):
                assert value.startswith("${"), f"{name}: {variable}"
                assert ":?" in value, f"{name}: {variable} must be refused when it is empty"
    example = (ROOT / ".env.example").read_text()
    wanted = {part.partition(":?")[0] for part in text.split("${")[1:] if ":?" in part.partition("}")[0]}
    assert wanted == {line.partition("=")[0] for line in example.splitlines() if line and not line.startswith("#")}
    assert all(line.endswith("=") for line in example.splitlines() if line and not line.startswith("#"))


# --- the real three ---


def medsynth(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["stack", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def http_status(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_whole_stack(ports: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder whose path is too long for sockets" / ("x" * 60)
    where = ("--folder", str(folder))
    options = [part for name, port in ports.items() for part in (f"--{name.replace('_', '-')}", str(port))]
    met: set[Process] = set()

    def meet() -> None:
        met.update(process for found in State.read(folder).servers.values() for process in found)

    try:
        result = medsynth("up", *where, *options)
        assert result.exit_code == 0, result.output or result.exception
        assert "Started: s3, mlflow, ray. Already ran: nothing." in result.output
        meet()
        for name in stack.FOREIGN_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in stack.environment(folder, State.read(folder).settings).items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        for process in (psutil.Process(known.pid) for known in met if psutil.pid_exists(known.pid)):
            with suppress(psutil.NoSuchProcess):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        assert connection.laddr.ip.removeprefix("::ffff:") == "127.0.0.1", process.cmdline()
        job_server = f"http://127.0.0.1:{ports['dashboard_port']}/api/version"
        assert http_status(job_server) == 401
        assert http_status(job_server, (folder / stack.RAY_TOKEN).read_text()) == 200

        large = os.urandom(9 * 2**20)  # in parts
        (tmp_path / "large").write_bytes(large)
        storage.upload_file(tmp_path / "large", "s3://medsynth/large")
        storage.write_bytes("s3://medsynth/small", b"small")
        storage.write_bytes("s3://medsynth/gone", b"")
        storage.delete("s3://medsynth/gone")
        client = MlflowClient()
        run = client.create_run("0").info.run_id
        client.log_metric(run, "loss", 0.5)
        client.log_text(run, "kept", "note.txt")

        before = pids(folder)
        again = medsynth("up", *where)
        assert "Started: nothing. Already ran: s3, mlflow, ray." in again.output
        assert pids(folder) == before
        assert medsynth("status", *where).exit_code == 0

        os.kill(before["s3"], signal.SIGKILL)
        until(lambda: State.read(folder).leader("s3") is None)
        result = medsynth("status", *where)
        assert result.exit_code == 1
        assert result.output.count(" down ") == 1
        assert "Started: s3. Already ran: mlflow, ray." in medsynth("up", *where).output
        meet()
        after = pids(folder)
        assert after["s3"] != before["s3"]
        assert {**after, "s3": 0} == {**before, "s3": 0}

        result = medsynth("down", *where)
        assert result.exit_code == 0, result.output or result.exception
        assert not [process for process in met if process.find()]
        assert all(map(is_free, ports.values()))

        assert medsynth("up", *where).exit_code == 0
        meet()
        storage.forget_clients()
        assert storage.read_bytes("s3://medsynth/large") == large
        assert storage.list_files("s3://medsynth") == ["large", "small"]
        assert [bucket["Name"] for bucket in boto3.Session().client("s3").list_buckets()["Buckets"]] == ["medsynth"]
        found = MlflowClient().get_run(run)
        assert found.data.metrics == {"loss": 0.5}
        assert Path(MlflowClient().download_artifacts(run, "note.txt", str(tmp_path))).read_text() == "kept"
    finally:
        stack.down(folder)
    assert not [process for process in met if process.find()]
