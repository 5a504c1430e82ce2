"""What a FLUX run takes: bytes on a GPU, on its host and on disk, and seconds.

Model states follow from what the engines keep. Time is an estimate, whose assumptions stand here as constants.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trainers.flux.footprint import Footprint
from trainers.hardware import GIB, Gpu
from trainers.recipe import FluxRecipe

# Share of the matrix product's speed that a whole pass reaches. Assumed: dense language models of this size are
# published at about 400 of 790 TFLOP/s on an H100 (NVIDIA NeMo AutoModel, performance summary).
ACHIEVED_SHARE = 0.5
HOST_MEMORY_BANDWIDTH = 200e9  # bytes/s of one machine; assumed

# Bytes a parameter that one step under ZeRO-3 reads and writes once the gradients are there: counted operation by
# operation on a CPU (tests/trainers/test_zero3.py). Of bf16 states the compiled update takes 14, of fp32 states torch's
# fused AdamW 28; the rest is DeepSpeed's norm, clipping and copies.
ZERO3_STEP_BYTES = {"bf16": 44, "fp32": 70}
AVERAGE_STEP_BYTES = 12  # of the moving average, on top

# Beside what is counted, in each GPU: CUDA's context and kernels, NCCL's buffers; and what the allocator wastes.
CONTEXT_BYTES = 2 * GIB
ALLOCATOR_SHARE = 0.03
HOST_BYTES_PER_PROCESS = 6 * GIB  # Python, CUDA and libraries about 4 GiB, prompt embeddings at most 2
AUTOENCODER_BYTES = 83_819_683 * 4  # FLUX.1's, which previews decode with; parameters in fp32

# Under autocast (engine ddp with bf16), layer norms keep their input and result in fp32 too. By count of what a block
# keeps; not measured.
AUTOCAST_SHARE = 1.2

# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py).
ZERO3_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}

When = Literal["always", "pass", "update"]


@dataclass(frozen=True)
class Part:
    """Something that takes memory; `pass` is the forward and backward pass, `update` the optimizer's step after it."""

    what: str
    gpu_bytes: float
    when: When = "always"
    host_bytes: float = 0  # of one rank


def parts_of(recipe: FluxRecipe, counted: Footprint, gpu: Gpu) -> Iterator[Part]:
    """All that takes memory on one GPU."""
    yield from _zero3_parts(recipe, counted) if recipe.transformer.engine == "zero3" else _ddp_parts(recipe, counted)
    yield Part("autoencoder, for previews", AUTOENCODER_BYTES)
    yield Part("CUDA, NCCL and the allocator's waste", CONTEXT_BYTES + ALLOCATOR_SHARE * gpu.memory_bytes)


