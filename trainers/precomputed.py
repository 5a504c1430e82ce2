"""From a batch of a precomputed set to what a model is trained on, the same for every family."""

from collections.abc import Mapping

import torch
from torch import Tensor

from data_shards import Batch
from trainers import randomness
from trainers.transfer import to_device


def posterior_draw(batch: Batch, device: torch.device) -> Tensor:
    """A draw from the posterior of each sample's image, float32 [B, C, h, w]: each epoch another."""
    mean, logvar = to_device(batch.moments, device).chunk(2, dim=1)
    return mean + (0.5 * logvar).exp() * to_device(randomness.normal(batch.seeds, "posterior", mean.shape[1:]), device)


def prompt_embeddings(
    batch: Batch, empty: Mapping[str, Tensor], caption_dropout: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Those of the samples' captions, by name [B, ...]; of a share of the samples in their place `empty`, the empty
    prompt's [1, ...] on the device, which classifier-free guidance needs."""
    is_dropped = to_device(randomness.uniform(batch.seeds, "caption_dropout") < caption_dropout, device)
    embeddings = {}
    for name, values in batch.prompts.items():
        drops = is_dropped.view(-1, *[1] * (values.ndim - 1))
        embeddings[name] = torch.where(drops, empty[name], to_device(values, device).to(dtype))
    return embeddings


def on_device(embeddings: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: to_device(values, device).to(dtype) for name, values in embeddings.items()}
