"""torch.compile of a model's blocks, to train it or to draw by it."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cluster.errors import UserError, first_line

# About a cache of diffusers that asks for torch's version: nothing that a user could mend.
warnings.filterwarnings("ignore", r"Dynamo detected a call to a `functools\.lru_cache`", UserWarning)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile a model's blocks one by one: alike ones share their code, and all of them together take a fraction
    of the time that the whole would.

    The first batch of each shape waits for that. Raises UserError where nothing can be compiled for the model's device.
    """
    check_compiles(next(model.parameters()).device)
    for block in blocks_of(model):
        # With sizes left open it took twice as long, and again for a smaller batch, for torch's kernels depend on it.
        block.compile(dynamic=False)


def compile_forwards(model: nn.Module, *, backend: str = "inductor") -> None:
    """As `compile_blocks`, but hooks on the blocks stay outside: an engine that gathers weights in them needs that."""
    check_compiles(next(model.parameters()).device)
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """The members of a model's lists of modules: its repeated blocks."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks_of(child)


def check_compiles(device: torch.device) -> None:
    """Raises UserError where nothing can be compiled for the device."""
    try:
        torch.compile(_double)(torch.ones(1, device=device))
    except RuntimeError as error:
        reason = first_line(getattr(error, "inner_exception", error))  # torch's own first line names its backend
        raise UserError(
            f"torch.compile does not work for {device.type} here ({reason}): install a C++ compiler such as g++, or "
            "do not compile"
        ) from None


def _double(value: Tensor) -> Tensor:
    return value * 2
