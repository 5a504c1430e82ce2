"""Files and objects by URI: s3://bucket/key, file:///path, or a plain path. The only importer of boto3.

Credentials, region and endpoint come from the standard AWS chain (AWS_ENDPOINT_URL included), in each process anew.
"""

import hashlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from random import random
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from cluster import counters
from cluster.errors import UserError, first_line

# boto3 and pyarrow take a third of a second to import, and a mistyped path should not have to wait for them.
if TYPE_CHECKING:
    import pyarrow.fs
    from botocore.exceptions import ClientError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSFER_THREADS = 8
PAUSES_SECONDS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
CONNECTIONS = 64  # kept: more threads than read at once, each of which would else open its own for one request
READ_TIMEOUT_SECONDS = 20  # without a byte
TRIES = 4  # boto3's own
PROBE_SECONDS = 2  # for each of the two tries of a question that must not take long
THROTTLED = ("SlowDown", "TooManyRequests", "Throttling", "ThrottlingException", "RequestLimitExceeded", "429")
"""What services say that ask for patience, by whichever HTTP status."""
RENEWABLE = (
    *("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"),
    *("InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException"),
)
"""What services say to credentials that were right once: others may be there by now."""


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
    return uri if is_remote(uri) else str(local_path(uri).absolute())


def absolute_if_there(name: str) -> str:
    """A local file or folder that is there, by its absolute path; any other name, as a hub's or a package's, as is."""
    return str(local_path(name).absolute()) if name and not is_remote(name) and local_path(name).exists() else name


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
            with local_path(uri).open("rb") as file:
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
    """An object's bytes. boto3 asks for what is refused TRIES times, but not for a body that breaks off or
    stands still; an epoch of many reads meets worse."""
    return _asking(lambda client: bytes(client.get_object(**request)["Body"].read()), request, _is_passing)


def _asking(
    ask: Callable[[Any], T], request: Mapping[str, Any], is_passing: Callable[[Exception], bool] | None = None
) -> T:
    """What the client answers, asked again with pauses while `is_passing` says so of an error; without it, while the
    service asks for patience. Credentials that are refused are read anew, once."""
    is_renewed = False
    reads = is_passing is not None
    for pause_seconds in (*PAUSES_SECONDS, None):
        try:
            return ask(_s3())
        except _boto3_errors() as error:
            if _code(error) in RENEWABLE and not is_renewed:
                is_renewed = True
                forget_clients()
                pause_seconds = 0.0
            elif pause_seconds is None or not (is_passing or _is_throttled)(error):
                raise
            counters.count("storage_read_retries" if reads else "storage_write_retries")
            verb = "reading" if reads else "writing"
            logger.warning("%s s3://%s/%s again: %s", verb, request["Bucket"], request["Key"], error)
            sleep(pause_seconds * random())  # so that ranks refused together do not come back together
    return ask(_s3())  # where the last try was that with other credentials


def _client_error(error: BaseException) -> "ClientError | None":
    """What S3 answered; boto3's transfers hide it behind an error of their own."""
    from botocore.exceptions import ClientError

    for found in (error, error.__cause__, error.__context__):
        if isinstance(found, ClientError):
            return found
    return None


def _code(error: BaseException) -> str:
    """S3's word for an error; that of boto3 where S3 did not answer."""
    answered = _client_error(error)
    return str(answered.response["Error"]["Code"]) if answered else type(error).__name__


def _is_throttled(error: Exception) -> bool:
    answered = _client_error(error)
    status = answered.response.get("ResponseMetadata", {}).get("HTTPStatusCode") if answered else None
    return status == 429 or _code(error) in THROTTLED


def _is_passing(error: Exception) -> bool:
    """Whether a read that fails so may be answered in a moment."""
    from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError

    if isinstance(error, ClientError):
        return _is_throttled(error) or error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
    return isinstance(error, HTTPClientError | IncompleteReadError | FlexibleChecksumError)


def write_bytes(uri: str, data: bytes) -> None:
    """Write all or nothing: readers see the old content or the new, never a part."""
    with _explained("write", uri):
        if is_remote(uri):
            place = _location(uri)
            _asking(lambda client: client.put_object(**place, Body=data), place)
            return
        with _replacing(local_path(uri)) as temporary:
            temporary.write_bytes(data)


def create(uri: str, data: bytes) -> bool:
    """Write unless something is there already, and return whether it was written: of several writers only one wins.

    On S3 a writer that loses an answer may be told that it lost though it won: what it finds there is its own then.
    """
    with _explained("write", uri):
        if is_remote(uri):
            place = _location(uri)
            try:
                _asking(lambda client: client.put_object(**place, Body=data, IfNoneMatch="*"), place)
            except _boto3_errors() as error:
                answered = _client_error(error)
                if answered and answered.response["ResponseMetadata"]["HTTPStatusCode"] in (409, 412):
                    return False
                raise
            return True
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        with file:
            file.write(data)
        return True


