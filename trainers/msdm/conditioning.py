"""The frozen encoders of the denoiser's training: captions to embeddings, images to posterior moments."""

from collections.abc import Callable, Hashable
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_shards import Batch
from trainers.msdm.text_encoder import tokenize
from trainers.msdm.vae import moments

Pair = tuple[Tensor, Tensor]


class Memo:
    """Results of a pure function by key, until they take `max_bytes`; what comes later is computed each time."""

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._known: dict[Hashable, Pair] = {}

    def get(self, key: Hashable, compute: Callable[[], Pair]) -> Pair:
        if key in self._known:
            return self._known[key]
        value = compute()
        size = sum(tensor.nbytes for tensor in value)
        if size <= self._room:
            self._room -= size
            self._known[key] = value
        return value


class FrozenEncoders:
    """Encodes each caption and each image once and remembers the result.

    One at a time, so that a result does not depend on which samples it shared a batch with: a resumed run,
    whose memory starts empty, gets the same bits.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        device: torch.device,
        max_bytes: int = 2**30,
    ) -> None:
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.to(device)
        self._device = device
        self._memo = Memo(max_bytes)

    @torch.no_grad()
    def prompts(self, captions: list[str]) -> Pair:
        """Prompt embeddings [B, L, D] and attention mask [B, L]."""

        def encode(caption: str) -> Pair:
            tokens = tokenize(self.tokenizer, [caption]).to(self._device)
            return self.text_encoder(**tokens).last_hidden_state, tokens["attention_mask"]

        return _cat([self._memo.get(caption, partial(encode, caption)) for caption in captions])

    @torch.no_grad()
    def moments(self, batch: Batch) -> Pair:
        """Mean and log-variance of the batch's images, [B, C, h, w] each."""

        def encode(position: int) -> Pair:
            return moments(self.vae, batch.images[position : position + 1].to(self._device))

        keys = zip(batch.keys, batch.flipped, strict=True)
        return _cat([self._memo.get(key, partial(encode, position)) for position, key in enumerate(keys)])


def _cat(pairs: list[Pair]) -> Pair:
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)
