"""Whether anybody listens, before a client that would ask for minutes."""

import socket
from urllib.parse import urlsplit


def knock(url: str, seconds: float) -> None:
    """Raise OSError if nobody listens where an http:// or https:// URL leads, ValueError if its port is none."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), seconds).close()