def upload_file(path: Path, uri: str) -> None:
    """Copy a local file to `uri`, all or nothing."""
    with _explained("write", uri):
        if is_remote(uri):
            place = _location(uri)
            _asking(lambda client: client.upload_file(str(path), *place.values()), place)
            return
        with _replacing(local_path(uri)) as temporary:
            shutil.copyfile(path, temporary)


def size(uri: str) -> int:
    """Bytes at `uri`. Raises NotFoundError if nothing is there."""
    with _explained("read", uri):
        if is_remote(uri):
            place = _location(uri)
            return int(_asking(lambda client: _head(client, place), place, _is_passing)["ContentLength"])
        return local_path(uri).stat().st_size


def _head(client: Any, place: Mapping[str, str]) -> Mapping[str, Any]:
    """What S3 says of an object. An answer to HEAD has no body to say why it is refused, so that is asked once more."""
    from botocore.exceptions import ClientError

    try:
        return dict(client.head_object(**place))
    except ClientError as error:
        if error.response["Error"]["Code"] in ("400", "401", "403"):
            client.get_object(**place, Range="bytes=0-0")["Body"].close()
        raise


def exists(uri: str) -> bool:
    """Whether a file or object is at exactly `uri`."""
    if not is_remote(uri):
        with _explained("read", uri):  # such as a name that is too long
            return local_path(uri).is_file()
    try:
        size(uri)
    except NotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    with _explained("delete", uri):
        if is_remote(uri):
            place = _location(uri)
            _asking(lambda client: client.delete_object(**place), place)
        else:
            local_path(uri).unlink()


def list_files(uri: str) -> list[str]:
    """Names of all files below `uri`, relative to it and sorted; empty if there are none."""
    return sorted(list_sizes(uri))


def list_folder(uri: str) -> list[str]:
    """Names of the files directly in `uri` and, with a slash at their ends, of its folders; empty if there are none."""
    with _explained("list", uri):
        if not is_remote(uri):
            if not local_path(uri).is_dir():
                return []
            with os.scandir(local_path(uri)) as entries:
                return sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
        location = _location(join(uri, ""))
        found = _asking(lambda client: _keys_in(client, location), location, _is_passing)
    return sorted(name for key in found if (name := key.removeprefix(location["Key"])))


def _keys_in(client: Any, place: Mapping[str, str]) -> list[str]:
    """Of the objects directly below a prefix, and of the prefixes there."""
    found: list[str] = []
    pages = client.get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=place["Bucket"], Prefix=place["Key"], Delimiter="/"):
        found += [content["Key"] for content in page.get("Contents", [])]
        found += [folder["Prefix"] for folder in page.get("CommonPrefixes", [])]
    return found


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below `uri`, by its name relative to it; empty if there are none."""
    if not is_remote(uri):
        folder, sizes = local_path(uri), {}
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):  # what others were writing has its own name by now
                if path.is_file():
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        return sizes
    location = _location(join(uri, ""))
    with _explained("list", uri):
        found = _asking(lambda client: _list(client, location), location, _is_passing)
    named = ((key.removeprefix(location["Key"]), size) for key, size in found)
    # Some writers mark folders by empty objects whose names end in a slash.
    return {name: size for name, size in named if name and not name.endswith("/")}


def _list(client: Any, place: Mapping[str, str]) -> list[tuple[str, int]]:
    """Keys that begin with that of `place`, and bytes."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=place["Bucket"], Prefix=place["Key"])
    return [(content["Key"], content["Size"]) for page in pages for content in page.get("Contents", [])]


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
                _asking(lambda client: client.download_file(*location.values(), str(target)), location, _is_passing)
        else:
            shutil.copyfile(local_path(uri) / name, target)

    with ThreadPoolExecutor(TRANSFER_THREADS) as pool:
        list(pool.map(download, names))


@contextmanager
def local_folder(uri: str) -> Iterator[Path]:
    """A local folder with the content of `uri`: itself if it is local, else a copy for as long as the block lasts."""
    if not is_remote(uri):
        if not local_path(uri).is_dir():
            raise NotFoundError(f"there is no folder {uri}")
        yield local_path(uri)
        return
    with tempfile.TemporaryDirectory() as temporary:
        download_folder(uri, Path(temporary))
        yield Path(temporary)


def check_writable(uri: str) -> None:
    """Raise StorageError now, within ten seconds, if files below `uri` could not be written later."""
    probe = join(uri, ".writable")
    if is_remote(uri):
        with _explained("write", probe):
            client = _client(os.getpid(), is_probe=True)
            client.put_object(**_location(probe), Body=b"")
            client.delete_object(**_location(probe))
        return
    write_bytes(probe, b"")
    delete(probe)


