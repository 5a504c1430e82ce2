"""Checkpoints: a folder of named states, whole or not there.

    model.safetensors   ema.safetensors   the weights and their moving average
    optimizer.pt                          the optimizer's state_dict
    state.json                            step and update count; written last, so a folder without it is no checkpoint

Not saved: frozen weights, which are where they came from; and, because they are functions of the step, the data order,
every random draw and the learning rate.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.documents import parsing, read_json
from cluster.errors import UserError
from cluster.storage import NotFoundError
from trainers.ema import EMA, trained_state
from trainers.sharded_checkpoint import mismatches
from trainers.tensor_files import load_pickled, load_tensors


def state_of(*, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint of `step` finished steps holds: the tensors themselves, which go on changing."""
    return {
        "model": trained_state(model),
        "ema": dict(ema.average),
        "optimizer": optimizer.state_dict(),
        "state": {"step": step, "ema_updates": ema.num_updates},
    }


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, as `state_of` gives it, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model", "ema"):
        tensors = {weight: value.contiguous() for weight, value in state[name].items()}
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    with (folder / "optimizer.pt").open("wb") as file:  # given a path, torch does not say why it cannot be written
        torch.save(state["optimizer"], file)
    counts = {name: int(value) for name, value in state["state"].items()}
    (folder / "state.json").write_text(json.dumps(counts) + "\n")


@torch.no_grad()
def load(folder: Path, *, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save` wrote, in place, and return its step.

    Raises UserError when the folder is no checkpoint, is damaged or belongs to another model.
    """
    state = _read_state(folder)
    _fill(folder, trained_state(model), load_tensors(folder / "model.safetensors"))
    _fill(folder, ema.average, load_tensors(folder / "ema.safetensors"))
    with parsing(str(folder / "state.json")):
        ema.num_updates.fill_(state["ema_updates"])
    path = folder / "optimizer.pt"
    document = load_pickled(path)
    with parsing(str(path)):
        _check_moments(document["state"], optimizer)
        optimizer.load_state_dict(document)
    for weight, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == weight.shape:
                # A moment, which the fused optimizer takes to lie in memory as its weight does.
                values[name] = torch.empty_like(weight).copy_(value)
    return state["step"]


def load_averaged_weights(folder: Path, model: nn.Module) -> int:
    """Put a checkpoint's moving-average weights into `model` and return the checkpoint's step."""
    state = _read_state(folder)
    with parsing(str(folder)):
        model.load_state_dict(load_tensors(folder / "ema.safetensors"))
    return state["step"]


def _fill(folder: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    shapes = [{name: tuple(value.shape) for name, value in tensors.items()} for tensors in (own, found)]
    if differing := mismatches(expected=shapes[0], found=shapes[1]):
        raise UserError(f"checkpoint {folder} belongs to another model: {differing}")
    for name, value in found.items():
        own[name].copy_(value)


def _check_moments(state: Mapping[int, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Raises ValueError for moments of other shapes than their weights': the optimizer would take them."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in ((), weights[number].shape):
                raise ValueError(f"{name} of weight {number} is {list(value.shape)}")


def _read_state(folder: Path) -> dict[str, int]:
    uri = str(folder / "state.json")
    try:
        state = read_json(uri)
    except NotFoundError:
        raise UserError(f"{folder} is not a complete checkpoint: state.json is not there") from None
    with parsing(uri):
        return {name: int(state[name]) for name in ("step", "ema_updates")}
