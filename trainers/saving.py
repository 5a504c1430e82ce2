"""Checkpoints are written beside the training, from a copy in host memory."""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from trainers.engines import Saving

logger = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")  # of a container that may take less than its machine has
SPARE = 1.25  # of what a copy takes must be free
ALIGNMENT = 64  # bytes, of each tensor in the staging buffer


class CheckpointWriter:
    """Writes one state at a time, from a staging buffer in host memory that is kept for the next one."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._staging = StagingBuffer(0, pinned=False)

    @property
    def staged_bytes(self) -> int:
        """Of host memory that copies take, now and until the process ends."""
        return self._staging.nbytes

    @property
    def staging_is_pinned(self) -> bool:
        return self._staging.is_pinned

    def save(self, folder: Path, state: Any, write: Callable[[Path, Any], None]) -> Saving:
        """Have `write` put a state, tensors in whatever containers, into `folder` as the state is now.

        Without room for a copy of it, it is written before the training goes on. What the writing before this one
        raised is raised here.
        """
        if self._last is not None:
            self._last.result()  # nobody reads the staging buffer any more
        leaves, structure = tree_flatten(state)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if self._has_staging_for(tensors):
            copies = iter(self._staging.copies_of(tensors))
            copy = tree_unflatten([next(copies) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
            copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors) else None
            if copied:
                copied.record()
            self._last = self._thread.submit(_write_when, copied, write, folder, copy)
        else:
            write(folder, state)
            self._last = Future()
            self._last.set_result(None)
        return Saving(folder, self._last)

    def _has_staging_for(self, tensors: list[Tensor]) -> bool:
        """Make the buffer large enough, if all ranks of this machine have room to do so at a time.

        Only growth is checked: the buffer itself would count as taken the next time.
        """
        needed = staging_bytes(tensors)
        if needed <= self._staging.nbytes:
            return True
        if SPARE * needed * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > available_memory() + self._staging.nbytes:
            return False
        self._staging.close()  # before the larger one is there: both would not fit
        self._staging = StagingBuffer(needed, pinned=any(tensor.is_cuda for tensor in tensors))
        return True


class StagingBuffer:
    """Host memory of exactly `nbytes`; pinned, so that a GPU copies to it while it computes.

    Not by torch's own allocator of pinned memory, which rounds each block up to a power of two: FLUX's states would
    take 1.56 times their size.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.nbytes = nbytes
        self._bytes = torch.empty(nbytes, dtype=torch.uint8).numpy()
        self.is_pinned = pinned and self._pin()

    def _pin(self) -> bool:
        error = int(torch.cuda.cudart().cudaHostRegister(self._bytes.ctypes.data, self.nbytes, 0))
        if error:
            logger.warning(
                "Checkpoints are copied more slowly: pinning %d bytes gave CUDA error %d", self.nbytes, error
            )
            with suppress(RuntimeError):  # CUDA reports it once more, to the next kernel: let it be this one
                torch.zeros(1, device="cuda")
        return not error

    def copies_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """Contiguous copies, each with a storage of its own in the buffer, which no step writes to; of a GPU's tensors
        they are there when the GPU has come to it."""
        copies, start = [], 0
        for tensor in tensors:
            part = torch.from_numpy(self._bytes[start : start + tensor.nbytes]).view(tensor.dtype).view(tensor.shape)
            copies.append(part.copy_(tensor.detach(), non_blocking=self.is_pinned))
            start += _aligned(tensor.nbytes)
        return copies

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may be gone at the end of the process
            self.close()  # or CUDA would go on with these pages for whatever lies at the address next

    def close(self) -> None:
        """Let go of the memory; copies are not to be read any more."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.ctypes.data)
        self.nbytes, self._bytes, self.is_pinned = 0, self._bytes[:0].copy(), False


def staging_bytes(tensors: list[Tensor]) -> int:
    """What a copy of the tensors takes."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _write_when(copied: torch.cuda.Event | None, write: Callable[[Path, Any], None], folder: Path, copy: Any) -> None:
    if copied:
        copied.synchronize()
    write(folder, copy)


def available_memory() -> float:
    """Bytes that this machine, or this container, can still give.

    A container is charged for the files that it has read, too; their pages are given up as soon as memory is wanted.
    """
    available: float = psutil.virtual_memory().available
    try:
        most = int((CGROUP / "memory.max").read_text())
        charged = int((CGROUP / "memory.current").read_text())
        return min(available, most - charged + _page_cache())
    except (OSError, ValueError):  # no container, or one without a limit, which says "max"
        return available


def _page_cache() -> int:
    """Bytes of files read some time ago, by the kernel's own account of the container."""
    lines = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    return next((int(value) for name, value in lines if name == "inactive_file"), 0)
