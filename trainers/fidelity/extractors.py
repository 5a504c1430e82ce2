"""Feature extractors by URI, KIND or KIND:WEIGHTS.

    inception:WEIGHTS       FID's Inception-v3: pool3 features and class logits
    clip:WEIGHTS            transformers CLIP: image and prompt features
    biomedclip:WEIGHTS      BiomedCLIP in open_clip's layout: image and prompt features
    dinov2:WEIGHTS          DINOv2: class token
    rad-dino:WEIGHTS        RAD-DINO: class token
    radimagenet:WEIGHTS     RadImageNet's ResNet-50: pooled features
    transformers:WEIGHTS    any vision model of transformers: class token, or pooled output where there is none
    random-vgg, random-vgg:SIDE   VGG-16 that was never trained, on images of 224 or SIDE pixels

WEIGHTS is a path, an s3:// or package:// address, or a hub id.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cluster import storage
from cluster.errors import UserError, nearest
from trainers.fidelity.biomedclip import load_biomedclip
from trainers.fidelity.encoders import ImageEncoder, ImageTextEncoder
from trainers.fidelity.evaluation import ExtractorRecord
from trainers.fidelity.inception import InceptionV3, load_inception
from trainers.fidelity.preprocessing import Preprocessing
from trainers.fidelity.pretrained import load_clip, vision_loader
from trainers.fidelity.random_vgg import load_random_vgg
from trainers.fidelity.resnet import load_radimagenet


@dataclass(frozen=True)
class Kind:
    load: Callable[[str], tuple[ImageEncoder, Preprocessing]]
    weights: str | None
    """What WEIGHTS must be and where it is published; None if there need be none."""


KINDS = {
    "inception": Kind(
        load_inception,
        "pt_inception-2015-12-05-6726825d.pth, from the releases of github.com/mseitzer/pytorch-fid",
    ),
    "clip": Kind(load_clip, "a CLIP model of transformers, such as openai/clip-vit-large-patch14-336 on the hub"),
    "biomedclip": Kind(
        load_biomedclip,
        "a model of open_clip, such as microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 on the hub",
    ),
    "dinov2": Kind(
        vision_loader("dinov2", "dinov2_with_registers"),
        "a DINOv2 model of transformers, such as facebook/dinov2-large on the hub",
    ),
    "rad-dino": Kind(vision_loader("dinov2"), "microsoft/rad-dino on the hub, or a copy of it"),
    "radimagenet": Kind(
        load_radimagenet, "ResNet50.pt of RadImageNet's PyTorch models, see github.com/BMEII-AI/RadImageNet"
    ),
    "transformers": Kind(vision_loader(), "a vision model of transformers with its preprocessor_config.json"),
    "random-vgg": Kind(load_random_vgg, None),
}


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
    name, _, weights = uri.partition(":")
    kind = _kind(name)
    if kind.weights and not weights:
        raise UserError(f"extractor '{uri}': say {name}:WEIGHTS, which is {kind.weights}")
    try:
        network, preprocessing = kind.load(weights)
    except UserError as error:
        needed = f"; needed is {kind.weights}" if kind.weights else ""
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


@lru_cache(maxsize=8)
def kept_extractor(uri: str, device: str) -> Extractor:
    """`open_extractor`, once in a process: an evaluation asks for the same one many times, and some take seconds."""
    return open_extractor(uri, device)


def absolute_extractor(uri: str) -> str:
    """The same extractor for a process that works in another folder. Raises UserError if there is no such kind."""
    name, colon, weights = uri.partition(":")
    _kind(name)
    return f"{name}{colon}{storage.absolute_if_there(weights)}"


def label_of(uri: str) -> str:
    """The label of an extractor's features, known before it is opened: `rad_dino`, `random_vgg_64`.

    Of `transformers` the model's name is part of it, for there may be several. Raises UserError if there is no such
    kind.
    """
    name, _, weights = uri.partition(":")
    _kind(name)
    told_apart = name in ("transformers", "random-vgg") and weights and uri != "random-vgg:224"
    parts = [name, weights.rstrip("/").rpartition("/")[2]] if told_apart else [name]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower()).strip("_")


def _kind(name: str) -> Kind:
    if name not in KINDS:
        guess = nearest(name, KINDS)
        hint = f"; did you mean '{guess}'?" if guess else ""
        raise UserError(f"there is no feature extractor '{name}', only {', '.join(KINDS)}{hint}")
    return KINDS[name]


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
