import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import metrics
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.circumstances import RESULTS
from benchmarks.flux_step import (
    MAX_GRAD_NORM,
    TINY,
    Setting,
    UpdateInBackward,
    Variant,
    build_transformer,
    fuse_qkv,
    main,
    make_batch,
    prepare,
    training_step,
    variants,
)
from trainers.engines.bf16_adamw import Bf16AdamW, round_stochastically, uniform_bits
from trainers.objectives import RectifiedFlowObjective

ROOT = Path(__file__).parents[1]
NOT_ON_A_GPU_MACHINE = ("ray", "mlflow", "deepspeed", "boto3", "peft", "pyarrow", "webdataset", "rich", "typer")
SETTING = Setting(
    device=torch.device("cpu"),
    config=TINY,
    tokens=8,
    warmup=1,
    steps=2,
    learning_rate=1e-3,
    compile_backend="eager",
)


# --- bf16 AdamW ---


def test_stochastic_rounding_is_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = 200_000
    for value in (1.0 + 2**-10, -3.14159, 1e-20, 65_537.0):
        noise = torch.randint(0, 2**16, (draws,), dtype=torch.int32, generator=generator)
        rounded = round_stochastically(torch.full((draws,), value), noise)
        neighbours = rounded.unique().double()
        assert len(neighbours) == 2
        low, high = neighbours.tolist()
        exact = float(torch.tensor(value))
        assert low < exact < high
        assert rounded.double().mean() == pytest.approx(exact, abs=5 * (high - low) / 2 / draws**0.5)


def test_what_bf16_can_hold_is_not_changed() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    for noise in (0, 1, 2**16 - 1):
        assert torch.equal(
            round_stochastically(values.float(), torch.full((10_000,), noise, dtype=torch.int32)), values
        )
        few = torch.full((4,), noise, dtype=torch.int32)
        assert torch.equal(round_stochastically(special, few).float(), special)
        assert round_stochastically(torch.tensor([torch.nan]), few[:1]).isnan().all()


