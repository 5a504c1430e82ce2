"""What a FLUX run will take in memory, time and money, before any GPU is taken; and if it does not fit, what would.

Parameters, FLOPs and activations are counted (trainers/flux/footprint.py); all else follows in trainers/estimates.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from cluster.errors import UserError
from cluster.nodes import Node
from cluster.terminal import plain
from trainers.estimates import (
    ACHIEVED_SHARE,
    HOST_BYTES_PER_PROCESS,
    Part,
    When,
    checkpoint_bytes,
    is_offloaded,
    parts_of,
    seconds_per_step,
)
from trainers.flux.architecture import FLUX_1_DEV, FLUX_1_SCHNELL
from trainers.flux.footprint import PIXELS_PER_LATENT, Footprint, footprint
from trainers.flux.load import transformer_config
from trainers.hardware import GIB, GPUS, Gpu, gpu_here, gpu_named, gpu_of_type
from trainers.recipe import FluxRecipe

__all__ = ["Change", "Plan", "check_fits", "gpu_named", "plan_flux", "render"]

MOST_GPUS = 64  # that a remedy may ask for
MOST_REMEDIES = 6


@dataclass(frozen=True)
class Change:
    """A changed recipe or cluster under which the run fits."""

    command: str  # what to add to `medsynth plan RECIPE`
    gpu_bytes: float  # then needed on one GPU
    images_per_second: float


@dataclass(frozen=True)
class Plan:
    """The run as it would be on `num_gpus` of `gpu`. Bytes are of one GPU, one host, or one whole checkpoint."""

    recipe: FluxRecipe
    gpu: Gpu
    num_gpus: int
    footprint: Footprint
    parts: tuple[Part, ...]
    seconds_per_step: float
    checkpoint_bytes: float
    price_per_gpu_hour: float | None
    note: str | None = None  # on where the architecture was taken from
    remedies: tuple[Change, ...] = ()  # only where the run does not fit

    def gpu_bytes_in(self, moment: When) -> float:
        """What lies on one GPU at a moment, with what always does."""
        return sum(part.gpu_bytes for part in self.parts if part.when in ("always", moment))

    @property
    def gpu_bytes(self) -> float:
        """The most that lies on one GPU at a time."""
        return max(self.gpu_bytes_in("pass"), self.gpu_bytes_in("update"))

    @property
    def host_bytes(self) -> float:
        ranks = min(self.num_gpus, self.gpu.gpus_per_host)
        return ranks * (HOST_BYTES_PER_PROCESS + sum(part.host_bytes for part in self.parts))

    @property
    def copy_bytes(self) -> float:
        """Of one host's memory, for the copy from which checkpoints are written beside the training. Without room for
        it the training waits until they are written."""
        hosts = 1 if self.recipe.transformer.engine == "ddp" else -(-self.num_gpus // self.gpu.gpus_per_host)
        return self.checkpoint_bytes / hosts

    @property
    def fits(self) -> bool:
        return self.gpu_bytes <= self.gpu.memory_bytes

    @property
    def images_per_second(self) -> float:
        return self.recipe.transformer.training.global_batch_size / self.seconds_per_step

    @property
    def gpu_hours(self) -> float:
        """Of training alone: validation, previews and checkpoints come on top."""
        return self.recipe.transformer.training.steps * self.seconds_per_step * self.num_gpus / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour


def plan_flux(recipe: FluxRecipe, *, num_gpus: int, gpu: Gpu, price_per_gpu_hour: float | None) -> Plan:
    """Plan a run; if it does not fit, with the single changes that make it fit, or else pairs of them.

    Raises UserError if the global batch cannot be dealt out to `num_gpus`, or the model is not known.
    """
    try:
        recipe = _changed(recipe, {"cluster.num_workers": num_gpus})
    except ValidationError as error:
        raise UserError(f"--gpus {num_gpus}: {error.errors()[0]['ctx']['error']}") from None
    architecture, note = _architecture(recipe.pretrained)
    plan = _plan(recipe, architecture, gpu, price_per_gpu_hour)
    plan = replace(plan, note=note)
    if plan.fits:
        return plan
    levers = list(_levers(recipe))
    remedies = _remedies(plan, architecture, levers) or _remedies(plan, architecture, list(_pairs(levers)))
    return replace(plan, remedies=tuple(remedies[:MOST_REMEDIES]))


def check_fits(recipe: FluxRecipe, nodes: Sequence[Node]) -> None:
    """Raise UserError, naming the shortage and what helps, if `nodes` could never hold the run.

    What is not known of a machine, its kind of GPU or its memory, is taken to suffice; and so is what lies in host
    memory beside the offloaded states, a few GiB a process.
    """
    if not recipe.cluster.use_gpu:
        return
    num_gpus = recipe.cluster.min_workers

    def planned(gpu: Gpu) -> Plan:
        return plan_flux(recipe, num_gpus=num_gpus, gpu=gpu, price_per_gpu_hour=None)

    gpus = [(gpu_here() if node.is_here else None) or gpu_of_type(node.accelerator_type) for node in nodes]
    plans = {gpu: planned(gpu) for gpu in gpus if gpu is not None}
    fitting = [node for node, gpu in zip(nodes, gpus, strict=True) if gpu is None or plans[gpu].fits]
    too_small = [plan for plan in plans.values() if not plan.fits]
    if too_small and sum(node.num_gpus for node in fitting) < num_gpus:
        raise _no_room_on_gpus(max(too_small, key=lambda plan: plan.gpu.memory_bytes))
    any_plan = next(iter(plans.values()), None) or planned(GPUS["h100"])
    host_bytes = sum(part.host_bytes for part in any_plan.parts)  # of one rank, beside whatever GPU
    if sum(_num_ranks_held(node, host_bytes) for node in fitting) < num_gpus:
        there = " + ".join(f"{(node.memory_bytes or 0) / GIB:.0f}" for node in fitting if node.num_gpus)
        raise UserError(
            f"{recipe.name} keeps {host_bytes / GIB:.0f} GiB for each of {num_gpus} GPUs in host memory, but the "
            f"cluster's machines with GPUs have {there} GiB: take larger ones, or more of them, or offload less "
            "(transformer.deepspeed.zero_optimization; medsynth plan shows more)"
        )


def _num_ranks_held(node: Node, host_bytes: float) -> int:
    """One a GPU, unless host memory is known to hold fewer."""
    if node.memory_bytes is None or not host_bytes:
        return node.num_gpus
    return min(node.num_gpus, int(node.memory_bytes // host_bytes))


def _no_room_on_gpus(plan: Plan) -> UserError:
    command = plan.remedies[0].command.replace("--gpus ", "--set cluster.num_workers=") if plan.remedies else ""
    advice = f"it would fit with {command}" if command else "no change that medsynth knows makes it fit"
    return UserError(
        f"{plan.recipe.name} needs {plan.gpu_bytes / GIB:.0f} GiB on each of {plan.num_gpus} GPUs, but "
        f"{plan.gpu.product} has {plan.gpu.memory_bytes / GIB:.0f} GiB; {advice} (medsynth plan shows more)"
    )


def _plan(recipe: FluxRecipe, architecture: Mapping[str, Any], gpu: Gpu, price_per_gpu_hour: float | None) -> Plan:
    settings = recipe.transformer
    counted = footprint(
        architecture,
        resolution=recipe.data.resolution,
        max_tokens=recipe.max_tokens,
        checkpointing=settings.activation_checkpointing,
        lora=settings.lora,
        dtype=torch.bfloat16 if settings.training.precision == "bf16" else torch.float32,
    )
    return Plan(
        recipe=recipe,
        gpu=gpu,
        num_gpus=recipe.cluster.min_workers,
        footprint=counted,
        parts=tuple(parts_of(recipe, counted, gpu)),
        seconds_per_step=seconds_per_step(recipe, counted, gpu),
        checkpoint_bytes=checkpoint_bytes(recipe, counted),
        price_per_gpu_hour=price_per_gpu_hour,
    )


def _architecture(pretrained: str) -> tuple[Mapping[str, Any], str | None]:
    """The transformer's config, and a note if it is not the model's own but what is published of it."""
    try:
        return transformer_config(pretrained), None
    except UserError:
        known = {"flux.1-dev": FLUX_1_DEV, "flux.1-schnell": FLUX_1_SCHNELL}.get(pretrained.rsplit("/")[-1].lower())
        if known is None:
            raise
        return known, f"{pretrained} cannot be read from here: planned by its published architecture"


# --- what to change ---

Lever = list[dict[str, Any]]  # one thing to change, by dotted key, to ever more


def _remedies(plan: Plan, architecture: Mapping[str, Any], levers: list[Lever]) -> list[Change]:
    """Of each lever the least under which the run fits, found by planning it again."""
    found: list[Change] = []
    for lever in levers:
        for change in lever:
            changed = _plan_changed(plan, architecture, change)
            if changed is not None and changed.fits:
                found.append(Change(_as_command(change), changed.gpu_bytes, changed.images_per_second))
                break  # more of it would only cost more
    return found


def _plan_changed(plan: Plan, architecture: Mapping[str, Any], change: dict[str, Any]) -> Plan | None:
    """The changed plan, or None if the recipe does not allow the change."""
    try:
        return _plan(_changed(plan.recipe, change), architecture, plan.gpu, None)
    except ValidationError:
        return None


def _levers(recipe: FluxRecipe) -> Iterator[Lever]:
    """What can be changed alone, the least harmful to the result first."""
    settings, training = recipe.transformer, recipe.transformer.training
    more_checkpointing = {"none": ["selective", "full"], "selective": ["full"], "full": []}
    yield [
        {"transformer.activation_checkpointing": mode} for mode in more_checkpointing[settings.activation_checkpointing]
    ]
    micro = training.micro_batch_size
    yield [
        {"transformer.training.micro_batch_size": smaller}
        for smaller in range(micro - 1, 0, -1)
        if micro % smaller == 0
    ]
    num_gpus = recipe.cluster.min_workers
    yield [{"cluster.num_workers": more} for more in range(num_gpus + 1, MOST_GPUS + 1) if more % num_gpus == 0]
    if training.ema_decay:
        yield [{"transformer.training.ema_decay": 0.0}]
    if settings.engine == "zero3":
        for block in ("offload_optimizer", "offload_param"):
            if not is_offloaded(recipe, block):
                yield [{f"transformer.deepspeed.zero_optimization.{block}.device": "cpu"}]
        if settings.optimizer_states == "fp32" and not is_offloaded(recipe, "offload_optimizer"):
            bf16: dict[str, Any] = {"transformer.optimizer_states": "bf16"}
            yield [bf16, bf16 | {"transformer.training.ema_decay": 0.0}] if training.ema_decay else [bf16]
    if settings.lora is None:
        change: dict[str, Any] = {"transformer.engine": "ddp", "transformer.lora.rank": 16}
        change |= {"transformer.optimizer_states": "fp32"} if settings.optimizer_states == "bf16" else {}
        change |= {"transformer.deepspeed": {}} if settings.deepspeed else {}
        yield [change]


def _pairs(levers: list[Lever]) -> Iterator[Lever]:
    """Two levers at a time, as long as they do not change the same thing."""
    for first, second in combinations(levers, 2):
        yield [
            one | other
            for one, other in product(first, second)
            if not one.keys() & other.keys() and not _contradict(one | other)
        ]


def _contradict(change: Mapping[str, Any]) -> bool:
    """DeepSpeed offloads fp32 states alone, and adapters go without DeepSpeed."""
    is_offloading = any("offload" in key for key in change)
    return is_offloading and ("transformer.optimizer_states" in change or "transformer.lora.rank" in change)


def _changed(recipe: FluxRecipe, change: Mapping[str, Any]) -> FluxRecipe:
    """The recipe with values put in by dotted key. Raises ValidationError if it does not allow them."""
    document = recipe.model_dump()
    for path, value in change.items():
        *parents, last = path.split(".")
        block = document
        for parent in parents:
            block[parent] = dict(block.get(parent) or {})
            block = block[parent]
        block[last] = value
    return FluxRecipe.model_validate(document)


def _as_command(change: Mapping[str, Any]) -> str:
    return " ".join(
        f"--gpus {value}" if key == "cluster.num_workers" else f"--set {key}={value}" for key, value in change.items()
    )


# --- what the user sees ---


def render(plan: Plan, console: Console) -> None:
    """Print the plan: memory by part, the verdict and what would help, time and money."""
    settings, training = plan.recipe.transformer, plan.recipe.transformer.training
    counted = plan.footprint
    table = Table(title=f"{plain(plan.recipe.name)} on {plan.num_gpus} x {plan.gpu.product}: memory of one GPU in GiB")
    table.add_column("", no_wrap=True)
    table.add_column("forward and backward", justify="right")
    table.add_column("optimizer step", justify="right")
    for part in plan.parts:
        gib = f"{part.gpu_bytes / GIB:.1f}" if part.gpu_bytes else "on the host"
        table.add_row(part.what, gib if part.when != "update" else "", gib if part.when != "pass" else "")
    table.add_section()
    table.add_row("together", *(f"{plan.gpu_bytes_in(moment) / GIB:.1f}" for moment in ("pass", "update")))
    console.print(table)

    of = f"{plan.gpu_bytes / GIB:.1f} of {plan.gpu.memory_bytes / GIB:.0f} GiB"
    if plan.fits:
        console.print(f"[bold green]Fits[/]: {of}", soft_wrap=True)
    else:
        console.print(f"[bold red]Does not fit[/]: {of}" + (". It would with one of:" if plan.remedies else ""))
        for change in plan.remedies:
            figures = f"{change.gpu_bytes / GIB:.1f} GiB, {change.images_per_second:.1f} images/s"
            console.print(f"  {plain(change.command)}  ({figures})", soft_wrap=True)
        if not plan.remedies:
            console.print("Neither one change nor two of those that medsynth knows make it fit.")

    cost = "" if plan.cost is None else f", {plan.cost:,.0f} at {plan.price_per_gpu_hour:g} an hour"
    tokens = plan.recipe.max_tokens + (plan.recipe.data.resolution // (2 * PIXELS_PER_LATENT)) ** 2
    for line in (
        f"Memory of one host: {plan.host_bytes / GIB:.0f} GiB, and {plan.copy_bytes / GIB:.1f} GiB for the copy from "
        f"which checkpoints are written beside the training; a checkpoint: {plan.checkpoint_bytes / 1e9:.1f} GB",
        f"Transformer: {counted.parameters:,} parameters, {counted.trainable:,} of them trained; an image is "
        f"{tokens:,} tokens, {counted.forward_flops / 1e12:.1f} TFLOP forward, {counted.pass_flops / 1e12:.1f} trained "
        f"with activation_checkpointing {settings.activation_checkpointing}",
        f"Time, estimated, not measured: {plan.seconds_per_step:.2f} s a step, {plan.images_per_second:.1f} images/s; "
        f"{training.steps:,} steps of {training.global_batch_size} images take {plan.gpu_hours:,.1f} GPU-hours{cost}",
        f"Assumed: {plan.gpu.matmul_flops * ACHIEVED_SHARE / 1e12:.0f} TFLOP/s a GPU "
        f"({ACHIEVED_SHARE:.0%} of its matrix products), {plan.gpu.bus / 1e9:.0f} GB/s between the GPUs of a machine, "
        f"{plan.gpu.network / 1e9:g} to others, nothing hidden; validation, previews and checkpoints come on top",
        *((plan.note,) if plan.note else ()),
    ):
        console.print(plain(line), soft_wrap=True)
