"""How fast does one GPU train FLUX.1-dev's transformer? Real training steps, variant by variant.

    python -m benchmarks.flux_step                                        # on a GPU, from the repository's root
    python -m benchmarks.flux_step --device cpu --tiny --out tiny.json    # a rehearsal, in a minute

The true 11.9 B transformer with random weights, in bf16, with this project's objective: forward, backward, clipping,
optimizer. "stock" is how diffusers' users train it: eager, full gradient checkpointing, 8-bit AdamW. Each other variant
changes something by name. One that fails (out of memory, not installed) is a row like any other. The file is written
anew after each row, so a run that is cut off keeps what it measured.

Needs torch and diffusers; with bitsandbytes and torchao more variants run. Nothing is downloaded.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.circumstances import RESULTS, circumstances
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.flux.architecture import FLUX_1_DEV
from trainers.flux.checkpointing import CheckpointingMode, set_activation_checkpointing
from trainers.flux.footprint import PIXELS_PER_LATENT, footprint
from trainers.hardware import matmul_flops
from trainers.objectives import RectifiedFlowObjective

GIB = 2**30
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01

PARAMETERS = 11_901_408_320
ACTIVATIONS_BYTES = 8 * GIB  # with full checkpointing, and what else a step needs beside the states

TINY = {
    **FLUX_1_DEV,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Variant:
    """One way to take a step; the defaults are stock's."""

    name: str
    resolution: int = 512
    micro_batch: int = 4
    checkpointing: CheckpointingMode = "full"
    optimizer: Literal["adamw-8bit", "adamw-bf16", "adamw-bf16-stochastic"] = "adamw-8bit"
    update_in_backward: bool = False
    """Each weight is updated as soon as its gradient is there, so gradients never live together. The norm is then not
    known in time: gradients are clipped by the norm of the step before."""
    compile: bool = False
    """torch.compile of each block; without checkpointing, it computes cheap activations again by itself."""
    memory_budget: float = 1.0
    """Share of the activations that a compiled block may keep (torch._functorch.config.activation_memory_budget)."""
    attention: Literal["default", "cudnn", "flash", "efficient"] = "default"
    fused_qkv: bool = False
    fp8: bool = False
    """Matrix products of the blocks' projections in fp8 (torchao.float8, scales by tensor)."""


@dataclass(frozen=True)
class Setting:
    """What all variants of a run share."""

    device: torch.device
    config: Mapping[str, Any]
    tokens: int
    warmup: int
    steps: int
    learning_rate: float
    compile_backend: str


def stock_and_ours() -> tuple[Variant, Variant]:
    """Without bitsandbytes, stock's moments are plain bf16."""
    stock = Variant("stock", optimizer="adamw-8bit" if has_package("bitsandbytes") else "adamw-bf16")
    ours = Variant(
        "ours",
        checkpointing="none",
        compile=True,
        optimizer="adamw-bf16-stochastic",
        update_in_backward=True,
    )
    return stock, ours


