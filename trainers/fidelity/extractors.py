"""Feature extractors, opened by the URIs of trainers/fidelity/extractor_uris.py."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from trainers.fidelity.encoders import ImageEncoder, ImageTextEncoder
from trainers.fidelity.evaluation import ExtractorRecord
from trainers.fidelity.extractor_uris import WEIGHTS, kind_of, label_of
from trainers.fidelity.inception import InceptionV3, load_inception
from trainers.fidelity.preprocessing import Preprocessing
from trainers.fidelity.random_vgg import load_random_vgg
from trainers.fidelity.resnet import load_radimagenet

MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "rad-dino": ("dinov2",)}
"""Of transformers, that a kind may be of; others may be of any."""


@dataclass(frozen=True)
class Extractor:
    """Turns images into features; in float32, so that they are the same on any device but for rounding."""

    label: str
    """Names its features among measures: `inception`, `random_vgg_64`."""
    record: ExtractorRecord
    network: ImageEncoder
    preprocessing: Preprocessing
    device: str

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, H, W, 3] -> features float32 [B, record.dim] on the CPU."""
        with _exactly():
            features: Tensor = self.network(self.preprocessing(pixels).to(self.device))
            return features.float().cpu().contiguous()  # safetensors writes memory as it lies


@dataclass(frozen=True)
class ClassifyingExtractor(Extractor):
    """Its features are those that Inception Score's classes are told from."""

    network: InceptionV3

    def class_logits(self, features: Tensor) -> Tensor:
        """Features float32 [B, 2048], as it gave them -> logits float32 [B, 1008] on the CPU.

        From features, not pixels: the last layer is all there is between, and the network need not run again.
        """
        with _exactly():
            return self.network.class_logits(features.to(self.device)).cpu()


@dataclass(frozen=True)
class PromptExtractor(Extractor):
    """Its features of an image and of a prompt lie in one space."""

    network: ImageTextEncoder

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Features float32 [B, record.dim] on the CPU; like those of images, not normalised."""
        with _exactly():
            return self.network.prompt_features(prompts).float().cpu()


def open_extractor(uri: str, device: str = "cpu") -> Extractor:
    """A ClassifyingExtractor, a PromptExtractor, or an Extractor that gives features alone.

    Raises UserError if there is no such kind, or its weights are missing or of another layout.
    """
    kind, weights = kind_of(uri), uri.partition(":")[2]
    if WEIGHTS[kind] and not weights:
        raise UserError(f"extractor '{uri}': say {kind}:WEIGHTS, which is {WEIGHTS[kind]}")
    try:
        network, preprocessing = _load(kind, weights)
    except UserError as error:
        needed = f"; needed is {WEIGHTS[kind]}" if WEIGHTS[kind] else ""
        raise UserError(f"extractor '{uri}': {error}{needed}") from None
    network = network.eval().requires_grad_(False)
    record = ExtractorRecord(
        uri=uri, digest=_digest(network, preprocessing.settings), dim=network.dim, resize=preprocessing.resize
    )
    extractor_class: type[Any] = Extractor
    if isinstance(network, InceptionV3):
        extractor_class = ClassifyingExtractor
    elif isinstance(network, ImageTextEncoder):
        extractor_class = PromptExtractor
    extractor: Extractor = extractor_class(
        label=label_of(uri), record=record, network=network.to(device), preprocessing=preprocessing, device=device
    )
    return extractor


def _load(kind: str, weights: str) -> tuple[ImageEncoder, Preprocessing]:
    if kind == "inception":
        return load_inception(weights)
    if kind == "radimagenet":
        return load_radimagenet(weights)
    if kind == "random-vgg":
        return load_random_vgg(weights)
    # These take transformers, whose models take seconds to import.
    from trainers.fidelity.biomedclip import load_biomedclip
    from trainers.fidelity.pretrained import load_clip, load_vision_model

    if kind == "biomedclip":
        return load_biomedclip(weights)
    if kind == "clip":
        return load_clip(weights)
    return load_vision_model(weights, *MODEL_TYPES.get(kind, ()))


@lru_cache(maxsize=8)
def kept_extractor(uri: str, device: str) -> Extractor:
    """`open_extractor`, once in a process: an evaluation asks for the same one many times, and some take seconds."""
    return open_extractor(uri, device)


def _digest(network: nn.Module, settings: dict[str, Any]) -> str:
    """SHA-256 over preprocessing and weights, whatever kind of file they came from."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):  # some published files have it, others do not, and it does nothing
            continue
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(tensor.contiguous().view(-1).numpy().data)
    return digest.hexdigest()


@contextmanager
def _exactly() -> Iterator[None]:
    """No gradients, and no TensorFloat-32, by which cuDNN rounds inputs of convolutions to 10 bits by default."""
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
