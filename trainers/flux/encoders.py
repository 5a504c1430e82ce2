"""FLUX's frozen encoders: its VAE, T5 and CLIP, whose outputs are precomputed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cluster import storage
from cluster.errors import UserError
from cluster.weights import component_digest, local_weights
from trainers.recipe import FluxRecipe
from trainers.tokens import num_tokens


@dataclass(frozen=True)
class FluxEncoders:
    """Those of the model `pretrained` in the diffusers layout; see data_shards.precompute.Encoders."""

    pretrained: str
    max_tokens: int
    components: ClassVar[Mapping[str, str]] = {
        "vae": "the VAE",
        "text_encoder": "the CLIP text encoder",
        "tokenizer": "the CLIP tokenizer",
        "text_encoder_2": "the T5 text encoder",
        "tokenizer_2": "the T5 tokenizer",
    }

    @classmethod
    def of(cls, recipe: FluxRecipe) -> "FluxEncoders":
        return cls(storage.absolute_if_there(recipe.pretrained), recipe.max_tokens)

    @property
    def origin(self) -> dict[str, str]:
        return {"pretrained": self.pretrained}

    def digest(self, component: str) -> str:
        return component_digest(self.pretrained, component)

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of T5, whose tokens the transformer attends to; CLIP's 77 make one vector."""
        from transformers import T5TokenizerFast

        with local_weights(self.pretrained, ["tokenizer_2/*"]) as folder, self._loading("T5 tokenizer"):
            return num_tokens(T5TokenizerFast.from_pretrained(folder / "tokenizer_2"), texts)

    def text_dtype(self, device: str) -> str:
        return "float32" if device == "cpu" else "bfloat16"

    def image_encoder(self, device: str) -> Callable[[Tensor], Tensor]:
        from diffusers import AutoencoderKL

        with local_weights(self.pretrained, ["vae/*"]) as folder, self._loading("vae"):
            loaded = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32, use_safetensors=True)
        vae = loaded.to(device).eval()

        def encode(images: Tensor) -> Tensor:
            posterior = vae.encode(images).latent_dist
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        return encode

    def prompt_encoder(self, device: str) -> Callable[[Sequence[str]], Mapping[str, Tensor]]:
        """To prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P], as FluxPipeline does: T5 sees its padding
        unmasked."""
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # opening is quick; encoding has a bar of its own

        parts = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
        how = {"dtype": getattr(torch, self.text_dtype(device)), "use_safetensors": True}
        with (
            local_weights(self.pretrained, [f"{part}/*" for part in parts]) as folder,
            self._loading("text encoders"),
        ):
            clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
            t5_tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
            clip = CLIPTextModel.from_pretrained(folder / "text_encoder", **how).to(device).eval()
            t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", **how).to(device).eval()

        def token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
            tokens = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            ids: Tensor = tokens.input_ids.to(device)
            return ids

        def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
            return {
                "prompt_embeds": t5(token_ids(t5_tokenizer, prompts, self.max_tokens))[0],
                "pooled_prompt_embeds": clip(
                    token_ids(clip_tokenizer, prompts, clip_tokenizer.model_max_length)
                ).pooler_output,
            }

        return encode

    @contextmanager
    def _loading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the {what} of '{self.pretrained}': {str(error).splitlines()[0]}") from None
