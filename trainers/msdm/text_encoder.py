"""The frozen text encoder: captions to token embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from cluster.errors import UserError
from cluster.weights import file_names, local_weights
from trainers.recipe import TextEncoder

if TYPE_CHECKING:  # a launcher checks encoders and runs none
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = ("*.json", "*.txt", "*.model")
# Bio_ClinicalBERT was published as a .bin, which transformers reads without running what a pickle may hold.
WEIGHTS = ("*.safetensors", "*.bin")


def check_text_encoder(settings: TextEncoder) -> None:
    """Raises UserError for what `load_text_encoder` would, but reads no weights: that they are there is enough."""
    with _blaming(settings):
        with local_weights(settings.pretrained, DESCRIPTION) as folder:
            config = AutoConfig.from_pretrained(folder)
            _open_tokenizer(folder)
        if not file_names(settings.pretrained, WEIGHTS):
            raise UserError(f"'{settings.pretrained}' has no weights: needed is {' or '.join(WEIGHTS)}")
    _check_length(settings, config)


def load_text_encoder(settings: TextEncoder) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel]":
    """Tokenizer and encoder of any BERT-style model, in eval mode and without gradients.

    `settings.pretrained` is a hub id ("emilyalsentzer/Bio_ClinicalBERT"), a folder, an s3:// prefix or
    package://NAME/FOLDER. Raises UserError when there is no such model or it reads fewer tokens than asked.
    """
    from transformers import AutoModel

    with _blaming(settings), local_weights(settings.pretrained, (*DESCRIPTION, *WEIGHTS)) as folder:
        tokenizer = _open_tokenizer(folder)
        encoder = AutoModel.from_pretrained(folder)
    _check_length(settings, encoder.config)
    # Kept with the tokenizer, so that a saved pipeline pads exactly as training did.
    tokenizer.model_max_length = settings.max_tokens
    return tokenizer, encoder.eval().requires_grad_(False)


def load_tokenizer(settings: TextEncoder) -> "PreTrainedTokenizerBase":
    """The tokenizer alone. Raises UserError when there is none."""
    with _blaming(settings), local_weights(settings.pretrained, DESCRIPTION) as folder:
        return _open_tokenizer(folder)


def _open_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Raises ValueError where the vocabulary's file is not there: transformers would take every word for unknown."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError("it has no vocabulary: needed is tokenizer.json, or vocab.txt and the like")
    return tokenizer


@contextmanager
def _blaming(settings: TextEncoder) -> Iterator[None]:
    """Raises UserError that names the key at fault."""
    try:
        yield
    except UserError as error:
        raise UserError(f"text_encoder.pretrained: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"text_encoder.pretrained: cannot load '{settings.pretrained}': {str(error).splitlines()[0]}"
        ) from None


def _check_length(settings: TextEncoder, config: Any) -> None:
    longest = getattr(config, "max_position_embeddings", settings.max_tokens)
    if settings.max_tokens > longest:
        raise UserError(f"text_encoder.max_tokens {settings.max_tokens}: '{settings.pretrained}' reads {longest}")


def tokenize(tokenizer: Any, captions: list[str]) -> Any:
    """Token ids and attention mask, int64 [B, L], cut and padded to the tokenizer's model_max_length."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
