"""The whole stack on one machine: an S3 server, MLflow and a Ray head, started, watched and ended as one.

All of it is below one folder: what runs (stack.json), keys, logs/, and what is kept: mlflow.db, artifacts/ and s3/.
Servers listen on 127.0.0.1 alone, and the folder is its owner's alone.
"""

import configparser
import fcntl
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster import storage
from cluster.errors import UserError
from cluster.s3_server import HOST, REGION
from cluster.tracking_store import sqlite_uri

START_SECONDS = 180  # a busy machine takes a minute to import what they need
END_SECONDS = 10  # from SIGTERM to SIGKILL; Ray alone would drain for half a minute
ANSWER_SECONDS = 5
LOG_LINES = 20  # of a server that failed, in the message

STATE, LOCK, ENVIRONMENT = "stack.json", "lock", "env"
AWS_CREDENTIALS, RAY_TOKEN = "aws_credentials", "ray_token"
FOREIGN_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_ENDPOINT_URL_S3", "AWS_REGION", "RAY_AUTH_TOKEN"),
)
"""Would outdo those of the stack: they must be unset where it is used."""
CLIENT_VARIABLES = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Tell a client where the servers are; a server that starts must not take itself for a client."""

# A proxy that the environment names is for the world outside.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(Block):
    """What a stack is started with."""

    mlflow_port: int = Field(default=5000, ge=1, le=65535)
    s3_port: int = Field(default=9000, ge=1, le=65535)
    ray_port: int = Field(default=6379, ge=1, le=65535)
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    bucket: str = Field(default="medsynth", pattern=r"^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$")
    cpus: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [self.mlflow_port, self.s3_port, self.ray_port, self.dashboard_port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"each server needs a port of its own, not {', '.join(map(str, ports))}")
        return self


class Process(Block):
    """A process by what no other has: its id, which is given anew some day, and when it began, by no clock."""

    pid: int
    boot: str
    """Which start of the machine it began after."""
    began: float
    """Clock ticks from that start to its own; where the system does not tell these, Unix time."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """The living process that has this id now. Raises psutil.NoSuchProcess if there is none."""
        return cls(pid=pid, boot=_boot(), began=_began(pid))

    def find(self) -> psutil.Process | None:
        """The process if it lives; not another that has its id by now, nor what is left of a dead one."""
        with suppress(psutil.Error):
            found = psutil.Process(self.pid)
            if (self.boot, self.began) == (_boot(), _began(self.pid)) and not _is_dead(found):
                return found
        return None


class State(Block):
    """What is written down of a stack."""

    settings: Settings = Settings()
    servers: dict[str, tuple[Process, ...]] = {}
    """Of each that was started, in that order: the leader of its session, then the others."""
    short_folder: Path | None = None
    """Has a link to the folder of Ray's session, whose sockets must have paths of less than 107 characters."""

    def leader(self, server: str) -> psutil.Process | None:
        """The process that was started as this server, if it lives."""
        return self.servers[server][0].find() if server in self.servers else None

    def noting(self, folder: Path, server: str, processes: Iterable[Process]) -> "State":
        """The state with these processes of a server, once it is written down."""
        others = {name: found for name, found in self.servers.items() if name != server}
        noted = tuple(processes)
        state = self.model_copy(update={"servers": others | ({server: noted} if noted else {})})
        state.write(folder)
        return state

    def write(self, folder: Path) -> None:
        storage.write_bytes(str(folder / STATE), self.model_dump_json(indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> "State":
        """As it was written, or of a stack that never was. Raises UserError if the file is damaged."""
        path = folder / STATE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValidationError:
            raise UserError(f"{path} is damaged: end the servers that it names by hand, and delete it") from None


@dataclass(frozen=True)
class Probe:
    """A question to a server, and the HTTP status of the answer that shows it to be well."""

    url: str
    status: int = 200
    token: str | None = None


@dataclass(frozen=True)
class Server:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    ports: Mapping[str, int]
    """By the option that sets it; the first is the one that a person looks at."""
    probes: Sequence[Probe]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{next(iter(self.ports.values()))}"


@dataclass(frozen=True)
class Status:
    """How a server is."""

    name: str
    state: Literal["up", "down", "no answer"]
    url: str
    pid: int | None
    log: Path


ServersOf = Callable[[Path, State], Sequence[Server]]


def real_servers(folder: Path, state: State) -> list[Server]:
    """S3, MLflow and Ray as they are started for `folder`."""
    settings, logs = state.settings, folder / "logs"
    s3, mlflow, dashboard = (
        f"http://{HOST}:{port}" for port in (settings.s3_port, settings.mlflow_port, settings.dashboard_port)
    )
    unset = (*FOREIGN_VARIABLES, *CLIENT_VARIABLES)
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    clients = environment(folder, settings)
    return [
        Server(
            name="s3",
            command=[sys.executable, "-m", "cluster.s3_server", str(folder / "s3"), str(settings.s3_port)],
            environment=inherited | {"S3_KEY_ID": _s3_key_id(folder)},
            log=logs / "s3.log",
            ports={"--s3-port": settings.s3_port},
            probes=[Probe(s3, status=403)],  # without the key
        ),
        Server(
            name="mlflow",
            command=[
                *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(settings.mlflow_port)),
                *("--backend-store-uri", sqlite_uri(folder / "mlflow.db")),
                *("--serve-artifacts", "--artifacts-destination", (folder / "artifacts").as_uri(), "--workers", "1"),
            ],
            # Its job runners are eight more processes, for what nothing here asks of it.
            environment=inherited | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
            log=logs / "mlflow.log",
            ports={"--mlflow-port": settings.mlflow_port},
            probes=[Probe(f"{mlflow}/health")],
        ),
        Server(
            name="ray",
            command=[
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
                *(f"--node-ip-address={HOST}", f"--port={settings.ray_port}"),
                *("--include-dashboard=true", f"--dashboard-host={HOST}"),
                *(f"--dashboard-port={settings.dashboard_port}", f"--temp-dir={state.short_folder}/ray"),
                # All others on whichever ports are free; of this one Ray must be told.
                *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
                f"--ray-client-server-port={_free_port()}",
                *([] if settings.cpus is None else [f"--num-cpus={settings.cpus}"]),
            ],
            # Of jobs it is the environment too: they find the other servers, and this Python as `python`.
            environment=inherited
            | {name: value for name, value in clients.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
            | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])},
            log=logs / "ray.log",
            ports={"--dashboard-port": settings.dashboard_port, "--ray-port": settings.ray_port},
            probes=[
                Probe(f"{dashboard}/api/gcs_healthz"),
                Probe(f"{dashboard}/api/version", token=_read_if_there(folder / RAY_TOKEN)),
            ],
        ),
    ]


