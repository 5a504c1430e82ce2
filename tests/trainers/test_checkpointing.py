from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from trainers.flux.checkpointing import CheckpointingMode, set_activation_checkpointing
from trainers.objectives import RectifiedFlowObjective

MODES = get_args(CheckpointingMode)


def tiny_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def loss_of(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of two images, 16 + 6 tokens each; `dtype` is the transformer's."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    inputs = {
        "latents": draw(4, 8, 8),
        "noise": draw(4, 8, 8),
        "sigmas": draw().sigmoid(),
        "prompt_embeds": draw(6, 32).to(dtype),
        "pooled_prompt_embeds": draw(16).to(dtype),
        "guidance": torch.ones(2),
    }
    return RectifiedFlowObjective()(transformer, **inputs).mean()


def loss_and_gradients(mode: CheckpointingMode) -> tuple[float, dict[str, Tensor]]:
    transformer = tiny_transformer()
    set_activation_checkpointing(transformer, mode)
    loss = loss_of(transformer)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}


@contextmanager
def zero3_linear() -> Iterator[None]:
    """Linear layers as DeepSpeed's ZeRO-3 replaces them."""
    original = functional.linear
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = original


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("under_zero3", [False, True])
def test_losses_and_gradients_are_those_without_checkpointing(mode: CheckpointingMode, under_zero3: bool) -> None:
    expected_loss, expected = loss_and_gradients("none")
    if under_zero3:
        with zero3_linear():
            loss, gradients = loss_and_gradients(mode)
    else:
        loss, gradients = loss_and_gradients(mode)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    assert len(expected) > 50
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_mode_can_be_changed_back() -> None:
    transformer = tiny_transformer()
    set_activation_checkpointing(transformer, "full")
    set_activation_checkpointing(transformer, "none")
    assert not transformer.gradient_checkpointing


def bytes_autograd_saves(mode: CheckpointingMode) -> int:
    """Of distinct storages that the forward pass hands to autograd, weights apart."""
    transformer = tiny_transformer()
    set_activation_checkpointing(transformer, mode)
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(transformer)
    return sum(storage.nbytes() for storage in saved.values())


def test_full_saves_far_less_than_none() -> None:
    assert bytes_autograd_saves("full") < bytes_autograd_saves("none") / 5
