"""Checkpoints of a model that is cut over ranks, to be read at any number of ranks, or by none.

    rank-00000-of-00002.safetensors     what rank 0 held
    rank-00001-of-00002.safetensors     what rank 1 held

A weight is flattened and cut into equal stretches, one a rank, of which the last are shorter or empty (as ZeRO-3 does:
Rajbhandari et al. 2020, arXiv 1910.02054, Sec. 5). A file holds its rank's stretches, named KIND/WEIGHT, in the
precision they were trained in, and in its header the `State`. Not saved: the data order, every random draw and the
learning rate, which are functions of the step; and buffers, of which FLUX has none.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import safetensors
import torch
from torch import Tensor

from cluster.documents import parsing
from cluster.errors import UserError

FORMAT = "medsynth-sharded-1"
FILE_NAME = "rank-{rank:05d}-of-{world_size:05d}.safetensors"
FILE_PATTERN = re.compile(r"rank-\d{5}-of-(\d{5})\.safetensors")
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors calls them

Kind = Literal["weights", "ema", "exp_avg", "exp_avg_sq"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class State:
    """What a checkpoint knows besides its tensors; the same in every rank's file."""

    step: int
    optimizer_steps: int  # fewer than `step` if steps were skipped
    ema_updates: int
    shapes: Mapping[str, Shape]


def stretch(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of a flattened weight of `numel` elements that is the rank's own."""
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def save(
    folder: Path, tensors: Mapping[Kind, Mapping[str, Tensor]], *, rank: int, world_size: int, state: State
) -> None:
    """Write this rank's file; `tensors` hold its stretches by kind and weight, on any device."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{kind}/{name}": tensor for kind, parts in tensors.items() for name, tensor in parts.items()}
    metadata = {"format": FORMAT, "state": json.dumps(asdict(state))}
    path = folder / FILE_NAME.format(rank=rank, world_size=world_size)
    _write_safetensors(path.with_suffix(".part"), named, metadata)
    path.with_suffix(".part").rename(path)


class ShardedCheckpoint:
    """A complete checkpoint, open for reading; only what is asked for is read.

    Raises UserError, naming file or folder, if a rank's file is missing, truncated or of another checkpoint, or holds
    tensors of other sizes than it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = [_open(path) for path in _complete(folder)]
        with parsing(f"checkpoint {folder}"):
            states = [file.metadata()["state"] for file in self._files]
            if len(set(states)) > 1:
                steps = ", ".join(str(json.loads(state)["step"]) for state in states)
                raise UserError(f"checkpoint {folder} is a mixture: its files, in order, are of steps {steps}")
            state = json.loads(states[0])
            counts = {name: int(state[name]) for name in ("step", "optimizer_steps", "ema_updates")}
            shapes = {name: tuple(map(int, shape)) for name, shape in state["shapes"].items()}
            self.state = State(**counts, shapes=shapes)
            self._names = set(self._files[0].keys())
            for rank, file in enumerate(self._files):
                self._check_stretches(rank, file)

    def _check_stretches(self, rank: int, file: Any) -> None:
        """Raises ValueError unless a rank's file holds what `state` says, in every tensor the rank's own stretch."""
        if set(file.keys()) != self._names:
            raise ValueError(f"rank {rank} holds other tensors than rank 0")
        for name in self._names:
            kind, _, weight = name.partition("/")
            start, stop = stretch(self.numel(weight), rank, len(self._files))
            if kind not in get_args(Kind) or file.get_slice(name).get_shape() != [stop - start]:
                raise ValueError(f"rank {rank} does not hold elements {start} to {stop} of {name}")

    def has(self, kind: Kind, name: str) -> bool:
        return f"{kind}/{name}" in self._names

    def read(self, kind: Kind, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened weight, or of what belongs to it, as they were saved."""
        parts = []
        for rank, file in enumerate(self._files):
            first, last = stretch(self.numel(name), rank, len(self._files))
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                parts.append(file.get_slice(f"{kind}/{name}")[begin - first : end - first])
        return torch.cat(parts) if parts else torch.empty(0)

    def numel(self, name: str) -> int:
        return torch.Size(self.state.shapes[name]).numel()

    def check_fits(self, shapes: Mapping[str, Shape]) -> Self:
        """Raise UserError unless the checkpoint is of a model of these weights."""
        if differing := mismatches(expected=shapes, found=self.state.shapes):
            raise UserError(f"checkpoint {self.folder} belongs to another model: {differing}")
        return self


def read_parameters(folder: Path, which: Literal["ema", "weights"]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint, whole, in float32, one in memory at a time.

    A weight that no average was kept of (a frozen one, or any with ema_decay 0) is its own average.
    """
    checkpoint = ShardedCheckpoint(folder)
    for name, shape in checkpoint.state.shapes.items():
        kind: Kind = which if checkpoint.has(which, name) else "weights"
        yield name, checkpoint.read(kind, name, 0, checkpoint.numel(name)).float().view(shape)


def mismatches(*, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str | None:
    """In words, how the weights found differ from those expected; None if they do not."""
    shared = expected.keys() & found.keys()
    differences = [
        *(f"{name} is missing" for name in sorted(expected.keys() - shared)),
        *(f"{name} is not expected" for name in sorted(found.keys() - shared)),
        *(
            f"{name} is {list(found[name])}, not {list(expected[name])}"
            for name in sorted(shared)
            if tuple(found[name]) != tuple(expected[name])
        ),
    ]
    more = f", and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more if differences else None


def _complete(folder: Path) -> list[Path]:
    """The files of all ranks, in rank order."""
    world_sizes = {
        int(match[1]) for path in folder.glob("rank-*.safetensors") if (match := FILE_PATTERN.fullmatch(path.name))
    }
    if not world_sizes:
        raise UserError(f"{folder} is no sharded checkpoint: there is no rank-…-of-….safetensors")
    if len(world_sizes) > 1:
        raise UserError(f"checkpoint {folder} is a mixture: it has files of {sorted(world_sizes)} ranks")
    (world_size,) = world_sizes
    paths = [folder / FILE_NAME.format(rank=rank, world_size=world_size) for rank in range(world_size)]
    for path in paths:
        if not path.exists():
            raise UserError(f"checkpoint {folder} is incomplete: {path.name} is not there")
    return paths


def _open(path: Path) -> Any:
    try:
        file = safetensors.safe_open(path, "pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from None
    if (file.metadata() or {}).get("format") != FORMAT:
        raise UserError(f"{path} is no rank's part of a checkpoint: its header does not say {FORMAT}")
    return file


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written tensor by tensor: the library's own writer refuses views that share a buffer, and
    copies all tensors to the host before it begins.

    Format: header length (8 bytes, little-endian), header (JSON), the tensors' bytes.
    """
    # Wider elements first, so that each tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