def environment(folder: Path, settings: Settings) -> dict[str, str]:
    """The variables by which clients find the stack. Keys are in files that these name, never in them."""
    return {
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{settings.mlflow_port}",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{settings.s3_port}",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / AWS_CREDENTIALS),
        "RAY_ADDRESS": f"{HOST}:{settings.ray_port}",
        "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{settings.dashboard_port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / RAY_TOKEN),
        # Says to Ray that its cluster is this machine: else it listens on all interfaces, whatever it is told.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def shell_lines(folder: Path) -> list[str]:
    """What a shell runs to use the stack."""
    variables = environment(folder, State.read(folder).settings)
    return [
        f"unset {' '.join(FOREIGN_VARIABLES)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]


def up(folder: Path, changes: Mapping[str, object], servers_of: ServersOf = real_servers) -> list[str]:
    """Start what does not run yet, wait until every server answers, and return the names of those started.

    Settings that are not among `changes` are those of the last time. Raises UserError if a setting is wrong or would
    change under a running server, a port is taken, or a server fails; what was started is ended again then.
    """
    with _locked(folder):
        state = State.read(folder)
        state = state.model_copy(update={"settings": _changed(state, changes)})
        state = state.model_copy(update={"short_folder": _prepared(folder, state)})
        state.write(folder)
        servers = servers_of(folder, state)
        missing = [server for server in servers if state.leader(server.name) is None]
        for server in missing:
            end(state.servers.get(server.name, ()))  # children may outlive a parent that was killed
        for server in missing:
            _check_ports(server)
        started: list[str] = []
        try:
            for server in missing:
                state = state.noting(folder, server.name, [_start(server, folder)])
                started.append(server.name)
            _wait(servers, state)
            for server in servers:
                state = state.noting(folder, server.name, _recorded(_living(state.servers[server.name])))
        except BaseException:
            for name in reversed(started):
                end(state.servers[name])
                state = state.noting(folder, name, ())
            raise
        (folder / ENVIRONMENT).write_text("\n".join(shell_lines(folder)) + "\n")
        return started


def down(folder: Path) -> list[str]:
    """End all that was started, the last first, and return the names of the servers that ran; data and logs stay.

    Raises UserError if a process does not end.
    """
    if not (folder / STATE).exists():
        return []
    with _locked(folder):
        state = State.read(folder)
        ended = []
        for name, processes in reversed(list(state.servers.items())):
            if end(processes):
                ended.append(name)
            state = state.noting(folder, name, ())
        if state.short_folder is not None:
            shutil.rmtree(state.short_folder, ignore_errors=True)
            state.model_copy(update={"short_folder": None}).write(folder)
        return ended


def status(folder: Path, servers_of: ServersOf = real_servers) -> list[Status]:
    """How each server is."""
    state = State.read(folder)
    found = []
    for server in servers_of(folder, state):
        leader = state.leader(server.name)
        word: Literal["up", "down", "no answer"] = "down"
        if leader is not None:
            word = "up" if _answers(server) else "no answer"
        found.append(Status(server.name, word, server.url, leader and leader.pid, server.log))
    return found


# --- processes ---


def end(processes: Iterable[Process], seconds: float = END_SECONDS) -> bool:
    """End a server's processes with all that share their session or descend from them; whether there were any.

    The leader is asked to, which ends the others in good order, then those that it left; after some seconds all are
    killed. Raises UserError if one lives on even so.
    """
    known = list(processes)
    asked: set[tuple[int, int]] = set()
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + seconds
        while living := _living(known):
            known = list({process.pid: process for process in [*known, *_recorded(living)]}.values())  # orphans too
            has_leader = living[0].pid == known[0].pid
            for process in living[:1] if has_leader and number == signal.SIGTERM else living:
                if (process.pid, number) not in asked:
                    asked.add((process.pid, number))
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(number)
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        else:
            return bool(asked)
    raise UserError(f"process {living[0].pid} does not end, not even killed: see what it waits for, and try again")


def _living(processes: Sequence[Process]) -> list[psutil.Process]:
    """Those of a server's processes that live, then what shares the session that the first began, and descendants."""
    found = {process.pid: alive for process in processes if (alive := process.find())}
    if any(_session(pid) == processes[0].pid for pid in found):  # else the session may be another's by now
        for process in psutil.process_iter():
            if _session(process.pid) == processes[0].pid:
                found.setdefault(process.pid, process)
    for process in list(found.values()):
        with suppress(psutil.NoSuchProcess):
            for child in process.children(recursive=True):
                found.setdefault(child.pid, child)
    return [process for process in found.values() if not _is_dead(process)]


def _boot() -> str:
    """The id of this start of the machine; "" where the system gives none."""
    return _read_if_there(Path("/proc/sys/kernel/random/boot_id")).strip()


def _began(pid: int) -> float:
    """When a process began. psutil's answer moves with the clock of the machine, which is set now and then."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return float(psutil.Process(pid).create_time())  # no /proc on this system, or no such process
    return int(fields[19])  # starttime in proc(5); the name in brackets before may hold anything


def _is_dead(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _session(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


def _recorded(processes: Iterable[psutil.Process]) -> list[Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found.append(Process.of(process.pid))
    return found


def _start(server: Server, folder: Path) -> Process:
    """A server in a session of its own, which no signal to this process's terminal reaches."""
    with server.log.open("ab") as log:
        log.write(f"--- started at {datetime.now().astimezone():%F %T %z} ---\n".encode())
        log.flush()
        process = subprocess.Popen(
            server.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=server.environment,
            start_new_session=True,
        )
    return Process.of(process.pid)


def _wait(servers: Iterable[Server], state: State) -> None:
    """Until all answer. Raises UserError with the end of its log if one ends or says nothing for too long."""
    deadline = time.monotonic() + START_SECONDS
    waiting = list(servers)
    while waiting:
        for server in waiting:
            if state.leader(server.name) is None:
                raise UserError(_failure(server, "ended right after its start"))
        if time.monotonic() > deadline:
            raise UserError(_failure(waiting[0], f"gave no answer within {START_SECONDS} s"))
        waiting = [server for server in waiting if not _answers(server)]
        time.sleep(0.2)


def _failure(server: Server, what: str) -> str:
    lines = server.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"{server.name} {what}; its log, {server.log}, ends so:", *lines])


