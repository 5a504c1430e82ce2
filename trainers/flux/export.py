"""From checkpoints to models that FluxPipeline opens, never holding more than one file of the transformer."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import safetensors
import safetensors.torch
import torch
from diffusers import FluxPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from torch import Tensor

from cluster.documents import parsing
from cluster.weights import local_weights
from trainers.flux.load import transformer_config
from trainers.recipe import FluxRecipe, LoRA, dump_recipe
from trainers.sharded_checkpoint import read_parameters
from trainers.tensor_files import load_tensors

WEIGHTS_NAME = "diffusion_pytorch_model"
MAX_FILE_BYTES = 4_500_000_000  # MLflow's proxy and S3's single PUT both refuse 5 GB
OTHER_COMPONENTS = ("model_index.json", "scheduler/*", "vae/*", "text_encoder*/*", "tokenizer*/*", "LICENSE*")


def export_pipeline(
    recipe: FluxRecipe, checkpoint: Path, out: Path, *, weights: Literal["ema", "weights"] = "ema"
) -> None:
    """Write the whole pipeline: the checkpoint's transformer, everything else as it was pretrained, and the recipe."""
    dtype = torch.bfloat16 if recipe.transformer.training.precision == "bf16" else torch.float32
    with local_weights(recipe.pretrained, OTHER_COMPONENTS) as pretrained:
        for pattern in OTHER_COMPONENTS:
            for path in pretrained.glob(pattern):
                target = out / path.relative_to(pretrained)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    tensors = ((name, value.to(dtype)) for name, value in _transformer_weights(checkpoint, weights))
    write_safetensors(tensors, out / "transformer", max_file_bytes=MAX_FILE_BYTES)
    (out / "transformer" / "config.json").write_text(json.dumps(transformer_config(recipe.pretrained), indent=2))
    (out / "recipe.yaml").write_text(dump_recipe(recipe))


def export_adapters(recipe: FluxRecipe, checkpoint: Path, out: Path) -> None:
    """Write the adapters' averaged weights as FluxPipeline.load_lora_weights reads them, and the recipe."""
    layers = {
        name.replace(".default.", "."): value for name, value in load_tensors(checkpoint / "ema.safetensors").items()
    }
    assert recipe.transformer.lora is not None
    # Without its settings, an adapter would be read as if alpha were its rank.
    settings = {f"transformer.{key}": value for key, value in lora_config(recipe.transformer.lora).to_dict().items()}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True, default=sorted)}

    def save(tensors: dict[str, Tensor], path: str) -> None:
        safetensors.torch.save_file(tensors, path, metadata=metadata)

    # As diffusers would write it, but for the order of sets, and of several entries of metadata: both are of chance.
    FluxPipeline.save_lora_weights(out, transformer_lora_layers=layers, save_function=save)
    (out / "recipe.yaml").write_text(dump_recipe(recipe))


def lora_config(lora: LoRA) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))


def write_safetensors(tensors: Iterator[tuple[str, Tensor]], folder: Path, *, max_file_bytes: int) -> None:
    """Write tensors to numbered files of at most `max_file_bytes` (unless one tensor is larger), with the index
    that diffusers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        safetensors.torch.save_file(pending, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_file_bytes:
            flush()
        pending[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(parts) == 1:
        (folder / "part-0").rename(folder / f"{WEIGHTS_NAME}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"{WEIGHTS_NAME}-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{WEIGHTS_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))


def _transformer_weights(checkpoint: Path, weights: Literal["ema", "weights"]) -> Iterator[tuple[str, Tensor]]:
    """Full tensors, one at a time, of either engine's checkpoint."""
    replica = checkpoint / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    if not replica.is_file():
        yield from read_parameters(checkpoint, weights)
        return
    with parsing(str(replica)), safetensors.safe_open(replica, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            yield name, file.get_tensor(name)
