"""Published weights that are one file: where it is, what is in it, and whether it fits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from torch import Tensor, nn

from cluster.errors import UserError
from cluster.weights import local_weights
from trainers.tensor_files import load_pickled, load_tensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read_state_dict(weights: str) -> dict[str, Tensor]:
    """Tensors by name of a file of weights, on the CPU.

    `weights` is a file, or a folder with just one, of any place that local_weights knows: /data/a.pth,
    s3://bucket/a.safetensors, OWNER/MODEL/a.pt on the hub, OWNER/MODEL. Raises UserError if there is none, or if it
    holds anything but tensors: nothing in it is ever run.
    """
    with _local_file(weights) as path:
        return read_file(path)


def read_file(path: Path) -> dict[str, Tensor]:
    """As read_state_dict, of a local file."""
    if path.suffix == ".safetensors":
        return load_tensors(path)
    loaded = load_pickled(path)
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path.name} is not a state dict: it holds more, or other things, than tensors by name")
    return dict(state)


def load_into(network: nn.Module, state: Mapping[str, Tensor], *, unused: Sequence[str] = ()) -> None:
    """Fill `network`. Raises UserError if tensors are missing, or unknown and not in `unused`, or of another shape.

    How many batches a normalisation has seen is not asked for: it takes no part in inference.
    """
    wanted = network.state_dict()
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted and name not in unused]
    if missing or unknown:
        problems = {"lacks": missing, "has unknown": unknown}
        said = [f"{verb} {len(names)} tensors such as '{names[0]}'" for verb, names in problems.items() if names]
        raise UserError(f"the weights are of another layout: the file {' and '.join(said)}")
    fitting = {name: tensor for name, tensor in state.items() if name in wanted}
    for name, tensor in fitting.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"'{name}' in the weights is {list(tensor.shape)}, not {list(wanted[name].shape)}")
    network.load_state_dict(fitting, strict=False)


@contextmanager
def _local_file(weights: str) -> Iterator[Path]:
    place, _, name = weights.rpartition("/")
    if PurePosixPath(name).suffix in SUFFIXES:
        with local_weights(place or ".", [name]) as folder:
            if not (folder / name).is_file():
                raise UserError(f"there is no file {weights}")
            yield folder / name
    else:
        with local_weights(weights, [f"*{suffix}" for suffix in SUFFIXES]) as folder:
            found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
            if len(found) != 1:
                names = ", ".join(path.name for path in found) or "none"
                raise UserError(f"'{weights}' has not one file of weights but {names}; name the file: {weights}/FILE")
            yield found[0]
