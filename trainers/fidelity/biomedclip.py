"""BiomedCLIP (Zhang et al. 2023, 2303.00915) and its like, as open_clip saves them: a ViT of timm's and a BERT.

open_clip_config.json, open_clip_pytorch_model.bin or open_clip_model.safetensors, and the tokenizer's files. Sizes are
read off the weights, so no configuration of BERT is needed.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cluster.errors import UserError
from cluster.weights import local_weights
from trainers.fidelity.encoders import ImageTextEncoder
from trainers.fidelity.preprocessing import Preprocessing, ProcessorResize
from trainers.fidelity.state_dicts import load_into, read_file

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
FILES = ("*.json", "*.txt", *WEIGHTS)
HEAD_WIDTH = 64  # of both towers, in every ViT and BERT of open_clip's that is so named
UNUSED = ("logit_scale", "logit_bias", "text.transformer.embeddings.position_ids")


class Block(nn.Module):
    """Pre-norm attention and MLP (Dosovitskiy et al. 2020, eq. 2 and 3), names as in timm."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, mlp_dim), act=nn.GELU(), fc2=nn.Linear(mlp_dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y

    def _attention(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](x).unflatten(-1, (3, -1, HEAD_WIDTH))  # [B, N, 3, heads, width]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, width] each
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.attn["proj"](attended.transpose(1, 2).flatten(2))
        return y


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S] -> the class token after the last norm [B, D]."""

    def __init__(self, dim: int, mlp_dim: int, depth: int, patch: int, num_tokens: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.blocks = nn.Sequential(*(Block(dim, mlp_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)  # [B, N, D]
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        y: Tensor = self.norm(self.blocks(tokens)[:, 0])
        return y


class BiomedCLIP(ImageTextEncoder):
    """Both towers with their projections; features are not normalised."""

    def __init__(self, state: Mapping[str, Tensor], text_settings: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__()
        head = state["visual.head.proj.weight"]
        self.dim = len(head)
        self.visual = nn.ModuleDict(
            {"trunk": _vision_transformer(state), "head": nn.ModuleDict({"proj": _linear(head)})}
        )
        self.text = nn.ModuleDict({"transformer": _bert(state, tokenizer), "proj": _projection(state)})
        self._is_mean_pooled = text_settings["hf_pooler_type"] == "mean_pooler"
        self._tokenizer = tokenizer
        self._context_length = int(text_settings["context_length"])

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.visual["head"]["proj"](self.visual["trunk"](images))  # type: ignore[index]
        return y

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._context_length, return_tensors="pt"
        )
        ids = tokens.input_ids.to(next(self.parameters()).device)
        mask = (ids != self._tokenizer.pad_token_id).long()
        hidden = self.text["transformer"](input_ids=ids, attention_mask=mask).last_hidden_state  # [B, L, D]
        if self._is_mean_pooled:
            pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden[:, 0]
        y: Tensor = self.text["proj"](pooled)
        return y


def load_biomedclip(weights: str) -> tuple[BiomedCLIP, Preprocessing]:
    """Raises UserError if files are missing, or a tower is neither a ViT nor a BERT."""
    with local_weights(weights, FILES) as folder:
        config = _config(folder)
        file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"there is no {' or '.join(WEIGHTS)} in '{weights}'")
        state = read_file(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise UserError(f"its tokenizer cannot be read: {str(error).strip().splitlines()[0]}") from None
    try:
        network = BiomedCLIP(state, config["model_cfg"]["text_cfg"], tokenizer)
    except KeyError as error:
        raise UserError(f"the weights are of another layout: they lack {error}") from None
    load_into(network, state, unused=UNUSED)
    side = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    about = config.get("preprocess_cfg", {})
    statistics = {f"image_{name}": list(about[name]) for name in ("mean", "std") if name in about}
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **statistics
    )
    return network, ProcessorResize(processor)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
        text.setdefault("context_length", 77)  # open_clip's defaults
        text["hf_pooler_type"] = text.get("hf_pooler_type") or text.get("pooler_type", "mean_pooler")
    except FileNotFoundError:
        raise UserError(f"there is no {CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{CONFIG} is damaged, or of no model with a text tower: {error}") from None
    if not str(vision.get("timm_model_name")).startswith("vit_") or vision.get("timm_pool") not in ("", "token", None):
        raise UserError(f"{CONFIG}: only a timm vit_* with a class token is read, not {vision.get('timm_model_name')}")
    if text["hf_pooler_type"] not in ("mean_pooler", "cls_last_hidden_state_pooler"):
        raise UserError(f"{CONFIG}: hf_pooler_type '{text['hf_pooler_type']}' is not known here")
    return config


def _depth(state: Mapping[str, Tensor], layer: str) -> int:
    """How many layers there are, `layer` being a tensor of each with {} for its number."""
    return next(number for number in count() if layer.format(number) not in state)


def _vision_transformer(state: Mapping[str, Tensor]) -> VisionTransformer:
    _, num_tokens, dim = state["visual.trunk.pos_embed"].shape
    return VisionTransformer(
        dim=dim,
        mlp_dim=len(state["visual.trunk.blocks.0.mlp.fc1.weight"]),
        depth=_depth(state, "visual.trunk.blocks.{}.norm1.weight"),
        patch=state["visual.trunk.patch_embed.proj.weight"].shape[-1],
        num_tokens=num_tokens,
    )


def _bert(state: Mapping[str, Tensor], tokenizer: Any) -> BertModel:
    prefix = "text.transformer"
    vocab_size, dim = state[f"{prefix}.embeddings.word_embeddings.weight"].shape
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=_depth(state, prefix + ".encoder.layer.{}.output.dense.weight"),
        num_attention_heads=dim // HEAD_WIDTH,
        intermediate_size=len(state[f"{prefix}.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(state[f"{prefix}.embeddings.position_embeddings.weight"]),
        type_vocab_size=len(state[f"{prefix}.embeddings.token_type_embeddings.weight"]),
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertModel(config, add_pooling_layer=False)


def _projection(state: Mapping[str, Tensor]) -> nn.Module:
    """open_clip's "mlp" or "linear"."""
    if "text.proj.weight" in state:
        return _linear(state["text.proj.weight"])
    return nn.Sequential(_linear(state["text.proj.0.weight"]), nn.GELU(), _linear(state["text.proj.2.weight"]))


def _linear(weight: Tensor) -> nn.Linear:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
