"""Checkpoints are written beside the training, from a copy in host memory."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from trainers.engines import Saving

CGROUP = Path("/sys/fs/cgroup")  # of a container that may take less than its machine has
SPARE = 1.25  # of what a copy takes must be free


class CheckpointWriter:
    """Writes one state at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def save(self, folder: Path, state: Any, write: Callable[[Path, Any], None]) -> Saving:
        """Have `write` put a state, tensors in whatever containers, into `folder` as the state is now.

        Without room for a copy of it, it is written before the training goes on. What the writing before this one
        raised is raised here.
        """
        if self._last is not None:
            self._last.result()
        if _has_room_for(state):
            copy = tree_map_only(Tensor, _copy_on_host, state)
            copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in _tensors(state)) else None
            if copied:
                copied.record()
            self._last = self._thread.submit(_write_when, copied, write, folder, copy)
        else:
            write(folder, state)
            self._last = Future()
            self._last.set_result(None)
        return Saving(folder, self._last)


def _write_when(copied: torch.cuda.Event | None, write: Callable[[Path, Any], None], folder: Path, copy: Any) -> None:
    if copied:
        copied.synchronize()
    write(folder, copy)


def _copy_on_host(tensor: Tensor) -> Tensor:
    """A contiguous copy that no step writes to; of a GPU's tensor it is there when the GPU has come to it."""
    pinned = tensor.is_cuda
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor.detach(), non_blocking=pinned)


def _has_room_for(state: Any) -> bool:
    """Whether all ranks of this machine may copy as much at a time."""
    needed = sum(tensor.nbytes for tensor in _tensors(state)) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return SPARE * needed <= available_memory()


def available_memory() -> float:
    """Bytes that this machine, or this container, has free."""
    available: float = psutil.virtual_memory().available
    try:
        most = int((CGROUP / "memory.max").read_text())
        return min(available, most - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return available


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