def _zero3_parts(recipe: FluxRecipe, counted: Footprint) -> Iterator[Part]:
    """ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054, Sec. 5): every state cut evenly over the ranks.

    In bf16 with fp32 states that is 18 bytes a parameter as DeepSpeed counts, too: weights 2, gradients 4 (fp32, for
    they are accumulated), master weights and Adam's two moments 12. An update handles `sub_group_size` parameters at
    a time, with a copy of their gradients.
    """
    settings, num_gpus = recipe.transformer, recipe.cluster.min_workers
    share = -(-counted.parameters // num_gpus)
    low, high = _low_bytes(recipe), _state_bytes(recipe)
    elements = {key: _zero_key(recipe, key, default) for key, default in ZERO3_DEFAULTS.items()}
    host_states, host_weights = is_offloaded(recipe, "offload_optimizer"), is_offloaded(recipe, "offload_param")

    def states(what: str, nbytes: float, on_host: bool) -> Part:
        return Part(what, 0 if on_host else nbytes * share, host_bytes=nbytes * share if on_host else 0)

    yield states("weights", low, host_weights)
    if host_states:
        yield Part("gradients", 0, host_bytes=_pinned_bytes(recipe, high * share))
    else:
        yield states("gradients", high, False)
    yield states("master weights and Adam's moments", 3 * high, host_states)
    if settings.training.ema_decay:
        yield states("moving average", 4, host_states)
    yield Part("activations", settings.training.micro_batch_size * counted.peak_bytes, "pass")
    # A single rank uses its weights where they lie, unless they lie in host memory.
    if num_gpus > 1 or host_weights:
        live = elements["stage3_max_live_parameters"] + elements["stage3_prefetch_bucket_size"]
        yield Part("whole weights, gathered", low * min(counted.parameters, live), "pass")
    # The bucket, and a copy of it ordered by rank (deepspeed/runtime/comm/coalesced_collectives.py).
    bucket = min(counted.parameters, elements["reduce_bucket_size"])
    yield Part("gradients being reduced", 2 * low * bucket, "pass")
    group = min(share, elements["sub_group_size"])
    if host_states:  # a buffer for each group
        groups, rest = divmod(share, group)
        handed = groups * _pinned_bytes(recipe, high * group) + _pinned_bytes(recipe, high * rest)
        yield Part("gradients handed to Adam", 0, "update", host_bytes=handed)
    else:
        yield Part("gradients handed to Adam", high * group, "update")


def _ddp_parts(recipe: FluxRecipe, counted: Footprint) -> Iterator[Part]:
    """DistributedDataParallel: all of it on each rank, but only what is trained has gradients, moments and average."""
    training, low = recipe.transformer.training, _low_bytes(recipe)
    trained = 4 if recipe.transformer.lora else low  # adapters are fp32
    autocast = AUTOCAST_SHARE if training.precision == "bf16" else 1
    frozen = counted.parameters - counted.trainable
    yield Part("weights", low * frozen + trained * counted.trainable)
    yield Part("gradients", trained * counted.trainable)
    yield Part("Adam's moments", 2 * trained * counted.trainable)
    if training.ema_decay:
        yield Part("moving average", 4 * counted.trainable)
    yield Part("activations", autocast * training.micro_batch_size * counted.peak_bytes, "pass")


def checkpoint_bytes(recipe: FluxRecipe, counted: Footprint) -> float:
    """Weights in the optimizer's precision, both moments, and the average, of what is trained."""
    average = 4 if recipe.transformer.training.ema_decay else 0
    if recipe.transformer.engine == "zero3":
        return (3 * _state_bytes(recipe) + average) * counted.parameters
    trained = 4 if recipe.transformer.lora else _low_bytes(recipe)
    return (3 * trained + average) * counted.trainable


def _low_bytes(recipe: FluxRecipe) -> int:
    """Of a weight as it computes."""
    return 2 if recipe.transformer.training.precision == "bf16" else 4


def _state_bytes(recipe: FluxRecipe) -> int:
    """Of a master weight, of each moment and of an accumulated gradient under ZeRO-3."""
    return 2 if recipe.transformer.optimizer_states == "bf16" else 4


def _zero_key(recipe: FluxRecipe, key: str, default: int) -> int:
    value = recipe.transformer.deepspeed.get("zero_optimization", {}).get(key, default)
    return default if value == "auto" else int(value)


def _pinned_bytes(recipe: FluxRecipe, nbytes: int) -> int:
    """What a buffer for gradients takes of the host: pinned, as DeepSpeed has it unless told otherwise, the next power
    of two (PyTorch, ATen/core/CachingHostAllocator.h)."""
    block = recipe.transformer.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    return 1 << (nbytes - 1).bit_length() if nbytes and block.get("pin_memory", True) else nbytes


def is_offloaded(recipe: FluxRecipe, key: str) -> bool:
    block = recipe.transformer.deepspeed.get("zero_optimization", {}).get(key) or {}
    return bool(block.get("device", "none") != "none")


# --- time ---


def seconds_per_step(recipe: FluxRecipe, counted: Footprint, gpu: Gpu) -> float:
    """Passes one after another, each its computation plus its traffic, none of it hidden; then the update."""
    training, num_gpus = recipe.transformer.training, recipe.cluster.min_workers
    passes = training.global_batch_size // (training.micro_batch_size * num_gpus)
    flops = training.micro_batch_size * counted.pass_flops
    computing = flops / (gpu.matmul_flops * ACHIEVED_SHARE)
    bus = gpu.bus if num_gpus <= gpu.gpus_per_host else gpu.network
    moving = bytes_sent(recipe, counted) / bus
    if recipe.transformer.engine == "ddp":  # gradients are exchanged once a step
        return passes * computing + moving + update_seconds(recipe, counted, gpu)
    if is_offloaded(recipe, "offload_optimizer"):
        moving += _state_bytes(recipe) * counted.parameters / num_gpus / gpu.host_bus
    if is_offloaded(recipe, "offload_param"):
        moving += 2 * _low_bytes(recipe) * counted.parameters / num_gpus / gpu.host_bus
    return passes * (computing + moving) + update_seconds(recipe, counted, gpu)


def bytes_sent(recipe: FluxRecipe, counted: Footprint) -> float:
    """By one GPU: under ZeRO-3 in a pass, two gathers of the weights and one reduction of the gradients (Sec. 7.2.2);
    under DDP in a step, a ring's two rounds over the gradients."""
    num_gpus, low = recipe.cluster.min_workers, _low_bytes(recipe)
    others = (num_gpus - 1) / num_gpus
    if recipe.transformer.engine == "zero3":
        return 3 * low * counted.parameters * others
    return 2 * (4 if recipe.transformer.lora else low) * counted.trainable * others


def update_seconds(recipe: FluxRecipe, counted: Footprint, gpu: Gpu) -> float:
    """Clipping, AdamW and the average read and write the states, at the speed of the memory they are in."""
    settings, num_gpus = recipe.transformer, recipe.cluster.min_workers
    low = _low_bytes(recipe)
    if settings.engine == "ddp":
        touched = 2 * (low + 4 * _state_bytes(recipe) + (4 if settings.training.ema_decay else 0))
        return touched * counted.trainable / gpu.memory_bandwidth
    touched = ZERO3_STEP_BYTES[settings.optimizer_states]
    touched += AVERAGE_STEP_BYTES if settings.training.ema_decay else 0
    states = touched * counted.parameters / num_gpus
    if not is_offloaded(recipe, "offload_optimizer"):
        return states / gpu.memory_bandwidth
    ranks = min(num_gpus, gpu.gpus_per_host)
    weights_back = low * counted.parameters / num_gpus / gpu.host_bus
    return ranks * states / HOST_MEMORY_BANDWIDTH + weights_back
