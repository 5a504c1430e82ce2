"""Real servers on random loopback ports, ended with all their children."""

import base64
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from threading import Thread

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

START_SECONDS = 180  # a busy machine takes a minute to import what they need


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(command: list[str], url: str, log: Path, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Run `command` in a process group of its own until the block ends; ready when `url` answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{url} does not answer: {log.read_text()}"
            time.sleep(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it ended by itself, which the block has said by then
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """moto's S3 protocol server; yields its endpoint."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with server(command, f"http://127.0.0.1:{port}/moto-api/", folder / "s3.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """A tracking server on SQLite that hands artifacts through; yields its URI."""
    port = port or free_port()
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *(
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            f"{folder}/artifacts",
        ),
    ]
    # Its job runners are eight more processes, for what no test asks of it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with server(command, f"http://127.0.0.1:{port}/health", folder / "mlflow.log", environment):
        yield f"http://127.0.0.1:{port}"


def certificates(folder: Path) -> tuple[Path, Path]:
    """The certificate of an authority of its own, and certificate and key that it signed for 127.0.0.1."""
    today = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("test authority", "server")]
    found = []
    for is_authority, key, name in zip((True, False), keys, names, strict=True):
        builder = (
            x509.CertificateBuilder(issuer_name=names[0], subject_name=name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - timedelta(days=1))
            .not_valid_after(today + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
            .add_extension(_usage(is_authority), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        )
        found.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(Encoding.PEM))
    secret = keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    authority, own = folder / "authority.pem", folder / "server.pem"
    authority.write_bytes(found[0])
    own.write_bytes(found[1] + secret)
    return authority, own


def _usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


@contextmanager
def behind_tls(url: str, folder: Path, login: str | None = None) -> Iterator[tuple[str, Path]]:
    """A reverse proxy before `url` that speaks TLS and asks for `login`, USER:PASSWORD, in this process.

    Yields its address, and the file of the authority that signed its certificate.
    """
    authority, own = certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    expected = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with suppress(OSError):  # a client that does not trust it hangs up
                super().handle_one_request()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if expected and self.path != "/health" and self.headers.get("Authorization") != expected:
                self.answer(401, b"", {"WWW-Authenticate": "Basic", "Content-Length": "0"})
                return
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
            own = ("Host", "Connection", "Expect", *(["Authorization"] if login else []))
            kept = {k: v for k, v in self.headers.items() if k not in own}
            connection.request(self.command, self.path, body, kept)
            found = connection.getresponse()
            dropped = ("transfer-encoding", "connection", "content-length")
            headers = {k: v for k, v in found.getheaders() if k.lower() not in dropped}
            content = found.read()
            length = found.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.answer(found.status, content, headers | {"Content-Length": length})
            connection.close()

        def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    # The handshake is the request's own thread's: one that fails is no error of the server.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", authority
    finally:
        server.shutdown()
        server.server_close()
