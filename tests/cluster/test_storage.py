"""Storage: one behaviour for local folders and a real S3 protocol server; faults in words a stranger understands."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from cluster import counters, storage
from cluster.storage import NotFoundError, StorageError
from tests.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.servers import free_port


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('bucket')}/place"


def test_bytes_come_back_whole_and_in_ranges(place: str) -> None:
    uri = storage.join(place, "a", "b.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3) == b"3456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 3, 0) == b""
    assert storage.size(uri) == 10
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_files_are_for_whom_the_umask_leaves_them(umask: int, tmp_path: Path) -> None:
    """A private image stays private, and what a group shares stays shared: shards, what is copied, and a cache."""
    before = os.umask(umask)
    try:
        storage.write_bytes(str(tmp_path / "written"), b"new")
        storage.write_bytes(str(tmp_path / "written"), b"again")
        storage.upload_file(tmp_path / "written", str(tmp_path / "copied" / "file"))
        storage.download_folder(str(tmp_path / "copied"), tmp_path / "fetched")
        block = storage.new_file(tmp_path, "half-")
    finally:
        os.umask(before)
    for path in (tmp_path / "written", tmp_path / "copied" / "file", tmp_path / "fetched" / "file", block):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert not list(tmp_path.glob(".written*"))


def test_a_short_read_is_an_error(place: str) -> None:
    uri = storage.join(place, "short")
    storage.write_bytes(uri, b"0123")
    with pytest.raises(StorageError, match="ends early: asked for 8 bytes at 2, got 2"):
        storage.read_bytes(uri, 2, 8)


def test_existence_and_deletion(place: str) -> None:
    uri = storage.join(place, "x")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"")
    assert storage.exists(uri)
    assert not storage.exists(place), "a folder is no file"
    storage.delete(uri)
    assert not storage.exists(uri)
    for act in (storage.read_bytes, storage.size):
        with pytest.raises(NotFoundError, match=f"cannot read {uri}: it is not there"):
            act(uri)


def test_folders_travel_both_ways(place: str, tmp_path: Path) -> None:
    names = ["a.txt", "deep/c.txt", "deep/er/b.txt"]
    for name in names:
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    storage.upload_folder(tmp_path / "from", place)
    assert storage.list_files(place) == names
    assert storage.list_files(storage.join(place, "deep")) == ["c.txt", "er/b.txt"]
    storage.download_folder(place, tmp_path / "to")
    assert [(tmp_path / "to" / name).read_text() for name in names] == names
    with storage.local_folder(place) as folder:
        assert (folder / "deep/c.txt").read_text() == "deep/c.txt"
    with pytest.raises(NotFoundError), storage.local_folder(storage.join(place, "nowhere")):
        pass


def test_more_objects_than_a_page_are_listed(bucket: str) -> None:
    """S3 lists at most a thousand names in one answer."""
    client = boto3.client("s3")
    for number in range(1005):
        client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"many/{number:04d}", Body=b"")
    assert storage.list_files(f"{bucket}/many") == [f"{number:04d}" for number in range(1005)]


def test_objects_that_mark_folders_are_no_files(bucket: str) -> None:
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="place/folder/", Body=b"")
    storage.write_bytes(f"{bucket}/place/folder/x", b"x")
    assert storage.list_files(f"{bucket}/place") == ["folder/x"]


def test_a_name_that_points_outside_is_not_downloaded(bucket: str, tmp_path: Path) -> None:
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="place/../../evil", Body=b"x")
    with pytest.raises(StorageError, match="outside its folder"):
        storage.download_folder(f"{bucket}/place", tmp_path / "to" / "here")
    assert not (tmp_path / "evil").exists()


def test_a_broken_off_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def fail(self: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(StorageError, match=rf"cannot write {uri}: No space left on device"):
            storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_arrow_reaches_the_same_place(place: str) -> None:
    """Ray writes checkpoints through pyarrow; they must land where everything else reads."""
    storage.write_bytes(storage.join(place, "by-us"), b"ours")
    filesystem, path = storage.arrow_filesystem(place)
    with filesystem.open_input_stream(f"{path}/by-us") as stream:
        assert stream.read() == b"ours"
    with filesystem.open_output_stream(f"{path}/by-arrow") as stream:
        stream.write(b"theirs")
    assert storage.read_bytes(storage.join(place, "by-arrow")) == b"theirs"


@pytest.mark.parametrize(
    ("uri", "joined"),
    [("s3://b", "s3://b/x/y"), ("s3://b/p/", "s3://b/p/x/y"), ("folder", "folder/x/y"), ("/", "/x/y")],
)
def test_join(uri: str, joined: str) -> None:
    assert storage.join(uri, "x", "/y/") == joined


def test_absolute_names_the_same_place(tmp_path: Path) -> None:
    assert storage.absolute("runs/a") == str(tmp_path / "runs/a")
    assert storage.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert storage.absolute("s3://bucket/a") == "s3://bucket/a"


# --- a stranger's mistakes ---


def test_no_such_bucket(s3: str) -> None:
    with pytest.raises(StorageError, match="there is no such bucket"):
        storage.write_bytes("s3://no-such-bucket-here/x", b"")


def test_no_server(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    storage.forget_clients()
    with pytest.raises(StorageError, match="no server answers; check AWS_ENDPOINT_URL"):
        storage.read_bytes("s3://bucket/x")


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.forget_clients()
    with pytest.raises(StorageError, match="no AWS credentials found; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://bucket/x")


def test_check_writable_says_so_before_the_work(place: str, tmp_path: Path) -> None:
    storage.check_writable(place)
    assert storage.list_files(place) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="File exists"):
        storage.check_writable(str(tmp_path / "file"))


# --- requests that are sent again ---


@pytest.fixture
def proxy(bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between the storage and S3, which has the bucket."""
    with fault_proxy(s3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        storage.forget_clients()
        yield proxy


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET])
def test_requests_that_are_sent_again_are_counted(fault: Fault, proxy: FaultProxy, bucket: str) -> None:
    """Those that boto3 sends again by itself: the first read and the first write fail."""
    left = {"GET", "PUT"}

    def fail_first(method: str, path: str) -> Fault | None:
        is_first = method in left
        left.discard(method)
        return fault if is_first else None

    proxy.decide = fail_first
    before = counters.counted()
    storage.write_bytes(f"{bucket}/x", b"0123")
    assert storage.read_bytes(f"{bucket}/x") == b"0123"
    assert storage.size(f"{bucket}/x") == 4
    assert counters.counted() - before == {"storage_read_retries": 1, "storage_write_retries": 1}


