"""A proxy before an HTTP server that fails as it is told: what a network and a storage service do on a bad day."""

import asyncio
import base64
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto

from aiohttp import ClientSession, DummyCookieJar, web
from yarl import URL

HOP_BY_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding")


class Fault(Enum):
    """What happens to a request instead of an answer."""

    ERROR = auto()  # 500, as S3's InternalError
    SLOW_DOWN = auto()  # 503, as S3 asks for patience
    TOO_MANY = auto()  # 429, with a header that asks for two minutes of patience
    EXPIRED = auto()  # as S3 refuses a login that has run out
    UNKNOWN_KEY = auto()  # as S3 refuses an access key
    WRONG_SECRET = auto()  # as S3 refuses a signature
    LATE = auto()  # answered rightly, after `late_seconds`
    RESET = auto()  # the connection is cut
    TRUNCATED = auto()  # half of the body, then the connection is cut
    HALTED = auto()  # half of the body, and then nothing until `release`
    STALLED = auto()  # what was sent is taken, and nothing is answered until `release`, then the request is done


ERRORS: dict[Fault, tuple[int, str, dict[str, str]]] = {
    Fault.ERROR: (500, "InternalError", {}),
    Fault.SLOW_DOWN: (503, "SlowDown", {}),
    Fault.EXPIRED: (400, "ExpiredToken", {}),
    Fault.UNKNOWN_KEY: (403, "InvalidAccessKeyId", {}),
    Fault.WRONG_SECRET: (403, "SignatureDoesNotMatch", {}),
    Fault.TOO_MANY: (429, "TooManyRequests", {"Retry-After": "120"}),
}
"""Status, S3's code, and headers of what is answered."""


class FaultProxy:
    """Hands every request through, but for those that `decide` has a fault for."""

    def __init__(self, target: str, *, tls: ssl.SSLContext | None = None, login: str | None = None) -> None:
        self.decide: Callable[[str, str], Fault | None] = lambda method, path: None
        """(method, path with query) -> what is to fail. Called by another thread."""
        self.faults: Counter[Fault] = Counter()
        self.stalled = threading.Event()
        """Set when a request stands still."""
        self.late_seconds = 4.0
        self.authorization = ""
        """The header of the request that `decide` is asked about."""
        self.address = ""
        self._target = target
        self._tls = tls
        self._authorization = f"Basic {base64.b64encode(login.encode()).decode()}" if login else None
        self._released = threading.Event()

    def release(self) -> None:
        """Let the requests that stand still go on."""
        self._released.set()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.authorization = request.headers.get("Authorization", "")
        fault = self.decide(request.method, request.path_qs)
        body = await request.read()
        is_asked = self._authorization is not None and request.path != "/health"
        if is_asked and request.headers.get("Authorization") != self._authorization:
            return web.Response(status=401, headers={"WWW-Authenticate": "Basic"})
        if fault is not None:
            self.faults[fault] += 1
        if fault in ERRORS:
            status, code, headers = ERRORS[fault]
            return web.Response(
                status=status,
                headers=headers,
                content_type="application/xml",
                text=f"<Error><Code>{code}</Code><Message>told to</Message></Error>",
            )
        if fault is Fault.RESET:
            _cut(request)
            return web.Response()
        if fault is Fault.LATE:
            await asyncio.sleep(self.late_seconds)
        if fault is Fault.STALLED:
            self.stalled.set()
            while not self._released.is_set():
                await asyncio.sleep(0.05)
        own = (*HOP_BY_HOP, "Authorization") if self._authorization else HOP_BY_HOP
        headers = {name: value for name, value in request.headers.items() if name not in own}
        async with self._session.request(
            request.method,
            URL(self._target + request.raw_path, encoded=True),
            data=body,
            headers=headers,
            allow_redirects=False,
        ) as answer:
            content = await answer.read()
            kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            if request.method != "HEAD":
                response.content_length = len(content)
            with suppress(ConnectionResetError):  # whoever asked is gone, as one that was killed meanwhile
                await response.prepare(request)
                if fault in (Fault.TRUNCATED, Fault.HALTED):
                    await response.write(content[: len(content) // 2])
                    while fault is Fault.HALTED and not self._released.is_set():
                        await asyncio.sleep(0.05)
                    _cut(request)
                elif request.method != "HEAD":
                    await response.write(content)
            return response

    async def _serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        # An object's bytes are to arrive as they are stored.
        async with ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar()) as self._session:
            application = web.Application(client_max_size=2**30)
            application.router.add_route("*", "/{path:.*}", self._handle)
            runner = web.AppRunner(application, shutdown_timeout=0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=self._tls)
            await site.start()
            host, port = runner.addresses[0][:2]
            self.address = f"{'https' if self._tls else 'http'}://{host}:{port}"
            ready.set()
            await stop.wait()
            await runner.cleanup()


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


@contextmanager
def fault_proxy(target: str, *, tls: ssl.SSLContext | None = None, login: str | None = None) -> Iterator[FaultProxy]:
    """A proxy on a free loopback port, in a thread of this process.

    It may speak TLS, and ask for a login, USER:PASSWORD, for all but /health.
    """
    proxy, ready = FaultProxy(target, tls=tls, login=login), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(proxy._serve(ready, stop),), daemon=True)
    thread.start()
    try:
        assert ready.wait(10)
        yield proxy
    finally:
        proxy.release()
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
