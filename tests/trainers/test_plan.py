import json
import multiprocessing
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from diffusers import FluxTransformer2DModel
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cluster.errors import UserError
from cluster.nodes import Node
from tests.trainers.test_checkpointing import bytes_autograd_saves, loss_of, tiny_transformer
from trainers.ema import EMA
from trainers.estimates import ZERO3_DEFAULTS, parts_of
from trainers.flux.architecture import FLUX_1_DEV, FLUX_1_SCHNELL
from trainers.flux.checkpointing import CheckpointingMode, set_activation_checkpointing
from trainers.flux.footprint import Counter, _count_pass, build_on_meta, footprint
from trainers.hardware import GIB, GPUS, gpu_of_type
from trainers.plan import Plan, check_fits, gpu_named, plan_flux, render
from trainers.recipe import FluxRecipe, LoRA, Training, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PARAMETERS = 11_901_408_320
TINY: dict[str, Any] = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """A FLUX.1-dev without weights: its config, where the diffusers layout has it."""
    (tmp_path / "flux" / "transformer").mkdir(parents=True)
    (tmp_path / "flux" / "transformer" / "config.json").write_text(json.dumps(FLUX_1_DEV))
    return str(tmp_path / "flux")


def recipe_of(name: str, pretrained: str, *overrides: str) -> FluxRecipe:
    recipe = load_recipe(str(RECIPES / f"{name}.yaml"), [f"pretrained={pretrained}", *overrides])
    assert isinstance(recipe, FluxRecipe)
    return recipe


def planned(recipe: FluxRecipe, num_gpus: int, gpu: str) -> Plan:
    return plan_flux(recipe, num_gpus=num_gpus, gpu=gpu_named(gpu), price_per_gpu_hour=None)


def bytes_of(plan: Plan, *whats: str) -> float:
    found = [part.gpu_bytes for part in plan.parts if part.what in whats]
    assert len(found) == len(whats)
    return sum(found)


# --- what is counted ---


