"""Files and objects by URI: s3://bucket/key, file:///path, or a plain path. The only importer of boto3.

Credentials, region and endpoint come from the standard AWS chain (AWS_ENDPOINT_URL included), in each process anew.
"""

import hashlib
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from random import random
from time import sleep
from typing import Any
from urllib.parse import urlsplit

import boto3
import pyarrow.fs
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError

from cluster import counters
from cluster.errors import UserError

logger = logging.getLogger(__name__)

TRANSFER_THREADS = 8
READ_PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
CONNECTIONS = 64  # kept: more threads than read at once, each of which would else open its own for one request
READ_TIMEOUT_SECONDS = 20  # without a byte


class StorageError(UserError):
    """A place that cannot be read or written."""


class NotFoundError(StorageError):
    """A place where nothing is."""


def is_outage(error: object) -> bool:
    """Whether an error is a storage's that did not answer, and may do so in a minute."""
    return isinstance(error, StorageError) and not isinstance(error, NotFoundError)


def is_remote(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` appended, one slash between each."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """The same place named so that a process in another working folder finds it."""
    return uri if is_remote(uri) else str(_path(uri).absolute())


def absolute_if_there(name: str) -> str:
    """A local file or folder that is there, by its absolute path; any other name, as a hub's or a package's, as is."""
    return str(_path(name).absolute()) if name and not is_remote(name) and _path(name).exists() else name


def read_bytes(uri: str, start: int = 0, length: int | None = None) -> bytes:
    """`length` bytes from `start`, or all that follow. Raises StorageError if fewer are there."""
    if length == 0:
        return b""
    with _explained("read", uri):
        if is_remote(uri):
            end = "" if length is None else start + length - 1
            ranged = {} if (start, length) == (0, None) else {"Range": f"bytes={start}-{end}"}
            data = _get(_location(uri) | ranged)
        else:
            with _path(uri).open("rb") as file:
                left = max(0, os.fstat(file.fileno()).st_size - start)  # room is made for all that is asked for
                file.seek(start)
                data = file.read(-1 if length is None else min(length, left))
    if length is not None and len(data) != length:
        raise StorageError(f"{uri} ends early: asked for {length} bytes at {start}, got {len(data)}")
    return data


def iter_chunks(uri: str, chunk_bytes: int = 2**23) -> Iterator[bytes]:
    """All that is at `uri`, never more of it in memory than a chunk; each is one read, tried again like any other."""
    total = size(uri)
    for start in range(0, total, chunk_bytes):
        yield read_bytes(uri, start, min(chunk_bytes, total - start))


def sha256(uri: str) -> str:
    """Of what is at `uri`."""
    digest = hashlib.sha256()
    for chunk in iter_chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


def _get(request: dict[str, Any]) -> bytes:
    """An object's bytes. boto3 asks again for what is refused, four times, but not for a body that breaks off or
    stands still; an epoch of many reads meets worse."""
    for pause_seconds in READ_PAUSES_SECONDS:
        try:
            return bytes(_s3().get_object(**request)["Body"].read())
        except (HTTPClientError, IncompleteReadError, FlexibleChecksumError, ClientError) as error:
            if isinstance(error, ClientError) and error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                raise
            counters.count("storage_read_retries")
            logger.warning("reading s3://%s/%s again: %s", request["Bucket"], request["Key"], error)
            sleep(pause_seconds * random())  # so that ranks refused together do not come back together
    return bytes(_s3().get_object(**request)["Body"].read())


def write_bytes(uri: str, data: bytes) -> None:
    """Write all or nothing: readers see the old content or the new, never a part."""
    with _explained("write", uri):
        if is_remote(uri):
            _s3().put_object(**_location(uri), Body=data)
            return
        with _replacing(_path(uri)) as temporary:
            temporary.write_bytes(data)


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to `uri`, all or nothing."""
    with _explained("write", uri):
        if is_remote(uri):
            location = _location(uri)
            _s3().upload_file(str(path), location["Bucket"], location["Key"])
            return
        with _replacing(_path(uri)) as temporary:
            shutil.copyfile(path, temporary)


def size(uri: str) -> int:
    """Bytes at `uri`. Raises NotFoundError if nothing is there."""
    with _explained("read", uri):
        if is_remote(uri):
            return int(_s3().head_object(**_location(uri))["ContentLength"])
        return _path(uri).stat().st_size


def exists(uri: str) -> bool:
    """Whether a file or object is at exactly `uri`."""
    if not is_remote(uri):
        with _explained("read", uri):  # such as a name that is too long
            return _path(uri).is_file()
    try:
        size(uri)
    except NotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    with _explained("delete", uri):
        if is_remote(uri):
            _s3().delete_object(**_location(uri))
        else:
            _path(uri).unlink()


def list_files(uri: str) -> list[str]:
    """Names of all files below `uri`, relative to it and sorted; empty if there are none."""
    return sorted(list_sizes(uri))


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below `uri`, by its name relative to it; empty if there are none."""
    if not is_remote(uri):
        folder, sizes = _path(uri), {}
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):  # what others were writing has its own name by now
                if path.is_file():
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        return sizes
    location = _location(join(uri, ""))
    with _explained("list", uri):
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=location["Bucket"], Prefix=location["Key"])
        found = [(content["Key"], content["Size"]) for page in pages for content in page.get("Contents", [])]
    named = ((key.removeprefix(location["Key"]), size) for key, size in found)
    # Some writers mark folders by empty objects whose names end in a slash.
    return {name: size for name, size in named if name and not name.endswith("/")}


def upload_folder(folder: Path, uri: str) -> None:
    """Copy every file below `folder` to the same name below `uri`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(lambda name: upload_file(folder / name, join(uri, name)), names))


def download_folder(uri: str, folder: Path, patterns: Sequence[str] = ("*",)) -> None:
    """Copy the files below `uri` whose names match a pattern (`*` matches slashes too) into `folder`.

    Raises NotFoundError if there is no file at all, matching or not.
    """
    found = list_files(uri)
    if not found:
        raise NotFoundError(f"nothing is at {uri}")
    names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    root = folder.resolve()

    def download(name: str) -> None:
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            raise StorageError(f"{uri} holds '{name}', which points outside its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(uri):
            location = _location(join(uri, name))
            with _explained("read", join(uri, name)):
                _s3().download_file(location["Bucket"], location["Key"], str(target))
        else:
            shutil.copyfile(_path(uri) / name, target)

    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(download, names))


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local folder with the content of `uri`: itself if it is local, else a copy for as long as the block lasts."""
    if not is_remote(uri):
        if not _path(uri).is_dir():
            raise NotFoundError(f"there is no folder {uri}")
        yield _path(uri)
        return
    with tempfile.TemporaryDirectory() as temporary:
        download_folder(uri, Path(temporary))
        yield Path(temporary)


def check_writable(uri: str) -> None:
    """Raise StorageError now if files below `uri` could not be written later."""
    probe = join(uri, ".writable")
    write_bytes(probe, b"")
    delete(probe)


def endpoint() -> str:
    """The URL of the S3 server that this environment names."""
    return str(_s3().meta.endpoint_url)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path in it, reaching the same endpoint as everything here."""
    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), absolute(uri)
    endpoint = urlsplit(_s3().meta.endpoint_url)
    location = _location(uri)
    filesystem = pyarrow.fs.S3FileSystem(
        region=_s3().meta.region_name,
        scheme=endpoint.scheme,
        endpoint_override=None if endpoint.netloc.endswith("amazonaws.com") else endpoint.netloc,
        force_virtual_addressing=False,
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),  # which boto3 reads by itself
    )
    return filesystem, f"{location['Bucket']}/{location['Key']}".rstrip("/")


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def _location(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@cache
def _client(process: int) -> Any:
    client = boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "max_attempts": 4},
            connect_timeout=5,
            read_timeout=READ_TIMEOUT_SECONDS,
            max_pool_connections=CONNECTIONS,
        ),
    )
    client.meta.events.register("after-call.s3", _count_retries)
    client.meta.events.register("after-call-error.s3", _count_retries)
    return client


def _count_retries(event_name: str, context: dict[str, Any], **_: Any) -> None:
    """botocore's hook at the end of a call. An answer tells how often it was tried again, an error's context alone."""
    reads = event_name.rpartition(".")[2].startswith(("Get", "Head", "List"))
    retries = context.get("retries", {}).get("attempt", 1) - 1
    counters.count("storage_read_retries" if reads else "storage_write_retries", retries)


def forget_clients() -> None:
    """Read credentials, region and endpoint anew at the next use."""
    _client.cache_clear()


def _s3() -> Any:
    """One client a process: clients are thread-safe, but do not survive a fork."""
    return _client(os.getpid())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end of the block, or vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_file(path.parent, f".{path.name}.")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def new_file(folder: Path, prefix: str) -> Path:
    """An empty file with a name of its own, which this process's umask keeps from whom it keeps all other files."""
    path = folder / f"{prefix}{secrets.token_hex(4)}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # tempfile's are 0600 for ever
    return path


@contextmanager
def _explained(verb: str, uri: str) -> Iterator[None]:
    """Turn what the operating system or boto3 raises into one line that names the place and the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"cannot {verb} {uri}: it is not there") from None
    except (ClientError, BotoCoreError, Boto3Error) as error:  # of which one is an OSError too
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        if code in ("404", "NoSuchKey", "NotFound"):
            raise NotFoundError(f"cannot {verb} {uri}: it is not there") from None
        reason = _REMEDIES.get(code, str(error).splitlines()[0])
        raise StorageError(f"cannot {verb} {uri}: {reason}") from None
    except OSError as error:
        raise StorageError(f"cannot {verb} {uri}: {error.strerror or error}") from None


_REMEDIES = {
    "SSLError": "its certificate is not to be trusted: set AWS_CA_BUNDLE to the file of the authority that signed it",
    "NoSuchBucket": "there is no such bucket; create it, or mend the name",
    "NoCredentialsError": "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "EndpointConnectionError": "no server answers; check AWS_ENDPOINT_URL and the network",
    "ConnectTimeoutError": "no server answers; check AWS_ENDPOINT_URL and the network",
    "AccessDenied": "the AWS credentials do not allow it",
    "403": "the AWS credentials do not allow it",
    "InvalidAccessKeyId": "the AWS access key is not known there",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off; set it, as by NTP",
    "SignatureDoesNotMatch": "the AWS secret key does not fit the access key",
}
