"""Whether shards still are what the manifest says of them."""

from typing import NamedTuple

from cluster import storage
from data_shards.manifest import ShardEntry


class Claim(NamedTuple):
    """What the manifest of the shards at `shards_uri` says of one of them."""

    shards_uri: str
    shard: ShardEntry


def find_fault(claim: Claim) -> str | None:
    """What is wrong with a shard or its index; digests are computed a chunk at a time."""
    shards_uri, shard = claim
    name = shard.name
    try:
        if (found := storage.size(storage.join(shards_uri, name))) != shard.num_bytes:
            return f"{name}: {found} bytes, the manifest says {shard.num_bytes}"
        for name, expected in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)):
            if (digest := storage.sha256(storage.join(shards_uri, name))) != expected:
                return f"{name}: SHA-256 {digest}, the manifest says {expected}"
    except storage.NotFoundError:
        return f"{name}: missing"
    return None
