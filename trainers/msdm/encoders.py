"""MSDM's frozen encoders, whose outputs are precomputed: the autoencoder that a run has trained, and the text's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cluster import storage
from cluster.weights import component_digest
from trainers.msdm.text_encoder import DESCRIPTION, WEIGHTS, load_text_encoder, load_tokenizer, tokenize
from trainers.recipe import MSDMRecipe, TextEncoder
from trainers.run_folder import RunFolder, finished_model
from trainers.tokens import num_tokens


@dataclass(frozen=True)
class MSDMEncoders:
    """The autoencoder in the folder `vae` and a text encoder; see data_shards.precompute.Encoders."""

    vae: str
    text_encoder: TextEncoder
    components: ClassVar[Mapping[str, str]] = {"vae": "the autoencoder", "text_encoder": "the text encoder"}

    @classmethod
    def of(cls, recipe: MSDMRecipe, run: RunFolder) -> "MSDMEncoders":
        pretrained = storage.absolute_if_there(recipe.text_encoder.pretrained)
        text_encoder = recipe.text_encoder.model_copy(update={"pretrained": pretrained})
        return cls(storage.absolute(run.model("vae")), text_encoder)

    @property
    def origin(self) -> dict[str, str]:
        return {"vae": self.vae, "text_encoder": self.text_encoder.pretrained}

    @property
    def max_tokens(self) -> int:
        return self.text_encoder.max_tokens

    def digest(self, component: str) -> str:
        if component == "vae":
            return component_digest(self.vae)
        return component_digest(self.text_encoder.pretrained, patterns=(*DESCRIPTION, *WEIGHTS))

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        return num_tokens(load_tokenizer(self.text_encoder), texts)

    def text_dtype(self, device: str) -> str:
        return "float32"

    def image_encoder(self, device: str) -> Callable[[Tensor], Tensor]:
        from diffusers import AutoencoderKL

        from trainers.msdm.vae import moments

        with finished_model(self.vae) as folder:
            vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True).to(device).eval()
        return lambda images: torch.cat(moments(vae, images), dim=1)

    def prompt_encoder(self, device: str) -> Callable[[Sequence[str]], Mapping[str, Tensor]]:
        """To prompt_embeds [B, L, D] and prompt_mask [B, L]."""
        tokenizer, text_encoder = load_text_encoder(self.text_encoder)
        text_encoder = text_encoder.to(device)

        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            tokens = tokenize(tokenizer, list(prompts)).to(device)
            return {
                "prompt_embeds": text_encoder(**tokens).last_hidden_state,
                "prompt_mask": tokens["attention_mask"],
            }

        return encode