def has_package(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def variants(memory_bytes: float) -> Iterator[Variant]:
    """The most telling first: a run may be cut off."""
    has_8bit = has_package("bitsandbytes")
    stock, ours = stock_and_ours()
    yield stock
    yield ours
    yield replace(ours, name="ours batch 8", micro_batch=8)
    yield replace(stock, name="stock batch 8", micro_batch=8)
    yield replace(stock, name="stock at 1024", resolution=1024, micro_batch=1)
    yield replace(ours, name="ours at 1024", resolution=1024, micro_batch=1)
    yield replace(ours, name="ours at 1024 batch 2", resolution=1024, micro_batch=2)
    # One lever at a time: against stock, or where gradients and all do not fit, against what does.
    base = stock
    yield (updating := replace(stock, name="stock + update in backward", update_in_backward=True))
    if (6 if has_8bit else 8) * PARAMETERS + ACTIVATIONS_BYTES > memory_bytes:
        base = updating
    yield replace(base, name=f"{base.name} + compile", compile=True)
    yield replace(base, name=f"{base.name} + selective checkpointing", checkpointing="selective")
    yield replace(base, name=f"{base.name} + no checkpointing", checkpointing="none")
    yield replace(base, name=f"{base.name} + cudnn attention", attention="cudnn")
    yield replace(base, name=f"{base.name} + flash attention", attention="flash")
    yield replace(base, name=f"{base.name} + efficient attention", attention="efficient")
    yield replace(base, name=f"{base.name} + fused qkv", fused_qkv=True)
    yield replace(base, name=f"{base.name} + bf16 states rounded stochastically", optimizer="adamw-bf16-stochastic")
    if has_8bit:
        yield replace(base, name=f"{base.name} + bf16 states rounded to nearest", optimizer="adamw-bf16")
    # And on top of ours.
    yield replace(ours, name="ours + fp8 batch 8", micro_batch=8, fp8=True)
    yield replace(ours, name="ours + cudnn attention batch 8", micro_batch=8, attention="cudnn")
    yield replace(ours, name="ours + fused qkv batch 8", micro_batch=8, fused_qkv=True)
    yield replace(ours, name="ours with half of the activations batch 12", micro_batch=12, memory_budget=0.5)
    full = replace(ours, checkpointing="full")
    yield replace(full, name="ours + full checkpointing batch 16", micro_batch=16)
    yield replace(stock, name="stock batch 16", micro_batch=16)
    yield replace(stock, name="stock batch 1", micro_batch=1)
    yield replace(stock, name="stock at 1024 batch 4", resolution=1024, micro_batch=4)
    yield replace(full, name="ours + full checkpointing at 1024 batch 4", resolution=1024, micro_batch=4)


def rehearsed(chosen: Iterable[Variant]) -> list[Variant]:
    """Small enough for a CPU, without those that differ in size alone."""
    seen: dict[Variant, Variant] = {}
    for variant in chosen:
        small = replace(variant, resolution=variant.resolution // 16, micro_batch=min(variant.micro_batch, 2))
        seen.setdefault(replace(small, name=""), small)
    return list(seen.values())


# --- one variant ---


def measure(variant: Variant, setting: Setting) -> dict[str, float | bool | None]:
    """Train on one repeated batch and time the steps after the warm-up."""
    cuda = setting.device.type == "cuda"
    torch.manual_seed(0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    transformer = build_transformer(setting)
    prepare(transformer, variant, setting)
    step = training_step(transformer, variant, setting)
    batch = make_batch(variant, setting)
    with attention_of(variant):
        losses = [step(batch) for _ in range(setting.warmup)]
        synchronize(setting.device)
        started = time.perf_counter()
        losses += [step(batch) for _ in range(setting.steps)]
        synchronize(setting.device)
    seconds = (time.perf_counter() - started) / setting.steps
    first, last = float(losses[0]), float(losses[-1])
    return {
        "seconds_per_step": seconds,
        "images_per_second": variant.micro_batch / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if cuda else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if cuda else None,
        "loss_first": first,
        "loss_last": last,
        "loss_falls": last < first,
    }


def build_transformer(setting: Setting) -> FluxTransformer2DModel:
    """With random weights in bf16, made on the device itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with setting.device:
            transformer: FluxTransformer2DModel = FluxTransformer2DModel.from_config(dict(setting.config))
    finally:
        torch.set_default_dtype(before)
    return transformer.train()


def prepare(transformer: FluxTransformer2DModel, variant: Variant, setting: Setting) -> None:
    """Put the variant's changes to the model in place, in the order in which they stand on each other."""
    if variant.fused_qkv:
        fuse_qkv(transformer)
    if variant.fp8:
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(transformer, module_filter_fn=_is_large_projection)
    set_activation_checkpointing(transformer, variant.checkpointing)
    if variant.compile:
        torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = variant.memory_budget
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=setting.compile_backend)


def fuse_qkv(transformer: FluxTransformer2DModel) -> None:
    """One product for query, key and value. Diffusers keeps the three it replaces; they must not take memory."""
    transformer.fuse_qkv_projections()
    for module in transformer.modules():
        if getattr(module, "fused_projections", False):
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if hasattr(module, name):
                    delattr(module, name)


def _is_large_projection(module: nn.Module, name: str) -> bool:
    """Modulations see one token an image and stay in bf16, as do the embedders and the last layer."""
    return isinstance(module, nn.Linear) and "transformer_blocks." in name and "norm" not in name


def training_step(
    transformer: FluxTransformer2DModel, variant: Variant, setting: Setting
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """A function that takes one step on a batch and returns the loss, without waiting for the device."""
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    objective = RectifiedFlowObjective()
    if variant.update_in_backward:
        fused = UpdateInBackward(parameters, updater(variant, parameters, setting))

        def step_in_backward(batch: Mapping[str, Tensor]) -> Tensor:
            loss = objective(transformer, **batch).mean()
            loss.backward()
            fused.end_step()
            return loss.detach()

        return step_in_backward

    optimizer = make_optimizer(variant, parameters, setting)

    def step(batch: Mapping[str, Tensor]) -> Tensor:
        loss = objective(transformer, **batch).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def make_optimizer(variant: Variant, parameters: list[nn.Parameter], setting: Setting) -> torch.optim.Optimizer:
    learning_rate = setting.learning_rate
    if variant.optimizer == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
        return optimizer
    if variant.optimizer == "adamw-bf16":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    return Bf16AdamW(
        parameters,
        learning_rate=learning_rate,
        weight_decay=WEIGHT_DECAY,
        compile_backend=setting.compile_backend,
    )


def updater(variant: Variant, parameters: list[nn.Parameter], setting: Setting) -> Callable[[nn.Parameter], None]:
    """A function that updates one parameter by its gradient."""
    if variant.optimizer == "adamw-bf16-stochastic":
        optimizer = make_optimizer(variant, parameters, setting)
        assert isinstance(optimizer, Bf16AdamW)
        return optimizer.update
    optimizers = {parameter: make_optimizer(variant, [parameter], setting) for parameter in parameters}
    return lambda parameter: optimizers[parameter].step()


class UpdateInBackward:
    """Clips, updates and frees each gradient as it comes."""

    def __init__(self, parameters: Iterable[nn.Parameter], update: Callable[[nn.Parameter], None]) -> None:
        self._update = update
        parameters = list(parameters)
        device = parameters[0].device
        self._squares = torch.zeros((), device=device)
        self._factor = torch.ones((), device=device)  # by which this step's gradients are clipped
        # Hooks live in C++, where the garbage collector does not see that they and the weights keep each other alive.
        me = weakref.ref(self)

        def on_gradient(parameter: Tensor) -> None:
            if (updating := me()) is not None:
                updating._on_gradient(parameter)

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(on_gradient)

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._squares += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
        parameter.grad.mul_(self._factor)
        self._update(parameter)  # type: ignore[arg-type]
        parameter.grad = None

    def end_step(self) -> None:
        self._factor.copy_((MAX_GRAD_NORM / (self._squares.sqrt() + 1e-6)).clamp(max=1))
        self._squares.zero_()


def make_batch(variant: Variant, setting: Setting) -> dict[str, Tensor]:
    """The objective's arguments, the same for each variant of a resolution and batch."""
    size, side, device = variant.micro_batch, variant.resolution // PIXELS_PER_LATENT, setting.device
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    channels = setting.config["in_channels"] // 4
    return {
        "latents": normal(size, channels, side, side),
        "noise": normal(size, channels, side, side),
        "sigmas": normal(size).sigmoid(),
        "prompt_embeds": normal(size, setting.tokens, setting.config["joint_attention_dim"]).bfloat16(),
        "pooled_prompt_embeds": normal(size, setting.config["pooled_projection_dim"]).bfloat16(),
        "guidance": torch.ones(size, device=device),
    }


def attention_of(variant: Variant) -> AbstractContextManager[Any]:
    return nullcontext() if variant.attention == "default" else sdpa_kernel(ATTENTION[variant.attention])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- the run ---


class Record:
    """Rows of measured variants, and what they are compared with."""

    def __init__(self, setting: Setting, *, ceiling: float) -> None:
        self._setting = setting
        self._ceiling = ceiling
        self.document: dict[str, Any] = {
            "matmul_tflops": ceiling / 1e12,
            "forward_tflop_per_image": {},
            "rows": [],
        }

    def add(self, variant: Variant) -> dict[str, Any]:
        """Measure a variant; its row."""
        counted = footprint(
            self._setting.config,
            resolution=variant.resolution,
            max_tokens=self._setting.tokens,
            checkpointing="none",
        )
        self.document["parameters"] = counted.parameters
        self.document["forward_tflop_per_image"][str(variant.resolution)] = counted.forward_flops / 1e12
        row = asdict(variant) | attempt(variant, self._setting)
        if row["status"] == "ok":
            # Forward and twice that backward; what is computed again is no result and not counted.
            row["model_tflops"] = 3 * counted.forward_flops * row["images_per_second"] / 1e12
            row["share_of_matmul"] = row["model_tflops"] * 1e12 / self._ceiling
        self.document["rows"].append(row)
        return row


def run(chosen: list[Variant], setting: Setting, out: Path, *, arguments: dict[str, Any], max_seconds: float) -> None:
    """Measure the variants in order until the time is up, writing the file and a line of the table after each."""
    started = time.perf_counter()
    here = circumstances(setting.device.type)
    side = 8192 if setting.device.type == "cuda" else 256
    ceiling = matmul_flops(setting.device, torch.bfloat16, side=side)
    record = Record(setting, ceiling=ceiling)
    heading = {"benchmark": "flux_step", **here, "arguments": arguments}
    print(f"{here['machine']['device']}: bf16 matrix product {ceiling / 1e12:.1f} TFLOP/s", flush=True)
    print(
        f"{'variant (resolution, batch)':64} {'images/s':>9} {'TFLOP/s':>8} {'of ceiling':>10} {'GiB':>7}  loss",
        flush=True,
    )
    for number, variant in enumerate(chosen):
        if time.perf_counter() - started > max_seconds:
            print(f"--max-seconds {max_seconds:g} are over; {len(chosen) - number} variants are left")
            break
        row = record.add(variant)
        write(heading | record.document | {"finished": number + 1 == len(chosen)}, out)
        print(as_line(row), flush=True)
    print(f"written to {out}")


def attempt(variant: Variant, setting: Setting) -> dict[str, Any]:
    """The variant's measurements, or why there are none."""
    started = time.perf_counter()
    try:
        result = {"status": "ok", **measure(variant, setting)}
    except Exception as error:  # whatever stops one variant must not stop the others
        result = {"status": "failed", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    # Here and not in the handler, where the error would still hold the model.
    torch._dynamo.reset()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return result | {"wall_seconds": time.perf_counter() - started}


def write(record: Mapping[str, Any], out: Path) -> None:
    """Whole or not at all: a run may be ended at any time."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    part.replace(out)


def as_line(row: Mapping[str, Any]) -> str:
    name = f"{row['name']} ({row['resolution']}, {row['micro_batch']})"
    if row["status"] != "ok":
        return f"{name:64} {row['error'][:100]}"
    memory = f"{row['peak_memory_gib']:7.1f}" if row["peak_memory_gib"] else f"{'':7}"
    return (
        f"{name:64} {row['images_per_second']:9.2f} {row['model_tflops']:8.1f} {row['share_of_matmul']:10.1%} {memory}"
        f"  {row['loss_first']:.4f} -> {row['loss_last']:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flux_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a transformer of some thousand weights, to rehearse")
    parser.add_argument("--out", type=Path, help="JSON file; on a GPU a dated one in benchmarks/results by default")
    parser.add_argument("--variants", help="comma-separated parts of names, such as 'ours at,stock at'")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed ones")
    parser.add_argument("--max-seconds", type=float, default=3600, help="begin no variant after this many")
    arguments = parser.parse_args()

    is_cpu = arguments.device == "cpu"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("it measures one GPU: start it with one process")
    if not is_cpu and not arguments.list and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny --out FILE rehearses")
    if is_cpu and not arguments.tiny:
        parser.error("--device cpu needs --tiny: the whole transformer would take a CPU hours")
    if is_cpu and (arguments.out is None or RESULTS in arguments.out.resolve().parents):
        parser.error("--device cpu needs --out, elsewhere than in benchmarks/results: it measures nothing")

    on_gpu = torch.cuda.is_available() and not is_cpu
    chosen = list(variants(torch.cuda.get_device_properties(0).total_memory if on_gpu else math.inf))
    if arguments.variants:
        parts = [part.strip() for part in arguments.variants.split(",")]
        chosen = [variant for variant in chosen if any(part in variant.name for part in parts)]
    if not chosen:
        parser.error(f"--variants {arguments.variants}: none is named so; --list names them")
    if arguments.list:
        print("\n".join(variant.name for variant in chosen))
        return

    tiny = arguments.tiny
    setting = Setting(
        device=torch.device(arguments.device),
        config=TINY if tiny else FLUX_1_DEV,
        tokens=8 if tiny else 512,
        warmup=arguments.warmup,
        steps=arguments.steps,
        learning_rate=1e-3 if tiny else 1e-4,
        compile_backend="eager" if tiny else "inductor",
    )
    out = arguments.out or default_out()
    run(
        rehearsed(chosen) if tiny else chosen,
        setting,
        out,
        arguments=vars(arguments) | {"out": out.name},
        max_seconds=arguments.max_seconds,
    )


def default_out() -> Path:
    gpu = torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")
    return RESULTS / f"flux_step-{gpu}-{datetime.now(UTC):%Y%m%d-%H%M}.json"


if __name__ == "__main__":
    main()