def check_answers(uri: str) -> None:
    """Raise StorageError now, within ten seconds, if the service of `uri` does not answer or does not know the
    credentials.

    Whether anything is there, or may be listed, is not asked: what cannot be listed may still be readable.
    """
    if not is_remote(uri):
        return
    with _explained("read", uri):
        place = _location(uri)
        try:
            _client(os.getpid(), is_probe=True).list_objects_v2(Bucket=place["Bucket"], Prefix=place["Key"], MaxKeys=1)
        except _boto3_errors() as error:
            if _code(error) != "AccessDenied":
                raise


def endpoint() -> str:
    """The URL of the S3 server that this environment names."""
    with _explained("reach", "s3://"):
        return str(_s3().meta.endpoint_url)


def arrow_filesystem(uri: str) -> "tuple[pyarrow.fs.FileSystem, str]":
    """The pyarrow filesystem of `uri` and the path in it, reaching the same endpoint as everything here."""
    import pyarrow.fs

    if not is_remote(uri):
        return pyarrow.fs.LocalFileSystem(), absolute(uri)
    server = urlsplit(endpoint())
    location = _location(uri)
    filesystem = pyarrow.fs.S3FileSystem(
        region=_s3().meta.region_name,
        scheme=server.scheme,
        endpoint_override=None if server.netloc.endswith("amazonaws.com") else server.netloc,
        force_virtual_addressing=False,
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),  # which boto3 reads by itself
    )
    return filesystem, f"{location['Bucket']}/{location['Key']}".rstrip("/")


def local_path(uri: str) -> Path:
    """A path as it is; that of a file:// URI, where some characters are percent-encoded."""
    if not uri.startswith("file://"):
        return Path(uri)
    return Path(unquote(uri.removeprefix("file://").removeprefix("localhost")))


def _location(uri: str) -> dict[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@cache
def _client(process: int, is_probe: bool = False) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 2 if is_probe else TRIES},
        connect_timeout=PROBE_SECONDS if is_probe else 5,
        read_timeout=PROBE_SECONDS if is_probe else READ_TIMEOUT_SECONDS,
        max_pool_connections=CONNECTIONS,
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except ValueError as error:  # of an endpoint that is no URL
        raise StorageError(f"{error}: set AWS_ENDPOINT_URL to http://HOST:PORT or https://HOST") from None
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


def _boto3_errors() -> tuple[type[Exception], ...]:
    """All that boto3 raises; none before it has been imported."""
    if "boto3" not in sys.modules:
        return ()
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError

    return ClientError, BotoCoreError, Boto3Error, IncompleteReadError


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
    except _boto3_errors() as error:  # of which one is an OSError too
        code = _code(error)
        if code in ("404", "NoSuchKey", "NotFound"):
            raise NotFoundError(f"cannot {verb} {uri}: it is not there") from None
        reason = _REMEDIES.get(code, first_line(error))
        raise StorageError(f"cannot {verb} {uri}: {reason}") from None
    except OSError as error:
        raise StorageError(f"cannot {verb} {uri}: {error.strerror or error}") from None


_REMEDIES = {
    "SSOTokenLoadError": "there is no AWS login; run 'aws sso login'",
    "UnauthorizedSSOTokenError": "the AWS login has expired; run 'aws sso login'",
    "SSLError": "its certificate is not to be trusted: set AWS_CA_BUNDLE to the file of the authority that signed it",
    "NoSuchBucket": "there is no such bucket; create it, or mend the name",
    "NoCredentialsError": "no AWS credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "EndpointConnectionError": "no server answers; check AWS_ENDPOINT_URL and the network",
    "ConnectTimeoutError": "no server answers; check AWS_ENDPOINT_URL and the network",
    "AccessDenied": "the AWS credentials do not allow it",
    "403": "the AWS credentials do not allow it",
    "401": "the AWS credentials do not allow it",
    "InvalidAccessKeyId": "the AWS access key is not known there; set AWS_ACCESS_KEY_ID to one of this service's",
    "SignatureDoesNotMatch": "the AWS secret key does not fit the access key; set AWS_SECRET_ACCESS_KEY to its own",
    "RequestTimeTooSkewed": "this machine's clock is more than 15 minutes off; set it, as by NTP",
    "InvalidToken": "the AWS session token is not known there; unset AWS_SESSION_TOKEN, or set that of the access key",
    "PartialCredentialsError": "the AWS credentials are incomplete; set both AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "AWS_PROFILE names no profile of the AWS configuration; unset it, or name one that is there",
    "NoRegionError": "no AWS region is set; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another AWS region; set AWS_DEFAULT_REGION to its own",
    "PermanentRedirect": "the bucket is in another AWS region; set AWS_DEFAULT_REGION to its own",
    "XMinioStorageFull": "the storage is full; make room there",
    "QuotaExceeded": "the storage's quota is used up; make room there, or have it raised",
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "TokenRetrievalError"),
        "the AWS credentials have expired; log in again, as by 'aws sso login', or set fresh ones, and try again",
    ),
    **dict.fromkeys(
        THROTTLED, "the service asks for patience, also after many tries; try again later, or lower the load"
    ),
}
