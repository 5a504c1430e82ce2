"""The frozen text encoder: captions to token embeddings."""

from typing import Any

from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cluster.errors import UserError
from cluster.weights import local_weights
from trainers.recipe import TextEncoder

# Bio_ClinicalBERT was published as a .bin, which transformers reads without running what a pickle may hold.
FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin")


def load_text_encoder(settings: TextEncoder) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder of any BERT-style model, in eval mode and without gradients.

    `settings.pretrained` is a hub id ("emilyalsentzer/Bio_ClinicalBERT"), a folder, an s3:// prefix or
    package://NAME/FOLDER. Raises UserError when there is no such model or it reads fewer tokens than asked.
    """
    try:
        with local_weights(settings.pretrained, FILES) as folder:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            encoder = AutoModel.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"text_encoder.pretrained: {error}") from None
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