def test_the_noise_is_a_hash_that_is_uniform_and_unrelated() -> None:
    """The hash against unsigned arithmetic in NumPy; its values over a weight, of a neighbour, and of other keys."""
    index = torch.arange(2**18, dtype=torch.int32)
    keys = [12345, -(2**31), 2**31 - 1]
    drawn = [uniform_bits(index, torch.tensor(key, dtype=torch.int32)) for key in keys]
    for key, bits in zip(keys, drawn, strict=True):
        mixed = np.arange(2**18, dtype=np.uint32) + np.uint32(key % 2**32)
        mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x7FEB352D)
        mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x846CA68B)
        assert np.array_equal(bits.numpy(), (mixed >> np.uint32(16)).astype(np.int32))
        counts = np.bincount(bits.numpy() // 256, minlength=256)
        assert len(counts) == 256
        assert ((counts - 1024) ** 2 / 1024).sum() < 350  # chi-squared with 255 degrees of freedom, beyond 4 sigma
        assert abs(np.corrcoef(bits[1:], bits[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.01


@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_a_step_rounds_by_its_seed_and_parts_as_a_whole(
    compile_backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def updated(seed: int, elements: int) -> list[torch.Tensor]:
        monkeypatch.setattr("trainers.engines.bf16_adamw.PART_ELEMENTS", elements)
        weights = [nn.Parameter(torch.ones(1000, dtype=torch.bfloat16)) for _ in range(2)]
        optimizer = Bf16AdamW(weights, learning_rate=1e-3, seed_of=lambda _: seed, compile_backend=compile_backend)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return [weight.detach() for weight in weights]

    first, second = updated(1, 2**24)
    assert 10 < (first != 1).sum() < 990
    assert not torch.equal(first, second)  # equal weights, equal gradients: each is rounded in its own way
    assert torch.equal(updated(1, 2**24)[0], first)
    assert torch.equal(updated(1, 300)[1], second)
    assert not torch.equal(updated(2, 2**24)[0], first)


def trained(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> None:
    """Towards a gradient that always points the same way but for noise."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        weight.grad = (1 + 0.3 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        optimizer.step()


def test_bf16_adamw_follows_fp32_where_rounding_to_nearest_stands_still() -> None:
    """Updates of 1e-4 are below half of bf16's step at 1, 2^-8: only stochastic rounding lets them add up."""
    steps, count, learning_rate = 100, 4096, 1e-4
    torch.manual_seed(0)
    exact, stochastic, nearest = (
        nn.Parameter(torch.ones(count, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    trained(torch.optim.AdamW([exact], lr=learning_rate, weight_decay=0.01), exact, steps)
    trained(Bf16AdamW([stochastic], learning_rate=learning_rate, weight_decay=0.01), stochastic, steps)
    trained(torch.optim.AdamW([nearest], lr=learning_rate, weight_decay=0.01), nearest, steps)
    moved = 1 - exact.mean().item()
    assert moved > 0.009
    assert 1 - stochastic.float().mean().item() == pytest.approx(moved, rel=0.05)
    assert 1 - nearest.float().mean().item() < moved / 10


@pytest.mark.parametrize("compile_backend", [None, "aot_eager"])
def test_bf16_adamw_takes_adamws_steps(compile_backend: str | None) -> None:
    """Weights of several sizes, as a compiled update must take them all; to the rounding of bf16."""
    torch.manual_seed(0)
    starts = [torch.randn(size).bfloat16() for size in ((7,), (30, 20), (3000,))]
    references = [nn.Parameter(start.float()) for start in starts]
    weights = [nn.Parameter(start.clone()) for start in starts]
    reference = torch.optim.AdamW(references, lr=0.1, weight_decay=0.1)
    optimizer = Bf16AdamW(weights, learning_rate=0.1, weight_decay=0.1, compile_backend=compile_backend)
    for _ in range(2):
        for exact, weight in zip(references, weights, strict=True):
            weight.grad = torch.randn(weight.shape).bfloat16()
            exact.grad = weight.grad.float()
        reference.step()
        optimizer.step()
    for exact, weight in zip(references, weights, strict=True):
        torch.testing.assert_close(weight.float(), exact.detach(), rtol=2**-6, atol=2**-7)


@pytest.mark.slow
def test_a_compiled_update_is_one_kernel_and_rounds_alike() -> None:
    """One kernel reads each state once. Bits may differ where a processor fuses products and sums."""
    weights = [nn.Parameter(torch.linspace(-2, 2, 4096).bfloat16()) for _ in range(2)]
    torch._dynamo.reset()
    metrics.reset()
    with fresh_inductor_cache():
        eager, compiled = (
            Bf16AdamW([weight], learning_rate=1e-3, seed_of=lambda step: step, compile_backend=backend)
            for weight, backend in zip(weights, (None, "inductor"), strict=True)
        )
    assert metrics.generated_kernel_count == 2  # one for vectors, one for matrices
    for weight in weights:
        weight.grad = torch.linspace(1, -1, 4096).bfloat16()
    for optimizer in (eager, compiled):
        optimizer.step()
    assert (weights[0] != weights[1]).sum() < 40
    assert (weights[1] != torch.linspace(-2, 2, 4096).bfloat16()).any()


# --- the script's parts ---


def test_updates_in_backward_clip_by_the_last_norm_and_keep_no_gradient() -> None:
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))]
    seen: list[torch.Tensor] = []
    fused = UpdateInBackward(weights, lambda weight: seen.append(weight.grad.clone()))  # type: ignore[union-attr]
    for _ in range(2):
        sum((2 * weight).sum() for weight in weights).backward()  # type: ignore[union-attr]
        fused.end_step()
    assert all(weight.grad is None for weight in weights)
    norm = (13 * 4) ** 0.5
    for first, second in zip(sorted(seen[:2], key=len), sorted(seen[2:], key=len), strict=True):
        torch.testing.assert_close(first, torch.full_like(first, 2.0))
        torch.testing.assert_close(second, first * MAX_GRAD_NORM / norm)


def test_a_model_that_updates_in_its_backward_pass_is_let_go_of() -> None:
    """A later variant needs its memory, which on a GPU is all of it."""
    variant = Variant("", optimizer="adamw-bf16-stochastic", update_in_backward=True)
    transformer = build_transformer(SETTING)
    prepare(transformer, variant, SETTING)
    step = training_step(transformer, variant, SETTING)
    step(make_batch(Variant("", resolution=32, micro_batch=2), SETTING))
    weights = [weakref.ref(parameter) for parameter in transformer.parameters()]
    assert len(weights) > 50
    del transformer, step
    gc.collect()
    assert not [one for one in weights if one() is not None]


def test_fused_projections_compute_the_same_with_as_many_weights() -> None:
    torch.manual_seed(0)
    transformer = build_transformer(SETTING).float()
    batch = make_batch(Variant("", resolution=32, micro_batch=2), SETTING)
    batch = {name: tensor.float() for name, tensor in batch.items()}
    before = RectifiedFlowObjective()(transformer, **batch)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    fuse_qkv(transformer)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == count
    torch.testing.assert_close(RectifiedFlowObjective()(transformer, **batch), before)


def test_every_way_to_step_learns_the_same_batch() -> None:
    losses: dict[str, float] = {}
    for name, variant in {
        "plain": Variant("", optimizer="adamw-bf16", checkpointing="none"),
        "checkpointing": Variant("", optimizer="adamw-bf16", checkpointing="selective"),
        "in backward": Variant("", optimizer="adamw-bf16", update_in_backward=True),
        "stochastic": Variant("", optimizer="adamw-bf16-stochastic", update_in_backward=True),
    }.items():
        torch.manual_seed(0)
        transformer = build_transformer(SETTING)
        prepare(transformer, variant, SETTING)
        step = training_step(transformer, variant, SETTING)
        batch = make_batch(Variant("", resolution=32, micro_batch=2), SETTING)
        seen = [float(step(batch)) for _ in range(8)]
        assert seen[-1] < seen[0]
        losses[name] = seen[-1]
    assert losses["checkpointing"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["in backward"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["stochastic"] == pytest.approx(losses["plain"], rel=0.05)


@pytest.mark.parametrize("memory_gib", [78, 139])
def test_variants_are_named_once_and_begin_with_the_comparison(memory_gib: int) -> None:
    chosen = list(variants(memory_gib * 2**30))
    assert [variant.name for variant in chosen[:2]] == ["stock", "ours"]
    assert len({variant.name for variant in chosen}) == len(chosen) > 20
    assert not any("," in variant.name for variant in chosen)  # --variants splits at commas


# --- the script itself ---


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process that has no more than a GPU machine must have."""
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_ON_A_GPU_MACHINE}))\n"
        "runpy.run_module('benchmarks.flux_step', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )


def test_a_rehearsal_writes_what_a_run_would(tmp_path: Path) -> None:
    out = tmp_path / "tiny.json"
    chosen = "ours at 1024 batch 2,stock + cudnn attention,stock + bf16 states rounded stochastically"
    done = rehearse(
        *("--device", "cpu", "--tiny", "--warmup", "1", "--steps", "2", "--out", str(out), "--variants", chosen)
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["finished"]
    assert record["parameters"] < 10**6
    assert record["matmul_tflops"] > 0
    assert record["versions"]["torch"] == torch.__version__
    assert record["arguments"]["out"] == "tiny.json"
    by_name: dict[str, Any] = {row["name"]: row for row in record["rows"]}
    assert list(by_name) == ["ours at 1024 batch 2", *(name for name in by_name if name.startswith("stock"))]
    failed = by_name.pop("stock + cudnn attention")  # no CPU has it, and the run goes on
    assert failed["status"] == "failed"
    assert failed["error"]
    assert len(by_name) == 2
    for row in by_name.values():
        assert row["status"] == "ok", row
        assert row["loss_falls"]
        assert row["images_per_second"] == pytest.approx(row["micro_batch"] / row["seconds_per_step"])
        forward = record["forward_tflop_per_image"][str(row["resolution"])]
        assert row["model_tflops"] == pytest.approx(3 * forward * row["images_per_second"])
        assert row["name"] in done.stdout


def test_a_cpu_never_writes_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = RESULTS / "made-up.json"
    monkeypatch.setattr(sys, "argv", ["flux_step", "--device", "cpu", "--tiny", "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "it measures nothing" in capsys.readouterr().err
    assert not out.exists()
