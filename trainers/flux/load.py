"""FLUX's parts from a model in the diffusers layout, the transformer tensor by tensor."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import safetensors
from torch import Tensor

from cluster.documents import parsing
from cluster.errors import UserError
from cluster.weights import component_config, local_weights, weight_files
from trainers.flux.architecture import FLUX_1_DEV

if TYPE_CHECKING:  # a launcher reads the config and loads no part
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler


def transformer_config(pretrained: str) -> dict[str, object]:
    """The transformer's config.json. Raises UserError if the model is not FLUX."""
    config = component_config(pretrained, "transformer")
    name = config.get("_class_name")
    if name != FLUX_1_DEV["_class_name"]:
        raise UserError(f"pretrained: '{pretrained}' holds a {name} as its transformer, not a FLUX model")
    return config


def transformer_weights(pretrained: str) -> Iterator[tuple[str, Tensor]]:
    """The transformer's weights by name, one tensor in memory and one file on disk at a time."""
    for path in weight_files(pretrained, "transformer"):
        with parsing(str(path)), safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                yield name, file.get_tensor(name)


def load_decoding_parts(pretrained: str) -> "tuple[AutoencoderKL, FlowMatchEulerDiscreteScheduler]":
    """What turns latents into pictures, in eval mode and without gradients."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    with local_weights(pretrained, ["vae/*", "scheduler/*"]) as folder:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return vae.eval().requires_grad_(False), scheduler