@pytest.mark.parametrize(("resolution", "teraflop"), [(512, 21.50), (1024, 74.38)])
def test_flux_is_counted_as_published(resolution: int, teraflop: float) -> None:
    counted = footprint(FLUX_1_DEV, resolution=resolution, max_tokens=512, checkpointing="none")
    assert counted.parameters == counted.trainable == PARAMETERS
    assert counted.forward_flops / 1e12 == pytest.approx(teraflop, abs=0.01)
    # Twice the forward pass, and once more the products of the attention, which the flash kernel computes again.
    attention = 57 * 4 * 3072 * (512 + (resolution // 16) ** 2) ** 2
    assert counted.pass_flops == pytest.approx(3 * counted.forward_flops + attention / 2, rel=2e-3)


def test_forward_flops_are_the_closed_form() -> None:
    """Per block 12 d^2 weights act on each token, and attention takes 4 d L^2; modulation acts once an image."""
    tokens, d = 1024 + 512, 3072
    closed = 57 * (2 * 12 * d * d * tokens + 4 * d * tokens**2)
    counted = footprint(FLUX_1_DEV, resolution=512, max_tokens=512, checkpointing="none").forward_flops
    assert counted == pytest.approx(closed, rel=5e-3)


def test_a_deep_model_is_counted_from_shallow_ones() -> None:
    config = TINY | {"num_layers": 3, "num_single_layers": 4}
    modes: tuple[CheckpointingMode, ...] = ("none", "full")
    for mode in modes:
        counted = footprint(config, resolution=64, max_tokens=8, checkpointing=mode)
        transformer = build_on_meta(config, None, torch.bfloat16)
        set_activation_checkpointing(transformer, mode)
        whole = _count_pass(transformer, resolution=64, max_tokens=8)
        assert counted.parameters == whole.parameters
        assert counted.pass_flops == whole.pass_flops
        assert counted.kept_bytes == whole.kept_bytes
        assert counted.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)


def test_adapters_are_all_that_lora_trains() -> None:
    rank, d = 16, 3072
    lora = LoRA(rank=rank, target_modules=("to_q", "add_q_proj"))
    counted = footprint(FLUX_1_DEV, resolution=512, max_tokens=512, checkpointing="full", lora=lora)
    assert counted.trainable == (57 + 19) * rank * 2 * d
    assert counted.parameters == PARAMETERS + counted.trainable


def counted_bytes(mode: CheckpointingMode) -> tuple[int, int]:
    """(kept after the forward pass, most at a time) of a real pass on the CPU."""
    transformer = tiny_transformer()
    set_activation_checkpointing(transformer, mode)
    parameters: list[Tensor] = list(transformer.parameters())
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with Counter(ignore=parameters) as counter:
        loss = loss_of(transformer)
        kept = counter.bytes
        loss.backward()
    return kept, counter.peak_bytes


def test_less_is_kept_the_more_is_computed_again() -> None:
    kept = {mode: counted_bytes(mode)[0] for mode in ("none", "selective", "full")}
    assert kept["none"] > 1.3 * kept["selective"] > 2 * kept["full"]


@pytest.mark.parametrize("mode", ["none", "full"])
def test_counted_bytes_are_those_that_autograd_saves(mode: CheckpointingMode) -> None:
    """Within 10 %: prediction, loss and a few inputs are there too, but are not saved."""
    assert counted_bytes(mode)[0] == pytest.approx(bytes_autograd_saves(mode), rel=0.1)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_the_estimate_is_what_a_real_pass_takes(mode: CheckpointingMode) -> None:
    """Counted on the meta device for one image, taken twice, against a pass with two images on the CPU: within 15 %,
    for in so small a model the rotary tables weigh, which two images share."""
    config = TINY | {"num_layers": 2, "num_single_layers": 2}
    counted = footprint(config, resolution=64, max_tokens=6, checkpointing=mode, dtype=torch.float32)
    kept, peak = counted_bytes(mode)
    assert 2 * counted.kept_bytes == pytest.approx(kept, rel=0.15)
    assert 2 * counted.peak_bytes == pytest.approx(peak, rel=0.15)


def test_flops_are_those_of_torchs_counter() -> None:
    transformer = tiny_transformer()
    with FlopCounterMode(display=False) as reference:
        loss_of(transformer)
    with Counter(ignore=list(transformer.parameters())) as counter:
        loss_of(transformer)
    assert counter.flops == reference.get_total_flops() > 0


# --- model states ---


def test_states_on_the_gpu_are_those_deepspeed_estimates(pretrained: str) -> None:
    plan = planned(recipe_of("flux-full-8gpu", pretrained), 8, "h100")
    _, gpu_bytes, largest_layer = estimate_zero3_model_states_mem_needs(
        PARAMETERS, 56_623_104, num_gpus_per_node=8, cpu_offload=False
    )
    states = bytes_of(plan, "weights", "gradients", "master weights and Adam's moments")
    assert states == pytest.approx(gpu_bytes - largest_layer, rel=1e-6)


def test_offloaded_states_are_those_deepspeed_estimates(pretrained: str) -> None:
    block = "transformer.deepspeed.zero_optimization.offload_optimizer"
    recipe = recipe_of("flux-full-offload", pretrained, "transformer.training.ema_decay=0", f"{block}.pin_memory=false")
    plan = planned(recipe, 2, "h100")
    cpu_bytes, gpu_bytes, largest_layer = estimate_zero3_model_states_mem_needs(
        PARAMETERS, 56_623_104, num_gpus_per_node=2, cpu_offload_params=False, additional_buffer_factor=1
    )
    assert bytes_of(plan, "weights") == pytest.approx(gpu_bytes - largest_layer, rel=1e-6)
    # DeepSpeed does not count that gradients lie there twice: accumulated, and handed to Adam.
    assert 2 * sum(part.host_bytes for part in plan.parts) == pytest.approx(cpu_bytes + 4 * PARAMETERS, rel=1e-6)


def test_pinned_gradients_take_powers_of_two(pretrained: str) -> None:
    """Half of 11.9 B gradients, 22.2 GiB, as one buffer of 32; and again as five full groups of 4 and a rest below."""
    plan = planned(recipe_of("flux-full-offload", pretrained), 2, "h100")
    by_name = {part.what: part.host_bytes / 2**30 for part in plan.parts}
    assert by_name["gradients"] == 32
    assert by_name["gradients handed to Adam"] == 5 * 4 + 4


def held_by_zero3(optimizer_states: Literal["fp32", "bf16"]) -> dict[str, int]:
    """Bytes that one real rank holds after a step in bf16."""
    from trainers.engines.zero3 import Zero3Engine  # it starts a process group, so this runs in a process of its own

    training = Training(
        steps=1, global_batch_size=2, micro_batch_size=2, learning_rate=1e-3, precision="bf16", ema_decay=0.9
    )
    engine = Zero3Engine(tiny_transformer(), training, torch.device("cpu"), optimizer_states=optimizer_states)
    loss = loss_of(engine.model, torch.bfloat16)
    engine.backward(loss)
    assert engine.step(1e-3, loss, stop_requested=False).read().applied
    flat, moments = engine._zero.fp32_partitioned_groups_flat, engine._optimizer.state.values()
    return {
        "weights": sum(parameter.ds_tensor.nbytes for parameter in engine._parameters.values()),
        "gradients": engine._zero.grad_partitions_flat_buffer.nbytes,
        "master weights and Adam's moments": sum(tensor.nbytes for tensor in flat)
        + sum(moment[name].nbytes for moment in moments for name in ("exp_avg", "exp_avg_sq")),
        "moving average": sum(tensor.nbytes for tensor in engine._average.values()),
    }


@pytest.mark.slow
def test_states_are_those_that_a_real_rank_holds(pretrained: str) -> None:
    config = TINY | {"num_layers": 2, "num_single_layers": 2}
    counted = footprint(config, resolution=64, max_tokens=6, checkpointing="full")
    kinds: list[Literal["fp32", "bf16"]] = ["fp32", "bf16"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        held_by_kind = pool.map(held_by_zero3, kinds)
    for kind, held in zip(kinds, held_by_kind, strict=True):
        overrides = [f"transformer.optimizer_states={kind}", "transformer.training.ema_decay=0.9"]
        recipe = recipe_of("flux-full-1xh200", pretrained, *overrides)
        expected = {part.what: part.gpu_bytes for part in parts_of(recipe, counted, GPUS["h200"])}
        assert held == {what: expected[what] for what in held}


def test_adapters_are_held_as_the_plan_says(pretrained: str) -> None:
    config = TINY | {"num_layers": 2, "num_single_layers": 2}
    lora = LoRA(target_modules=("to_q",))
    transformer = build_on_meta(config, lora, torch.bfloat16)
    average = EMA(transformer, 0.9).average
    counted = footprint(config, resolution=64, max_tokens=6, checkpointing="full", lora=lora)
    parts = {part.what: part.gpu_bytes for part in parts_of(recipe_of("flux-lora", pretrained), counted, GPUS["h100"])}
    assert sum(tensor.nbytes for tensor in average.values()) == parts["moving average"] == 4 * counted.trainable
    assert parts["weights"] == 2 * (counted.parameters - counted.trainable) + 4 * counted.trainable


def test_buckets_are_deepspeeds_defaults() -> None:
    defaults = {(field.alias or name): field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert {key: int(defaults[key]) for key in ZERO3_DEFAULTS} == ZERO3_DEFAULTS


def test_a_smaller_bucket_of_the_recipe_counts(pretrained: str) -> None:
    small = "transformer.deepspeed.zero_optimization.reduce_bucket_size=50000000"
    plan = planned(recipe_of("flux-full-8gpu", pretrained, small), 8, "h100")
    assert bytes_of(plan, "gradients being reduced") == 2 * 2 * 50_000_000


def test_a_checkpoint_holds_weights_moments_and_average(pretrained: str) -> None:
    assert planned(recipe_of("flux-full-8gpu", pretrained), 8, "h100").checkpoint_bytes == 16 * PARAMETERS
    assert planned(recipe_of("flux-full-1xh200", pretrained), 1, "h200").checkpoint_bytes == 6 * PARAMETERS


# --- verdicts ---


@pytest.mark.parametrize(
    ("name", "num_gpus", "gpu"),
    [
        ("flux-full-8gpu", 8, "h100"),
        ("flux-full-1xh200", 1, "h200"),
        ("flux-full-offload", 2, "h100"),
        ("flux-lora", 1, "a100"),
    ],
)
def test_recipes_fit_the_gpus_they_name(pretrained: str, name: str, num_gpus: int, gpu: str) -> None:
    plan = planned(recipe_of(name, pretrained), num_gpus, gpu)
    assert plan.fits
    assert not plan.remedies


def test_fp32_states_do_not_fit_one_h200_but_bf16_states_do(pretrained: str) -> None:
    plan = planned(recipe_of("flux-full-1xh200", pretrained, "transformer.optimizer_states=fp32"), 1, "h200")
    assert not plan.fits
    assert bytes_of(plan, "weights", "gradients", "master weights and Adam's moments") == 18 * PARAMETERS
    assert "--set transformer.optimizer_states=bf16" in [change.command for change in plan.remedies]


def test_activations_decide_too(pretrained: str) -> None:
    recipe = recipe_of("flux-full-8gpu", pretrained, "transformer.activation_checkpointing=none")
    plan = planned(recipe, 8, "h100")
    assert not plan.fits
    assert plan.remedies[0].command == "--set transformer.activation_checkpointing=selective"


@pytest.mark.parametrize(
    ("name", "num_gpus", "gpu", "overrides"),
    [
        ("flux-full-8gpu", 1, "h200", []),
        ("flux-full-8gpu", 1, "l40s", ["transformer.activation_checkpointing=none"]),  # takes two changes
        ("flux-full-1xh200", 1, "l40s", []),
    ],
)
def test_every_remedy_works_as_it_is_printed(
    pretrained: str, name: str, num_gpus: int, gpu: str, overrides: list[str]
) -> None:
    plan = planned(recipe_of(name, pretrained, *overrides), num_gpus, gpu)
    assert not plan.fits
    assert plan.remedies
    for remedy in plan.remedies:
        words = shlex.split(remedy.command)
        options = list(zip(words[::2], words[1::2], strict=True))
        changes = [value for option, value in options if option == "--set"]
        gpus = next((int(value) for option, value in options if option == "--gpus"), num_gpus)
        again = planned(recipe_of(name, pretrained, *overrides, *changes), gpus, gpu)
        assert again.fits, remedy.command
        assert again.gpu_bytes == remedy.gpu_bytes


def nodes(*kinds: tuple[int, str | None, int | None]) -> list[Node]:
    """Machines by (number of GPUs, Ray's name for them, GiB of the host)."""
    return [Node(num_gpus, kind, None if gib is None else gib * GIB, is_here=False) for num_gpus, kind, gib in kinds]


SELECTIVE = ("flux-full-8gpu", "transformer.activation_checkpointing=selective")
FP32_STATES = ("flux-full-1xh200", "transformer.optimizer_states=fp32")


@pytest.mark.parametrize(
    ("recipe", "there", "said"),
    [
        (FP32_STATES, nodes((8, "H200", 2000)), r"needs \d+ GiB .* NVIDIA H200 141GB SXM has 139 GiB; .* with --set"),
        (FP32_STATES, nodes((1, "H200", None), (1, "L40S", None)), "H200 141GB SXM has 139 GiB"),
        (SELECTIVE, nodes((7, "H100", None), (8, "L40S", None)), r"on each of 8 GPUs, but NVIDIA L40S"),
        (
            ("flux-full-offload",),
            nodes((8, "H100", 256)),
            r"keeps \d+ GiB for each of 2 GPUs in host memory.* have 256",
        ),
        (("flux-full-offload",), nodes((1, None, 100), (1, None, 256), (0, None, 900)), r"have 100 \+ 256 GiB"),
    ],
)
def test_training_that_cannot_fit_does_not_begin(
    pretrained: str, recipe: tuple[str, ...], there: list[Node], said: str
) -> None:
    name, *overrides = recipe
    with pytest.raises(UserError, match=said) as error:
        check_fits(recipe_of(name, pretrained, *overrides), there)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "there"),
    [
        (("flux-full-1xh200",), nodes((1, "H200", 64))),
        (FP32_STATES, nodes((1, None, 64))),  # it might be any GPU
        (FP32_STATES, nodes((1, "L40S", 64), (1, "MI300X", None))),  # it might run on the other
        (("flux-full-1xh200", "cluster.use_gpu=false"), nodes((1, "L40S", 64))),
        (("flux-full-8gpu",), nodes((4, "H100", 100), (4, "A100-80G", 100), (2, "L40S", 100))),
        (("flux-full-offload",), nodes((1, "H100", 200), (1, "H100", 200))),
        (("flux-full-offload",), nodes((2, "H100", None))),
    ],
)
def test_training_that_may_fit_begins(pretrained: str, recipe: tuple[str, ...], there: list[Node]) -> None:
    name, *overrides = recipe
    check_fits(recipe_of(name, pretrained, *overrides), there)


def test_of_this_machine_the_true_memory_counts(pretrained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(GPUS["a100"], product="NVIDIA A100-SXM4-40GB", memory_bytes=40 * GIB)
    monkeypatch.setattr("trainers.plan.gpu_here", lambda: here)
    node = Node(8, "A100", None, is_here=True)
    with pytest.raises(UserError, match="A100-SXM4-40GB has 40 GiB"):
        check_fits(recipe_of("flux-full-8gpu", pretrained), [node])
    check_fits(recipe_of("flux-full-8gpu", pretrained), [replace(node, is_here=False)])


@pytest.mark.parametrize(
    ("accelerator_type", "name"),
    [("H100", "h100"), ("A100", "a100"), ("A100-80G", "a100"), ("A100-40G", None), ("T4", None), (None, None)],
)
def test_gpus_by_rays_names(accelerator_type: str | None, name: str | None) -> None:
    assert gpu_of_type(accelerator_type) == (GPUS[name] if name else None)


def test_a_batch_that_cannot_be_dealt_out_is_said(pretrained: str) -> None:
    with pytest.raises(UserError, match="--gpus 3: global_batch_size 32 is not a multiple of micro_batch_size 4 x 3"):
        planned(recipe_of("flux-full-8gpu", pretrained), 3, "h100")


def test_an_unknown_gpu_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"did you mean 'h100'\? there are a100 .*b200"):
        gpu_named("h10")


def test_a_model_out_of_reach_is_planned_by_its_published_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(pretrained: str) -> dict[str, object]:
        raise UserError("no hub")

    monkeypatch.setattr("trainers.plan.transformer_config", unreachable)
    dev = planned(recipe_of("flux-full-8gpu", "black-forest-labs/FLUX.1-dev"), 8, "h100")
    schnell = planned(recipe_of("flux-full-8gpu", "black-forest-labs/FLUX.1-schnell"), 8, "h100")
    assert dev.note is not None
    assert "published architecture" in dev.note
    assert schnell.footprint.parameters < dev.footprint.parameters == PARAMETERS
    with pytest.raises(UserError, match="no hub"):
        planned(recipe_of("flux-full-8gpu", "someone/else"), 8, "h100")


def test_published_architectures_are_diffusers_defaults() -> None:
    with torch.device("meta"):
        config = FluxTransformer2DModel().config
    assert {key: config[key] for key in FLUX_1_SCHNELL if not key.startswith("_")} == {
        key: value for key, value in FLUX_1_SCHNELL.items() if not key.startswith("_")
    }


# --- time and money ---


def test_two_machines_do_not_halve_the_time_of_one(pretrained: str) -> None:
    halves = recipe_of("flux-full-8gpu", pretrained, "transformer.training.micro_batch_size=2")
    eight, sixteen = planned(recipe_of("flux-full-8gpu", pretrained), 8, "h200"), planned(halves, 16, "h200")
    # Half the computation each, but the weights now cross the network.
    assert sixteen.seconds_per_step > eight.seconds_per_step / 2


def test_the_copy_of_a_checkpoint_takes_host_memory(pretrained: str) -> None:
    """All bf16 states, cut over a host's GPUs or not: 6 bytes a parameter, 16 with fp32 states and average."""
    assert planned(recipe_of("flux-full-1xh200", pretrained), 1, "h200").copy_bytes == 6 * PARAMETERS
    recipe = recipe_of("flux-full-8gpu", pretrained, "transformer.training.micro_batch_size=2")
    assert planned(recipe, 8, "h100").copy_bytes == 16 * PARAMETERS
    assert planned(recipe, 16, "h100").copy_bytes == 8 * PARAMETERS


def test_one_gpu_computes_and_updates_and_sends_nothing(pretrained: str) -> None:
    plan = planned(recipe_of("flux-full-1xh200", pretrained), 1, "h200")
    computing = 16 * plan.footprint.pass_flops / (790e12 * 0.5)
    update = (14 + 30) * PARAMETERS / 4.3e12  # the compiled optimizer; DeepSpeed's norm, clipping and copies
    assert plan.seconds_per_step == pytest.approx(computing + update)
    assert plan.gpu_hours == pytest.approx(4000 * plan.seconds_per_step / 3600)


def test_the_plan_is_printed(pretrained: str) -> None:
    console = Console(record=True, width=120)
    recipe = recipe_of("flux-full-1xh200", pretrained, "transformer.optimizer_states=fp32")
    plan = plan_flux(recipe, num_gpus=1, gpu=gpu_named("h200"), price_per_gpu_hour=4.0)
    render(plan, console)
    printed = console.export_text()
    assert "Does not fit" in printed
    assert plan.cost == pytest.approx(plan.gpu_hours * 4)
    assert f"{plan.cost:,.0f} at 4 an hour" in printed
    assert "11,901,408,320 parameters" in printed
    for remedy in plan.remedies:
        assert remedy.command in printed
