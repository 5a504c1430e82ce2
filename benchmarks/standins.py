"""Stand-ins for weights that need a download: right in shape and file layout, random in content."""

import string
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel, BertTokenizer


def write_text_encoder(folder: Path, **config: Any) -> Path:
    """A BERT with random weights and a tokenizer of letters, as transformers saves them; BERT's own size by default."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "intermediate_size": 64} if config else {}
    BertModel(BertConfig(**heads, **config)).save_pretrained(folder)
    return folder
