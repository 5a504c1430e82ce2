"""GPUs that training runs on, as far as planning needs to know them."""

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import UserError, did_you_mean

if TYPE_CHECKING:  # whoever only looks up a GPU need not wait for it
    import torch

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in a machine that is usual for it."""

    name: str  # as `medsynth plan --gpu` knows it
    product: str
    memory_bytes: int  # what a process can take, which is less than what is sold
    peak_flops: float  # bf16 FLOP/s by the data sheet, dense
    memory_bandwidth: float  # bytes/s
    bus: float  # bytes/s that one GPU sends to the others of its machine, while it receives as many
    network: float  # bytes/s that one GPU sends to other machines
    host_bus: float  # bytes/s between one GPU and host memory
    gpus_per_host: int = 8

    @property
    def matmul_flops(self) -> float:
        """FLOP/s of a large bf16 matrix product."""
        return self.peak_flops * MATMUL_SHARE


# Share of the data sheet's dense bf16 FLOP/s that a large matrix product reaches: 790 of 989 TFLOP/s measured on one
# H200; taken for the others too, which were not measured.
MATMUL_SHARE = 790 / 989

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "NVIDIA A100 80GB SXM", 79 * GIB, 312e12, 2.0e12, 300e9, 25e9, 25e9),
        Gpu("h100", "NVIDIA H100 80GB SXM", 78 * GIB, 989e12, 3.35e12, 450e9, 50e9, 50e9),
        Gpu("h200", "NVIDIA H200 141GB SXM", 139 * GIB, 989e12, 4.3e12, 450e9, 50e9, 50e9),
        Gpu("b200", "NVIDIA B200 SXM", 180 * 10**9, 2250e12, 8.0e12, 900e9, 50e9, 50e9),
        Gpu("l40s", "NVIDIA L40S", int(44.4 * GIB), 362e12, 0.864e12, 25e9, 12.5e9, 25e9),
    )
}
"""Measured on one H200: memory, memory bandwidth; on one H100: memory. All else is NVIDIA's: the data
sheets of A100 80GB, H100, H200, HGX B200 and L40S, bf16 without sparsity, half of NVLink's two-way figure as the bus
(the L40S has PCIe 4 x16 alone, of which some 25 GB/s arrive). Memory of A100 and L40S as PyTorch's out-of-memory
messages give it. Networks are what the usual machines bring: one 400 Gb/s port a GPU for H100 and newer (DGX H100),
one 200 Gb/s port for the A100 (DGX A100), 100 Gb/s for the L40S."""


def gpu_named(name: str) -> Gpu:
    """Raises UserError, with the names there are, for an unknown one."""
    if gpu := GPUS.get(name.lower()):
        return gpu
    known = "; ".join(f"{gpu.name} ({gpu.product}, {gpu.memory_bytes / GIB:.0f} GiB)" for gpu in GPUS.values())
    raise UserError(f"--gpu {name}: {did_you_mean(name.lower(), GPUS)}there are {known}")


def gpu_of_type(accelerator_type: str | None) -> Gpu | None:
    """The GPU that Ray calls so (A100, A100-80G, H200, ...), or None if it is not known."""
    if accelerator_type is None or accelerator_type.endswith("40G"):
        return None
    return GPUS.get(accelerator_type.lower().removesuffix("-80g"))


def gpu_here() -> Gpu | None:
    """This machine's first GPU with the memory it really has, or None if it has none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    words = properties.name.lower().replace("-", " ").split()
    # An unknown GPU is taken for the A100, the slowest of the large ones: its memory is known, which decides.
    like = next((gpu for gpu in GPUS.values() if gpu.name in words), GPUS["a100"])
    return replace(like, product=properties.name, memory_bytes=properties.total_memory)


def peak_flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """What a device can do at most, in FLOP/s: a GPU by its data sheet in bf16, as utilisation is published; a CPU, and
    a GPU that is not known, by the product of two large matrices in `dtype`, measured."""
    import torch

    if device.type == "cuda" and (gpu := gpu_here()) and gpu.name in torch.cuda.get_device_name(device).lower():
        return gpu.peak_flops
    return matmul_flops(device, dtype, side=1024 if device.type == "cpu" else 8192)


def matmul_flops(device: "torch.device", dtype: "torch.dtype", *, side: int) -> float:
    """FLOP/s of the product of two matrices [side, side], the fastest of a few."""
    import torch

    # Of noise: a GPU is limited by its power, of which equal numbers take less. An A100 does 257 TFLOP/s of noise, of
    # zeros 295 (thonking.ai/p/strangely-matrix-multiplications). Some in a row, so that starting them is hidden.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(side, side, dtype=dtype, device=device, generator=generator)
    repeats = 5 if device.type == "cuda" else 1
    fastest = math.inf
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(repeats):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, (time.perf_counter() - began) / repeats)
    return 2 * side**3 / fastest
