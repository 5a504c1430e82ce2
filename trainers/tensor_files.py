"""Files of tensors from outside: whole, or refused by name; nothing in them is ever run."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cluster.documents import parsing


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, on the CPU. Raises UserError if it is damaged or not there."""
    with parsing(str(path)):
        return safetensors.torch.load_file(path)


def load_pickled(path: Path) -> Any:
    """What torch.save wrote of tensors, numbers and containers, on the CPU.

    Raises UserError if the file is damaged, holds anything else, or is compressed, which torch.save never does: a few
    of such bytes may fill any memory.
    """
    with parsing(str(path)):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("its members are compressed")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # whose advice is to let it run
            raise ValueError("it holds more than tensors, numbers and containers, or is cut off") from None
