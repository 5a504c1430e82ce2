"""The published architecture of FLUX.1's transformer, for planning and benchmarks without its weights."""

from collections.abc import Mapping
from typing import Any

FLUX_1_DEV: Mapping[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_1_SCHNELL: Mapping[str, Any] = {**FLUX_1_DEV, "guidance_embeds": False}
