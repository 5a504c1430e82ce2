"""The frozen text encoder: captions to token embeddings."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluster import storage
from cluster.errors import UserError
from trainers.recipe import TextEncoder

PACKAGE_SCHEME = "package://"


def load_text_encoder(settings: TextEncoder) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder of any BERT-style model, in eval mode and without gradients.

    `settings.pretrained` is a hub id ("emilyalsentzer/Bio_ClinicalBERT"), a folder, an s3:// prefix or
    package://NAME/FOLDER. Raises UserError when there is no such model or it reads fewer tokens than asked.
    """
    with _as_folder_or_hub_id(settings.pretrained) as source:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            encoder = AutoModel.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"text_encoder.pretrained: cannot load '{settings.pretrained}': {str(error).splitlines()[0]}"
            ) from None
    longest = getattr(encoder.config, "max_position_embeddings", settings.max_tokens)
    if settings.max_tokens > longest:
        raise UserError(f"text_encoder.max_tokens {settings.max_tokens}: '{settings.pretrained}' reads {longest}")
    # Kept with the tokenizer, so that a saved pipeline pads exactly as training did.
    tokenizer.model_max_length = settings.max_tokens
    return tokenizer, encoder.eval().requires_grad_(False)


def tokenize(tokenizer: Any, captions: list[str]) -> Any:
    """Token ids and attention mask, int64 [B, L], cut and padded to the tokenizer's model_max_length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")


@contextmanager
def _as_folder_or_hub_id(pretrained: str) -> Iterator[str]:
    if pretrained.startswith(PACKAGE_SCHEME):
        package, _, folder = pretrained.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(
                f"text_encoder.pretrained: the package '{package}' is not installed; try pip install {package}"
            )
        yield str(Path(spec.origin).parent / folder)
    elif storage.is_remote(pretrained):
        with storage.local_folder(pretrained) as path:
            yield str(path)
    else:
        yield pretrained
