"""Which feature extractors there are, by URI, KIND or KIND:WEIGHTS; trainers/fidelity/extractors.py opens them.

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

import re
from collections.abc import Mapping
from types import MappingProxyType

from cluster import storage
from cluster.errors import UserError, nearest

WEIGHTS: Mapping[str, str | None] = MappingProxyType(
    {
        "inception": "pt_inception-2015-12-05-6726825d.pth, from the releases of github.com/mseitzer/pytorch-fid",
        "clip": "a CLIP model of transformers, such as openai/clip-vit-large-patch14-336 on the hub",
        "biomedclip": "a model of open_clip, such as microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224 on the "
        "hub",
        "dinov2": "a DINOv2 model of transformers, such as facebook/dinov2-large on the hub",
        "rad-dino": "microsoft/rad-dino on the hub, or a copy of it",
        "radimagenet": "ResNet50.pt of RadImageNet's PyTorch models, see github.com/BMEII-AI/RadImageNet",
        "transformers": "a vision model of transformers with its preprocessor_config.json",
        "random-vgg": None,
    }
)
"""What WEIGHTS of a kind must be and where it is published; None if there need be none."""


def absolute_extractor(uri: str) -> str:
    """The same extractor for a process that works in another folder. Raises UserError if there is no such kind."""
    name, colon, weights = uri.partition(":")
    kind_of(uri)
    return f"{name}{colon}{storage.absolute_if_there(weights)}"


def label_of(uri: str) -> str:
    """The label of an extractor's features, known before it is opened: `rad_dino`, `random_vgg_64`.

    Of `transformers` the model's name is part of it, for there may be several. Raises UserError if there is no such
    kind.
    """
    name, _, weights = uri.partition(":")
    kind_of(uri)
    told_apart = name in ("transformers", "random-vgg") and weights and uri != "random-vgg:224"
    parts = [name, weights.rstrip("/").rpartition("/")[2]] if told_apart else [name]
    return re.sub(r"[^a-z0-9]+", "_", "_".join(parts).lower()).strip("_")


def kind_of(uri: str) -> str:
    """Raises UserError if there is no such kind."""
    name = uri.partition(":")[0]
    if name not in WEIGHTS:
        guess = nearest(name, WEIGHTS)
        hint = f"; did you mean '{guess}'?" if guess else ""
        raise UserError(f"there is no feature extractor '{name}', only {', '.join(WEIGHTS)}{hint}")
    return name
