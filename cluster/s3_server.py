"""The stack's S3 server: moto's, whose objects are also on disk, for whoever has the stack's key.

    python -m cluster.s3_server FOLDER PORT      with the key's id in S3_KEY_ID

Moto alone keeps objects in memory. Other servers that pip installs were tried, and will not do: rclone answers a ranged
read with the checksum of the whole object, which boto3 refuses; nanio stores the framing of Arrow's uploads as part of
the object; localbucket refuses the folder markers that Arrow, and so Ray, writes. MinIO comes in containers only.
"""

import hashlib
import hmac
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cluster import storage

HOST = "127.0.0.1"
REGION = "us-east-1"
CREDENTIAL = re.compile(r"Credential=([^/]+)/")

WSGI = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class ObjectFolder:
    """Objects on disk: BUCKET/SHA-256-OF-KEY is a line of JSON, which has the key, and then the object's bytes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, bucket: str, key: str, etag: str, value: bytes) -> None:
        header = json.dumps({"key": key, "etag": etag.strip('"')}).encode()
        storage.write_bytes(str(self._path(bucket, key)), header + b"\n" + value)

    def delete(self, bucket: str, key: str) -> None:
        self._path(bucket, key).unlink(missing_ok=True)

    def create_bucket(self, bucket: str) -> None:
        (self._root / bucket).mkdir(parents=True, exist_ok=True)

    def delete_bucket(self, bucket: str) -> None:
        (self._root / bucket).rmdir()

    def buckets(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir() if path.is_dir())

    def objects(self, bucket: str) -> Iterable[tuple[str, str, bytes]]:
        """Key, ETag and bytes of each object."""
        for path in sorted((self._root / bucket).iterdir()):
            if not path.name.startswith("."):  # what was being written when the server was killed
                header, _, value = path.read_bytes().partition(b"\n")
                about = json.loads(header)
                yield about["key"], about["etag"], value

    def _path(self, bucket: str, key: str) -> Path:
        # Not by the key itself: `a` and `a/b` may both be objects, and names of files are shorter.
        return self._root / bucket / hashlib.sha256(key.encode()).hexdigest()


def keep_objects(folder: ObjectFolder) -> None:
    """From now on moto's objects are those of the folder, and what changes is on disk before it is answered."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import FakeBucket, FakeKey, S3Backend, s3_backends

    class KeptBackend(S3Backend):
        """Through these four pass uploads in one or in parts, copies, and deletions of one or of many."""

        def put_object(self, bucket_name: str, key_name: str, value: bytes, *rest: Any, **settings: Any) -> FakeKey:
            found = super().put_object(bucket_name, key_name, value, *rest, **settings)
            folder.put(bucket_name, key_name, found.etag, value)
            return found

        def delete_object(self, bucket_name: str, key_name: str, *rest: Any, **settings: Any) -> Any:
            answer = super().delete_object(bucket_name, key_name, *rest, **settings)
            folder.delete(bucket_name, key_name)
            return answer

        def create_bucket(self, bucket_name: str, *rest: Any, **settings: Any) -> FakeBucket:
            found = super().create_bucket(bucket_name, *rest, **settings)
            folder.create_bucket(bucket_name)
            return found

        def delete_bucket(self, bucket_name: str) -> FakeBucket | None:
            found = super().delete_bucket(bucket_name)
            if found is not None:
                folder.delete_bucket(bucket_name)
            return found

    plain = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for bucket in folder.buckets():
        plain.create_bucket(bucket, REGION)
        for key, etag, value in folder.objects(bucket):
            plain.put_object(bucket, key, value, etag=etag)
    plain.__class__ = KeptBackend


def only_for(key_id: str, app: WSGI) -> WSGI:
    """The same application for requests with this key's id, and 403 for all others.

    Moto checks no signature. The id is secret and long, so neither another user of the machine gets in here, nor a page
    in a browser.
    """

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        found = CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
        if found and hmac.compare_digest(found[1], key_id):
            return app(environ, start_response)
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code><Message>not the key of this stack</Message></Error>"]

    return guarded


def serve(folder: Path, port: int, key_id: str) -> None:
    """Answer until the process is ended."""
    try:
        from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'medsynth[stack]'") from None
    from werkzeug.serving import run_simple

    keep_objects(ObjectFolder(folder))
    app = only_for(key_id, create_backend_app("s3"))
    run_simple(HOST, port, app, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), os.environ["S3_KEY_ID"])
