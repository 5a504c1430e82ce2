"""What a training pass of FLUX's transformer takes: parameters, FLOPs and activation bytes, counted and not tabled.

Everything is counted on the meta device, where tensors have shapes but no storage, by running the true transformer,
objective and backward pass. Blocks of a kind are alike, so three blocks at most are run, and the rest is arithmetic.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainers.flux.checkpointing import CheckpointingMode, set_activation_checkpointing
from trainers.objectives import RectifiedFlowObjective

if TYPE_CHECKING:  # the benchmark counts with torch and diffusers alone
    from trainers.recipe import LoRA

PIXELS_PER_LATENT = 8  # along one side; FLUX.1's autoencoder


@dataclass(frozen=True)
class Footprint:
    """Of one image's forward and backward pass; activations and FLOPs grow in proportion to the images."""

    parameters: int
    trainable: int
    forward_flops: float
    pass_flops: float  # forward, backward, and what is computed again
    kept_bytes: float  # activations between forward and backward pass
    peak_bytes: float  # the most that is there at a time: what was kept and what a block needs while it runs backwards


def footprint(
    config: Mapping[str, Any],
    *,
    resolution: int,
    max_tokens: int,
    checkpointing: CheckpointingMode,
    lora: LoRA | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Footprint:
    """Count for a transformer of this config, gradients being handed on as they come, as ZeRO-3 does.

    Attention is counted as the flash kernel, which every supported GPU has: it keeps no L x L matrix.
    """
    frozen = tuple(sorted((key, tuple(v) if isinstance(v, list) else v) for key, v in config.items()))
    return _footprint(frozen, resolution, max_tokens, checkpointing, lora, dtype)


@lru_cache
def _footprint(
    config: tuple[tuple[str, Any], ...],
    resolution: int,
    max_tokens: int,
    checkpointing: CheckpointingMode,
    lora: LoRA | None,
    dtype: torch.dtype,
) -> Footprint:
    settings = dict(config)
    double, single = settings["num_layers"], settings["num_single_layers"]

    def count(double: int, single: int) -> _Pass:
        shallow = settings | {"num_layers": double, "num_single_layers": single}
        transformer = build_on_meta(shallow, lora, dtype)
        set_activation_checkpointing(transformer, checkpointing)
        return _count_pass(transformer, resolution=resolution, max_tokens=max_tokens)

    # Not from a model of double blocks alone: the last one's text tokens would be left out of its backward pass.
    base, one_more_double, one_more_single = count(1, 1), count(2, 1), count(1, 2)

    def whole(of: Callable[[_Pass], float], double: int = double, single: int = single) -> float:
        """A quantity that is linear in the numbers of blocks."""
        per_double, per_single = of(one_more_double) - of(base), of(one_more_single) - of(base)
        return of(base) + (double - 1) * per_double + (single - 1) * per_single

    # The most is there when the backward pass enters the last single block or, those done, the last double block.
    only_single, only_double = count(0, 1), count(1, 0)
    kept = whole(lambda p: p.kept_bytes)
    at_last_single = kept + only_single.peak_bytes - only_single.kept_bytes
    at_last_double = whole(lambda p: p.kept_bytes, single=0) + only_double.peak_bytes - only_double.kept_bytes
    return Footprint(
        parameters=int(whole(lambda p: p.parameters)),
        trainable=int(whole(lambda p: p.trainable)),
        forward_flops=whole(lambda p: p.forward_flops),
        pass_flops=whole(lambda p: p.pass_flops),
        kept_bytes=kept,
        peak_bytes=max(at_last_single, at_last_double),
    )


def build_on_meta(config: Mapping[str, Any], lora: LoRA | None, dtype: torch.dtype) -> FluxTransformer2DModel:
    """A transformer without storage; with adapters, all else is frozen."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(dict(config))
        if lora is not None:
            from peft import LoraConfig

            transformer.requires_grad_(False)
            adapters = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
            transformer.add_adapter(adapters)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    return transformer


@dataclass(frozen=True)
class _Pass:
    parameters: int
    trainable: int
    forward_flops: float
    pass_flops: float
    kept_bytes: int
    peak_bytes: int


def _count_pass(transformer: FluxTransformer2DModel, *, resolution: int, max_tokens: int) -> _Pass:
    parameters = list(transformer.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    inputs = _inputs(transformer, resolution, max_tokens)
    with _flash_attention(), Counter(ignore=parameters) as counter:
        loss = RectifiedFlowObjective()(transformer, **inputs).mean()
        forward_flops, kept_bytes = counter.flops, counter.bytes
        loss.backward()
    return _Pass(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        forward_flops=forward_flops,
        pass_flops=counter.flops,
        kept_bytes=kept_bytes,
        peak_bytes=counter.peak_bytes,
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _inputs(transformer: FluxTransformer2DModel, resolution: int, max_tokens: int) -> dict[str, Any]:
    """The objective's arguments for one image, on the transformer's device and in its precision."""
    config, parameter = transformer.config, next(transformer.parameters())
    side, device, dtype = resolution // PIXELS_PER_LATENT, parameter.device, parameter.dtype
    latents = torch.zeros(1, config.in_channels // 4, side, side, device=device)
    return {
        "latents": latents,
        "noise": torch.zeros_like(latents),
        "sigmas": torch.zeros(1, device=device),
        "prompt_embeds": torch.zeros(1, max_tokens, config.joint_attention_dim, device=device, dtype=dtype),
        "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim, device=device, dtype=dtype),
        "guidance": torch.ones(1, device=device) if config.guidance_embeds else None,
    }


class Counter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all storages that operations made and nobody has let go of."""

    def __init__(self, ignore: list[Tensor]) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(t.untyped_storage() for t in ignore)
        self._ignored = [tensor.untyped_storage() for tensor in ignore]  # held, so that the set above keeps them

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, nbytes: int) -> None:
        self.bytes -= nbytes


@contextmanager
def _flash_attention() -> Iterator[None]:
    """On the meta device PyTorch would choose attention that keeps the L x L matrix, which no GPU run does."""
    original = functional.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return output

    functional.scaled_dot_product_attention = flash  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
