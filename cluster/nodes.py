"""What a cluster's machines have; known without Ray, which takes seconds to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, as Ray knows it."""

    num_gpus: int
    accelerator_type: str | None  # of its GPUs, by Ray's name for it (H100, A100-80G, ...); None if Ray does not know
    memory_bytes: int | None  # of the host, free when Ray started there; None if Ray does not know
    is_here: bool  # the machine that this process runs on
