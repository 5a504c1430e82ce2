"""Checkpoints: a folder of named states, whole or not there.

    model.safetensors   ema.safetensors   the weights and their moving average
    optimizer.pt                          the optimizer's state_dict
    state.json                            step and update count; written last, so a folder without it is no checkpoint

Not saved: frozen weights, which are where they came from; and, because they are functions of the step, the data order,
every random draw and the learning rate.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cluster.errors import UserError
from trainers.ema import EMA, trained_state
from trainers.sharded_checkpoint import mismatches


def save(folder: Path, *, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint of `step` finished steps into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in trained_state(model).items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    safetensors.torch.save_file(ema.average, folder / "ema.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    state = {"step": step, "ema_updates": ema.num_updates}
    (folder / "state.json").write_text(json.dumps(state) + "\n")


@torch.no_grad()
def load(folder: Path, *, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save` wrote, in place, and return its step.

    Raises UserError when the folder is no checkpoint or belongs to another model.
    """
    state = _read_state(folder)
    weights, trained = safetensors.torch.load_file(folder / "model.safetensors"), trained_state(model)
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (trained, weights)]
    if differing := mismatches(expected=shapes[0], found=shapes[1]):
        raise UserError(f"checkpoint {folder} belongs to another model: {differing}")
    for name, value in weights.items():
        trained[name].copy_(value)
    for name, value in safetensors.torch.load_file(folder / "ema.safetensors").items():
        ema.average[name].copy_(value)
    ema.num_updates = int(state["ema_updates"])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    return int(state["step"])


def load_averaged_weights(folder: Path, model: nn.Module) -> int:
    """Put a checkpoint's moving-average weights into `model` and return the checkpoint's step."""
    state = _read_state(folder)
    model.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
    return int(state["step"])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is not a complete checkpoint: state.json is not there") from None
    return state
