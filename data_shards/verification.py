"""Whether shards still are what the manifest says of them."""

from typing import NamedTuple

from cluster import storage


class Claim(NamedTuple):
    """What the manifest says of one file."""

    uri: str
    num_bytes: int
    sha256: str


def find_fault(claim: Claim) -> str | None:
    """What is wrong with a file; its digest is computed a chunk at a time."""
    name = claim.uri.rpartition("/")[2]
    try:
        if (found := storage.size(claim.uri)) != claim.num_bytes:
            return f"{name}: {found} bytes, the manifest says {claim.num_bytes}"
        digest = storage.sha256(claim.uri)
    except storage.NotFoundError:
        return f"{name}: missing"
    return None if digest == claim.sha256 else f"{name}: SHA-256 {digest}, the manifest says {claim.sha256}"
