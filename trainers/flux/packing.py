"""FLUX's tokens: 2 x 2 blocks of latents, and where each stands.

B batch, C latent channels, h w latent height and width, N = (h/2)(w/2) image tokens, L prompt tokens.
"""

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> packed_latents [B, N, 4C]; einops: b c (h p) (w q) -> b (h w) (c p q), p = q = 2."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(packed_latents: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` x `width`."""
    batch, _, channels = packed_latents.shape
    blocks = packed_latents.view(batch, height // 2, width // 2, channels // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """Rotary positions [N, 3] of the image tokens of latents `height` x `width`: (0, row, column)."""
    rows, columns = height // 2, width // 2
    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)[None, :]
    return ids.reshape(rows * columns, 3)


def prompt_ids(tokens: int, like: Tensor) -> Tensor:
    """Rotary positions [L, 3] of prompt tokens: all zero, for T5 has told them apart already."""
    return torch.zeros(tokens, 3, device=like.device, dtype=like.dtype)
