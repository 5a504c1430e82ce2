"""One owner of a folder at a time, such as a run's: a lease in it, on local disks, NFS and S3 alike.

FOLDER/lease/000001.json    who owned it first
FOLDER/lease/000002.json    who took over from that; the highest number counts

A lease is taken by creating the file of the next number, which only one of several processes can (O_EXCL on disks,
If-None-Match on S3), and held by writing that file again every BEAT_SECONDS with a higher beat. Clocks of two machines
are never compared: a lease is stale when the process that waits has seen it unchanged for STALE_SECONDS of its own
monotonic clock, or when its owner was a process of this very machine that has ended.
"""

import getpass
import json
import logging
import os
import platform
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from cluster import storage
from cluster.documents import parsing
from cluster.errors import UserError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
POLL_SECONDS = 0.5
NAME = re.compile(r"(\d{6})\.json")
COMMAND_LENGTH = 200

OnWaiting = Callable[[float, float], None]
"""Is told now and then how many seconds the owner gives no sign of life, and after how many its lease is taken over."""


class HeldError(UserError):
    """The folder has another owner, which is alive."""


class LostError(UserError):
    """Another process has taken over: this one may not write any more."""


@dataclass(frozen=True)
class Owner:
    """What a lease says."""

    host: str
    pid: int
    user: str
    command: str
    since: str  # in UTC, for people to read: nothing is computed from it
    machine: str  # see _machine; "" where the system does not say
    start_ticks: int  # of the process, since its machine was started
    token: str  # random
    beat: int = 0
    is_released: bool = False

    @classmethod
    def this_process(cls) -> "Owner":
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            user=_user(),
            command=command if len(command) <= COMMAND_LENGTH else f"{command[:COMMAND_LENGTH]}…",
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            machine=_machine(),
            start_ticks=_start_ticks(os.getpid()) or 0,
            token=uuid4().hex,
        )

    @classmethod
    def parse(cls, content: bytes) -> "Owner | None":
        """None for what is no lease, such as one that is being written."""
        try:
            with parsing("lease"):
                document = json.loads(content)
                kinds = {name: field.type for name, field in cls.__dataclass_fields__.items()}
                if {name: type(value) for name, value in document.items()} != kinds:
                    return None
                return cls(**document)
        except UserError:
            return None

    def has_ended(self) -> bool:
        """Whether it was a process of this machine that is gone; False where that cannot be known."""
        return bool(self.machine) and self.machine == _machine() and _start_ticks(self.pid) != self.start_ticks

    def __str__(self) -> str:
        return f"{self.user}@{self.host} (process {self.pid}, {self.command}) since {self.since}"


class Lease:
    """One that this process holds: a thread gives the signs of life."""

    def __init__(self, folder: str, number: int, owner: Owner) -> None:
        self._folder, self._number, self._owner = folder, number, owner
        self._successor: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._give_signs, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raises LostError if another process has taken over, as from one that was suspended."""
        if self._successor is not None:
            raise LostError(
                f"{self._folder} was taken over by {self._successor}, as this process gave no sign of life for "
                f"{STALE_SECONDS:g} seconds: it ends here and writes nothing more"
            )

    def release(self) -> None:
        """Let the next process take over at once."""
        self._done.set()
        self._thread.join(timeout=2 * BEAT_SECONDS)  # in an outage its storage answers late, or not at all
        if self._successor is None and not self._thread.is_alive():
            with suppress(storage.StorageError):  # the next one waits until it is stale
                self._write(replace(self._owner, is_released=True))

    def _give_signs(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with suppress(storage.StorageError):  # while nobody can read it, nobody can take over
                number, content = _newest(self._folder)
                if number > self._number:
                    self._successor = str(Owner.parse(content) or "another process")
                    return
                self._owner = replace(self._owner, beat=self._owner.beat + 1)
                self._write(self._owner)

    def _write(self, owner: Owner) -> None:
        storage.write_bytes(_path(self._folder, self._number), _encode(owner))


@contextmanager
def held(folder: str, on_waiting: OnWaiting = lambda silent, limit: None) -> Iterator[Lease]:
    """Own `folder` inside the block. Raises HeldError, having changed nothing, if another process does."""
    lease = _acquire(folder, on_waiting)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(folder: str, on_waiting: OnWaiting) -> Lease:
    watched: tuple[int, bytes] | None = None
    began, told = time.monotonic(), 0.0
    while True:
        asked = time.monotonic()
        found = number, content = _newest(folder)
        if time.monotonic() - asked > STALE_SECONDS / 2:
            began = time.monotonic()  # an outage of the storage hid the signs of life
        owner = Owner.parse(content)
        silent = time.monotonic() - began
        is_free = not number or (owner is not None and (owner.is_released or owner.has_ended()))
        if is_free or (found == watched and silent >= STALE_SECONDS):
            if lease := _take(folder, number + 1):
                return lease
        elif found != watched:
            if watched is not None and owner is not None:
                raise HeldError(f"{folder} is in use by {owner}: wait until it ends, stop it, or choose another name")
            watched, began, told = found, time.monotonic(), 0.0
        elif silent >= told + 2 * BEAT_SECONDS:
            told = silent
            on_waiting(silent, STALE_SECONDS)
        time.sleep(POLL_SECONDS)


def _take(folder: str, number: int) -> Lease | None:
    owner, path = Owner.this_process(), _path(folder, number)
    with suppress(storage.NotFoundError):  # after a conflict of two writers neither may have won
        if storage.create(path, _encode(owner)) or Owner.parse(storage.read_bytes(path)) == owner:
            return Lease(folder, number, owner)
    return None


def _newest(folder: str) -> tuple[int, bytes]:
    """The number and the content of the lease that counts; 0 if there is none."""
    place = storage.join(folder, "lease")
    number = max((int(match[1]) for name in storage.list_files(place) if (match := NAME.fullmatch(name))), default=0)
    return number, storage.read_bytes(_path(folder, number)) if number else b""


def _path(folder: str, number: int) -> str:
    return storage.join(folder, "lease", f"{number:06d}.json")


def _encode(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return str(os.getuid())


def _machine() -> str:
    """What tells this machine, as long as it runs, and this container from all others: their pids are other ones."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start_ticks(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None if there is none that lives.

    A number that a step of the clock does not change (proc(5), /proc/PID/stat, field 22).
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # a process may have spaces and brackets in its name
    return None if state in "ZX" else int(fields[18])