def _answers(server: Server) -> bool:
    return all(map(_is_well, server.probes))


def _is_well(probe: Probe) -> bool:
    headers = {} if probe.token is None else {"Authorization": f"Bearer {probe.token}"}
    try:
        with _opener.open(urllib.request.Request(probe.url, headers=headers), timeout=ANSWER_SECONDS) as answer:
            return bool(answer.status == probe.status)
    except urllib.error.HTTPError as error:
        return error.code == probe.status
    except OSError:
        return False


# --- ports, files and settings ---


def _check_ports(server: Server) -> None:
    for option, port in server.ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was in use a minute ago is free
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise UserError(
                    f"{server.name} cannot have port {port} ({_listener(port) or error.strerror}): "
                    f"end what has it, or choose another port with {option}"
                ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _listener(port: int) -> str | None:
    """Who listens on a port, as far as this user may know."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid}, {psutil.Process(connection.pid).name()}, listens there"
    return None


def _changed(state: State, changes: Mapping[str, object]) -> Settings:
    try:
        settings = Settings.model_validate(state.settings.model_dump() | dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"--{str(name).replace('_', '-')}: " for name in first["loc"])
        raise UserError(f"{where}{first['msg'].removeprefix('Value error, ')}") from None
    running = [name for name in state.servers if state.leader(name)]
    if running and settings != state.settings:
        raise UserError(
            f"{', '.join(running)} already run with other settings ({state.settings}): "
            "leave the options away, or run 'medsynth stack down' first"
        )
    return settings


def _prepared(folder: Path, state: State) -> Path:
    """Make what the servers expect to be there; the short folder."""
    for name in ("logs", "artifacts", f"s3/{state.settings.bucket}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = f"aws_access_key_id = {secrets.token_hex(16)}\naws_secret_access_key = {secrets.token_hex(16)}\n"
    _write_secret(folder / AWS_CREDENTIALS, f"[default]\n{key}")
    _write_secret(folder / RAY_TOKEN, secrets.token_hex(32))
    if state.leader("ray") is None:
        shutil.rmtree(folder / "ray", ignore_errors=True)  # of the session before
    (folder / "ray").mkdir(exist_ok=True)
    if state.short_folder is not None and (state.short_folder / "ray").is_dir():
        return state.short_folder
    # Not where TMPDIR says, which may be long; /tmp is where Ray puts its sessions by itself.
    short_folder = Path(tempfile.mkdtemp(prefix="medsynth-", dir="/tmp"))
    (short_folder / "ray").symlink_to(folder / "ray")
    return short_folder


def _write_secret(path: Path, text: str) -> None:
    """Only if it is not there yet, and readable for nobody else at any time."""
    with suppress(FileExistsError), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _s3_key_id(folder: Path) -> str:
    credentials = configparser.ConfigParser()
    credentials.read(folder / AWS_CREDENTIALS)
    return credentials.get("default", "aws_access_key_id", fallback="")


def _read_if_there(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One command at a time works on a stack; the next waits."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot keep a stack in {folder}: {error.strerror}; choose another with --folder") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
