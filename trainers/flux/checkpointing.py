"""Activation checkpointing: which activations of a FLUX block are kept for the backward pass, which computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

CheckpointingMode = Literal["none", "selective", "full"]

aten = torch.ops.aten
EXPENSIVE = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    # ZeRO-3's linear layer adds the bias in place to the product that was saved, so that the product is saved with its
    # bias; adding it once more when all else is computed again would be wrong, hence the sum counts as saved too.
    aten.add_.Tensor,
}


def set_activation_checkpointing(transformer: FluxTransformer2DModel, mode: CheckpointingMode) -> None:
    """Set what each block keeps between its forward and its backward pass; losses and gradients stay the same.

    none: everything that autograd asks for. full: the block's inputs alone, so it runs twice. selective: the inputs
    and the results of matrix products and attention, so only what is cheap (norms, activations, modulation) runs
    twice.
    """
    if mode == "none":
        transformer.disable_gradient_checkpointing()
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(
            create_selective_checkpoint_contexts, _keep_expensive, allow_cache_entry_mutation=True
        )

    def run_block(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(block.__call__, *inputs, **options)

    transformer.enable_gradient_checkpointing(run_block)


def _keep_expensive(context: object, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
