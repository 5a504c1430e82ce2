"""Weights into a model that may be cut over the ranks. Imports no DeepSpeed, which changes the process it is in."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import UserError
from trainers.sharded_checkpoint import mismatches, stretch


@torch.no_grad()
def load_partitioned(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a model, cut over the ranks or whole, from whole tensors of which each is dropped before the next is read.

    Raises UserError naming weights that are missing, not expected, or of another shape.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    expected = shapes(parameters)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors:
        found[name] = tuple(tensor.shape)
        if found[name] != expected.get(name):
            continue
        parameter = parameters[name]
        if hasattr(parameter, "ds_tensor"):
            start, stop = stretch(tensor.numel(), dist.get_rank(), dist.get_world_size())
            parameter.ds_tensor[: stop - start].copy_(tensor.flatten()[start:stop])
        else:
            parameter.copy_(tensor)
    if differing := mismatches(expected=expected, found=found):
        raise UserError(f"the weights do not fit the {type(model).__name__}: {differing}")


def shapes(parameters: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The whole shape of each parameter, also of one that is cut over the ranks."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