def test_a_read_that_breaks_off_is_counted_as_well(proxy: FaultProxy, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", bytes(100_000))
    proxy.decide = lambda method, path: None if proxy.faults else Fault.TRUNCATED
    before = counters.counted()
    assert storage.read_bytes(f"{bucket}/x") == bytes(100_000)
    assert counters.counted() - before == {"storage_read_retries": 1}


def test_retries_of_what_fails_in_the_end_count_too(proxy: FaultProxy, bucket: str) -> None:
    proxy.decide = lambda method, path: Fault.RESET
    before = counters.counted()
    with pytest.raises(StorageError):
        storage.write_bytes(f"{bucket}/x", b"0123")
    assert counters.counted() - before == {"storage_write_retries": proxy.faults[Fault.RESET] - 1}
    assert proxy.faults[Fault.RESET] > 1


def test_a_read_outlives_a_service_that_refuses_longer_than_boto3_asks(proxy: FaultProxy, bucket: str) -> None:
    storage.write_bytes(f"{bucket}/x", b"0123")
    proxy.decide = lambda method, path: Fault.ERROR if proxy.faults[Fault.ERROR] < 6 else None
    assert storage.read_bytes(f"{bucket}/x") == b"0123"
    assert proxy.faults[Fault.ERROR] == 6


def test_a_service_that_asks_for_patience_by_429_is_given_it(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES_SECONDS", (0.01,) * 6)
    monkeypatch.setattr(storage, "TRIES", 1)  # boto3 pauses for seconds between its own
    storage.forget_clients()
    storage.write_bytes(f"{bucket}/x", b"0123")
    for act in (
        lambda: storage.write_bytes(f"{bucket}/x", b"0123"),
        lambda: storage.read_bytes(f"{bucket}/x"),
        lambda: storage.size(f"{bucket}/x"),
        lambda: storage.list_files(bucket),
    ):
        proxy.faults.clear()
        proxy.decide = lambda method, path: Fault.TOO_MANY if proxy.faults[Fault.TOO_MANY] < 6 else None
        act()
        assert proxy.faults[Fault.TOO_MANY] == 6
    proxy.decide = lambda method, path: Fault.TOO_MANY
    with pytest.raises(StorageError, match="the service asks for patience, also after many tries; try again later"):
        storage.write_bytes(f"{bucket}/x", b"")


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [
        (Fault.EXPIRED, "the AWS credentials have expired; log in again, as by 'aws sso login', or set fresh ones"),
        (Fault.UNKNOWN_KEY, "the AWS access key is not known there; set AWS_ACCESS_KEY_ID"),
        (Fault.WRONG_SECRET, "the AWS secret key does not fit the access key; set AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_credentials_that_were_changed_meanwhile_are_read_anew(
    fault: Fault, remedy: str, proxy: FaultProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def set_key(name: str) -> None:
        (tmp_path / "credentials").write_text(f"[default]\naws_access_key_id={name}\naws_secret_access_key=s\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    set_key("first")
    storage.forget_clients()
    storage.write_bytes(f"{bucket}/x", b"0123")
    valid = "first"
    proxy.decide = lambda method, path: None if f"Credential={valid}/" in proxy.authorization else fault
    acts: tuple[Callable[[str], object], ...] = (storage.read_bytes, storage.size, storage.list_files)
    for number, act in enumerate(acts):
        valid = f"key-{number}"
        with pytest.raises(StorageError, match=remedy):  # nobody has set the new key yet
            act(f"{bucket}/x")
        assert proxy.faults[fault] <= 6, "wrong credentials are no reason to ask again and again"
        set_key(valid)
        act(f"{bucket}/x")
        proxy.faults.clear()
    valid = "last"
    set_key(valid)
    storage.write_bytes(f"{bucket}/x", b"new")
    assert storage.read_bytes(f"{bucket}/x") == b"new"


@pytest.mark.parametrize("fault", [Fault.STALLED, Fault.TOO_MANY])
def test_a_refusal_comes_within_ten_seconds(fault: Fault, proxy: FaultProxy, bucket: str) -> None:
    proxy.decide = lambda method, path: fault
    for check in (storage.check_writable, storage.check_answers):
        began = time.monotonic()
        with pytest.raises(StorageError):
            check(f"{bucket}/x")
        assert time.monotonic() - began < 10


def test_an_endpoint_that_is_no_url_is_explained(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    storage.forget_clients()
    for act in (storage.read_bytes, storage.check_writable, storage.arrow_filesystem):
        with pytest.raises(StorageError, match="Invalid endpoint: localhost:9000: set AWS_ENDPOINT_URL to http://"):
            act("s3://bucket/x")


def test_a_file_uri_is_percent_encoded(tmp_path: Path) -> None:
    (tmp_path / "a b#%20?ü").write_bytes(b"x")
    assert storage.read_bytes((tmp_path / "a b#%20?ü").as_uri()) == b"x"
    assert storage.read_bytes(str(tmp_path / "a b#%20?ü")) == b"x"
    assert storage.absolute("file://localhost/a%20b") == "/a b"


def test_a_read_that_stands_still_is_asked_for_again(
    proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 0.5)
    storage.forget_clients()
    storage.write_bytes(f"{bucket}/x", bytes(100_000))
    proxy.decide = lambda method, path: None if proxy.faults else Fault.HALTED
    assert storage.read_bytes(f"{bucket}/x") == bytes(100_000)


def test_of_two_that_create_only_the_first_does(place: str) -> None:
    uri = storage.join(place, "lease", "1")
    assert storage.create(uri, b"first")
    assert not storage.create(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
