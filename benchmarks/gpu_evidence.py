"""What one GPU does with the product's own code, in nine minutes: speed, memory, and the whole way to a model.

    python -m benchmarks.gpu_evidence                                    # on a GPU, from the repository's root
    python -m benchmarks.gpu_evidence --parts machine,engine
    python -m benchmarks.gpu_evidence --device cpu --tiny --out tiny.json  # rehearse all of it, in two minutes

machine      versions, a bf16 matrix product, a copy, and the bf16 optimizer's update, eager and compiled
flux-512     flux_step's five rows that matter (four without torchao), 512 x 512
flux-1024    the same at 1024 x 1024
engine       the engine and objective of recipes/flux-full-1xh200.yaml at FLUX.1-dev's size, beside what `plan` says
layer-hooks  one row of the same, with DeepSpeed's hooks at each layer in place of each block
whole-way    a third of the blocks: shards, precomputed set, steps, two saves on end, resume, export, a picture
msdm         msdm_step at the study's size: micro-batch 16 and 64, compiled and not
tests        pytest -m gpu

Each part runs in a process of its own and is ended after four minutes, or when the time for all is over. As soon as it
is done, it is printed as one JSON line and the file is written anew. A part begins no further row if one as long as its
longest so far would not end in its time, and names the rows that it left out. A row that does not fit the GPU is
skipped, with the reason. Neither Ray nor MLflow is needed; benchmarks/README.md says which wheels are.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from benchmarks import flux_step
from benchmarks import whole_way as way
from benchmarks.circumstances import RESULTS, ROOT, circumstances
from benchmarks.flux_step import GIB, TINY, Variant, synchronize
from cluster.errors import first_line
from trainers.compiling import compile_forwards
from trainers.engines import zero3
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.engines.zero3 import Zero3Engine
from trainers.flux.architecture import FLUX_1_DEV
from trainers.flux.checkpointing import set_activation_checkpointing
from trainers.flux.footprint import footprint
from trainers.hardware import gpu_here, gpu_named, matmul_flops
from trainers.objectives import RectifiedFlowObjective
from trainers.plan import plan_flux
from trainers.recipe import FluxRecipe, load_recipe
from trainers.saving import SPARE, available_memory

KERNELS = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "gpu-evidence-kernels"))
PART_SECONDS = 240.0
ALL_SECONDS = 540.0
SHARES = {  # of the time for all
    "machine": 8,
    "flux-512": 17,
    "flux-1024": 15,
    "engine": 16,
    "layer-hooks": 5,
    "whole-way": 20,
    "msdm": 14,
    "tests": 5,
}
THIRD = {"num_layers": 6, "num_single_layers": 13}  # of 19 and 38
STEPS = 5
SAVE_EVERY = 4  # and after the last: two saves on end

Keep = Callable[[Mapping[str, Any]], None]
"""Writes what a part has found so far."""


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    device: torch.device
    is_tiny: bool
    seconds: float  # for this part
    ceiling: float | None  # FLOP/s of the bf16 matrix product, where another part has measured it

    @property
    def config(self) -> Mapping[str, Any]:
        return TINY if self.is_tiny else FLUX_1_DEV

    @property
    def tokens(self) -> int:
        return 8 if self.is_tiny else 512

    @property
    def memory_bytes(self) -> float:
        return torch.cuda.get_device_properties(0).total_memory if self.device.type == "cuda" else float("inf")

    def matmul_flops(self) -> float:
        return self.ceiling or matmul_flops(self.device, torch.bfloat16, side=256 if self.is_tiny else 8192)

    def as_flux_step(self) -> flux_step.Setting:
        return flux_step.Setting(
            device=self.device,
            config=self.config,
            tokens=self.tokens,
            warmup=2,
            steps=1 if self.is_tiny else 3,
            learning_rate=1e-3 if self.is_tiny else 1e-4,
            compile_backend="eager" if self.is_tiny else "inductor",
        )


class Clock:
    """Says whether a further row is likely to end in time: if one as long as the longest so far would."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.perf_counter() + seconds
        self._longest = 0.0

    def rows(self, names: Iterable[str], left_out: list[str]) -> Iterable[str]:
        """The names, as long as there is time; the rest goes into `left_out`."""
        for name in names:
            began = time.perf_counter()
            if began + self._longest > self._ends:
                left_out.append(name)
                continue
            yield name
            self._longest = max(self._longest, time.perf_counter() - began)


# --- machine ---


def machine(setting: Setting, keep: Keep) -> None:
    found: dict[str, Any] = {"matmul_tflops": setting.matmul_flops() / 1e12}
    found["copy_terabytes_per_second"] = copy_speed(setting) / 1e12
    keep(found)
    elements = 2**14 if setting.is_tiny else 2**29
    for name, backend in (("eager", None), ("compiled", "aot_eager" if setting.is_tiny else "inductor")):
        seconds = update_seconds(setting, elements, backend)
        found[f"bf16_adamw_{name}"] = {
            "elements": elements,
            "seconds_per_update": seconds,
            "bytes_per_second_at_14_a_parameter": 14 * elements / seconds,
            "seconds_for_flux": seconds * flux_step.PARAMETERS / elements,
        }
        keep(found)


def copy_speed(setting: Setting) -> float:
    """Bytes/s read and written, copying on the device."""
    source = torch.ones(2**14 if setting.is_tiny else 2**32, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), setting.device, repeats=10)


def update_seconds(setting: Setting, elements: int, backend: str | None) -> float:
    """Of one of 20 updates."""
    weight = nn.Parameter(torch.randn(elements, dtype=torch.bfloat16, device=setting.device))
    optimizer = Bf16AdamW([weight], learning_rate=1e-5, seed_of=lambda step: step, compile_backend=backend)
    weight.grad = torch.randn_like(weight)
    return timed(optimizer.step, setting.device, repeats=20)


def timed(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Seconds of one repetition, after one that is not counted."""
    work()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


# --- flux_step ---


def flux_rows(setting: Setting, keep: Keep, *, resolution: int) -> None:
    stock, ours = flux_step.stock_and_ours()
    small, large = (4, 8) if resolution == 512 else (1, 2)
    stock = replace(stock, resolution=resolution, micro_batch=small)
    ours = replace(ours, resolution=resolution, micro_batch=small)
    chosen = [
        stock,
        ours,
        replace(ours, name="ours, larger batch", micro_batch=large),
        replace(stock, name="stock + compile", compile=True),
    ]
    skipped: dict[str, str] = {}
    if flux_step.has_package("torchao"):
        chosen.append(replace(ours, name="ours + fp8", micro_batch=large, fp8=True))
    else:
        skipped["ours + fp8"] = "torchao is not installed"
    for variant in list(chosen):
        if lack := lacking(setting, variant_bytes(variant)):
            chosen.remove(variant)
            skipped[variant.name] = lack
    if setting.is_tiny:
        chosen = flux_step.rehearsed(chosen)
    record = flux_step.Record(setting.as_flux_step(), ceiling=setting.matmul_flops())
    left_out: list[str] = []
    by_name = {variant.name: variant for variant in chosen}
    for name in Clock(setting.seconds).rows(by_name, left_out):
        record.add(by_name[name])
        keep(record.document | {"skipped": skipped, "left_out": left_out})
    keep(record.document | {"skipped": skipped, "left_out": left_out})


def variant_bytes(variant: Variant) -> float:
    """A rough guide to what is worth trying: weights, gradients unless each is dropped at once, moments, and the
    activations that trainers/flux/footprint.py counts for an image of 512 x 512."""
    moments = 2 if variant.optimizer == "adamw-8bit" else 4
    states = (2 + moments + (0 if variant.update_in_backward else 2)) * flux_step.PARAMETERS
    # Compiled blocks without checkpointing keep about what selective checkpointing does.
    per_image = {"full": 0.9, "selective": 5.5, "none": 5.5 if variant.compile else 13.2}[variant.checkpointing] * GIB
    return states + variant.micro_batch * per_image * (variant.resolution / 512) ** 2 + 4 * GIB


# --- engine ---


def engine(setting: Setting, keep: Keep) -> None:
    """Rows differ in micro-batch, and in whether blocks are compiled."""
    engine_rows(setting, keep, ["2", "2 compiled"] if setting.is_tiny else ["4", "8", "8 compiled", "4 compiled", "1"])


def layer_hooks(setting: Setting, keep: Keep) -> None:
    """In a process of its own: DeepSpeed keeps an engine's memory as long as its process lives."""
    with hooks_at_each_layer():
        engine_rows(setting, keep, ["2" if setting.is_tiny else "4"])


def engine_rows(setting: Setting, keep: Keep, names: Sequence[str]) -> None:
    """With the recipe's settings; a row's name is its micro-batch. The first that fails is the last."""
    recipe = load_recipe(str(ROOT / "recipes/flux-full-1xh200.yaml"))
    assert isinstance(recipe, FluxRecipe)
    gpu = gpu_here() or gpu_named("h200")
    plans = {
        size: plan_flux(with_micro_batch(recipe, size), num_gpus=1, gpu=gpu, price_per_gpu_hour=None)
        for size in sorted({int(name[0]) for name in names})
    }
    found: dict[str, Any] = {"recipe": recipe.name, "matmul_tflops": setting.matmul_flops() / 1e12, "rows": []}
    if lack := lacking(setting, min(plan.gpu_bytes for plan in plans.values())):
        keep(found | {"skipped": lack})
        return
    trained = build_engine(setting, recipe)
    is_compiled = False
    left_out: list[str] = []
    for name in Clock(setting.seconds).rows(names, left_out):
        size, plan = int(name[0]), plans[int(name[0])]
        if "compiled" in name and not is_compiled:
            assert isinstance(trained.model.module, nn.Module)
            compile_forwards(trained.model.module, backend="eager" if setting.is_tiny else "inductor")
            is_compiled = True
        row = {"row": name, "micro_batch": size, "planned_gib": plan.gpu_bytes / GIB}
        row |= {"planned_images_per_second": plan.images_per_second}
        if lack := lacking(setting, plan.gpu_bytes):
            row["skipped"] = lack
        else:
            try:
                row |= engine_row(setting, trained, size, recipe)
            except RuntimeError as error:  # such as out of memory, after which the engine is in no state to go on
                row["failed"] = f"{type(error).__name__}: {first_line(error)}"
        found["rows"].append(row)
        keep(found | {"left_out": left_out})
        if "failed" in row:
            break
        free(setting)
    keep(found | {"left_out": left_out})


def lacking(setting: Setting, needed: float) -> str | None:
    """Why something does not fit the GPU, if it does not."""
    if setting.is_tiny or needed <= setting.memory_bytes:
        return None
    return f"needs {needed / GIB:.0f} GiB, the GPU has {setting.memory_bytes / GIB:.0f}"


def engine_row(setting: Setting, trained: Zero3Engine, size: int, recipe: FluxRecipe) -> dict[str, Any]:
    """Steps on one repeated batch, passes and update timed apart; the rate is that of the recipe's global batch."""
    objective = RectifiedFlowObjective()
    resolution = 32 if setting.is_tiny else recipe.data.resolution
    batch = flux_step.make_batch(Variant("", resolution=resolution, micro_batch=size), setting.as_flux_step())
    passes = 2 if setting.is_tiny else max(1, 8 // size)
    seconds: dict[str, list[float]] = {"pass": [], "update": []}
    losses = []
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        total = torch.zeros((), device=setting.device)
        synchronize(setting.device)
        began = time.perf_counter()
        for number in range(passes):
            with trained.micro_batch(is_last=number == passes - 1), trained.autocast():
                loss = objective(trained.model, **batch).mean() / passes
                trained.backward(loss)
            total += loss.detach()
        synchronize(setting.device)
        between = time.perf_counter()
        outcome = trained.step(1e-5, total, stop_requested=False).read()
        synchronize(setting.device)
        seconds["pass"].append((between - began) / passes)
        seconds["update"].append(time.perf_counter() - between)
        losses.append(outcome.loss)
    a_pass, update = min(seconds["pass"][1:]), min(seconds["update"][1:])
    images = recipe.transformer.training.global_batch_size
    rate = images / (images / size * a_pass + update)
    counted = footprint(setting.config, resolution=resolution, max_tokens=setting.tokens, checkpointing="none")
    on_gpu = setting.device.type == "cuda"
    return {
        "seconds_per_pass": a_pass,
        "seconds_per_update": update,
        "images_per_second": rate,
        "share_of_matmul": 3 * counted.forward_flops * rate / setting.matmul_flops(),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        "losses": losses,
    }


def build_engine(setting: Setting, recipe: FluxRecipe) -> Zero3Engine:
    """With random weights."""
    settings = recipe.transformer
    how: dict[str, Any] = {"optimizer_states": settings.optimizer_states, "deepspeed_keys": settings.deepspeed}
    torch.manual_seed(0)
    with zero3.zero3_partitioned(settings.training, **how):
        transformer = FluxTransformer2DModel.from_config(dict(setting.config))
    set_activation_checkpointing(transformer, settings.activation_checkpointing)
    return Zero3Engine(transformer, settings.training, setting.device, **how)


@contextmanager
def hooks_at_each_layer() -> Iterator[None]:
    """As DeepSpeed has them unless told otherwise."""
    original = zero3.gather_by_block
    zero3.gather_by_block = lambda model: None
    try:
        yield
    finally:
        zero3.gather_by_block = original


def with_micro_batch(recipe: FluxRecipe, size: int) -> FluxRecipe:
    document = recipe.model_dump()
    document["transformer"]["training"]["micro_batch_size"] = size
    return FluxRecipe.model_validate(document)


def free(setting: Setting) -> None:
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


# --- whole way ---


def whole_way(setting: Setting, keep: Keep) -> None:
    """By the functions that `medsynth` calls, one rank, in this process."""
    config = dict(setting.config) | ({} if setting.is_tiny else THIRD)
    parameters = way.parameters_of(config)
    needed = {
        "GiB of GPU memory": (10 * parameters + 20 * GIB, setting.memory_bytes),
        # What the copy of a checkpoint is asked to leave free counts, and this process.
        "GiB of host memory": (SPARE * 6 * parameters + 6 * GIB, available_memory()),
    }
    with tempfile.TemporaryDirectory(prefix="gpu-evidence-") as folder:
        # A checkpoint takes 6 bytes a parameter, the model before the training and the one after it 2 each.
        needed["GiB of disk"] = (11 * parameters, way.free_disk(Path(folder)))
        for what, (wanted, there) in needed.items():
            if not setting.is_tiny and wanted > there:
                keep({"skipped": f"needs {wanted / GIB:.0f} {what}, there are {there / GIB:.0f}"})
                return
        found: dict[str, Any] = {"parameters": parameters, "seconds": {}}
        found["available_host_gib"] = available_memory() / GIB

        def keep_partial(partial: Mapping[str, Any]) -> None:
            keep(found | {"in_training": partial})

        how: dict[str, Any] = {"is_tiny": setting.is_tiny, "steps": STEPS, "save_every": SAVE_EVERY}
        for name, result in way.stages(Path(folder), config, setting.device, **how, keep=keep_partial):
            found["seconds"][name] = result.pop("seconds")
            found |= result
            keep(found)


# --- msdm ---


def msdm(setting: Setting, keep: Keep) -> None:
    if setting.is_tiny:
        runs = {"2": ["--batch", "2", "--steps", "2", "--warmup", "1", "--threads", "2", "--tiny"]}
    else:
        usual = ["--warmup", "20", "--steps", "40", "--checkpoint-every", "1000", "--channels-last"]
        runs = {  # what takes longest comes last
            "64": ["--batch", "64", *usual],
            "16": ["--batch", "16", *usual],
            "64, the study's method": ["--batch", "64", *usual],
            "64 compiled": ["--batch", "64", "--compile", *usual],
            "16 compiled": ["--batch", "16", "--compile", *usual],
        }
    found: dict[str, Any] = {}
    left_out: list[str] = []
    for name in Clock(setting.seconds).rows(runs, left_out):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "row.json"
            contender = "study" if "study" in name else "ours"
            command = [sys.executable, "-m", "benchmarks.msdm_step", "--device", setting.device.type, *runs[name]]
            done = subprocess.run(
                [*command, "--contenders", contender, "--out", str(out)], capture_output=True, text=True
            )
            if done.returncode:
                found[name] = {"failed": done.stderr.strip().splitlines()[-20:]}
            else:
                document = json.loads(out.read_text())
                found[name] = document["median"][contender] | document["turns"][contender][0]
        keep({"rows": found, "left_out": left_out})
    keep({"rows": found, "left_out": left_out})


# --- tests ---


def tests(setting: Setting, keep: Keep) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "tests/trainers/test_gpu.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    keep({"exit_code": done.returncode, "output": (done.stdout + done.stderr).strip().splitlines()[-30:]})
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}")


PARTS: dict[str, Callable[[Setting, Keep], None]] = {
    "machine": machine,
    "flux-512": lambda setting, keep: flux_rows(setting, keep, resolution=512),
    "flux-1024": lambda setting, keep: flux_rows(setting, keep, resolution=1024),
    "engine": engine,
    "layer-hooks": layer_hooks,
    "whole-way": whole_way,
    "msdm": msdm,
    "tests": tests,
}


# --- the run ---


def run_part(
    name: str, arguments: argparse.Namespace, *, seconds: float, limit: float, ceiling: float | None
) -> dict[str, Any]:
    """One part in a process of its own, which aims at `seconds` and is ended after `limit`: its result, also where it
    failed or was ended."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result, errors = Path(folder) / "result.json", Path(folder) / "stderr"
        command = [sys.executable, "-m", "benchmarks.gpu_evidence", "--device", arguments.device, "--part", name]
        command += ["--result", str(result), "--seconds", str(seconds), "--ceiling", str(ceiling or 0)]
        command += ["--tiny"] if arguments.tiny else []
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                # What a part leaves behind when it is ended goes with its folder. Compiled kernels serve the next part.
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": folder, "TORCHINDUCTOR_CACHE_DIR": KERNELS},
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
            status = wait(child, limit)
        found = {"part": name, "status": status, "seconds": time.perf_counter() - began}
        if status != "ok":
            found["error"] = errors.read_text(errors="replace").strip().splitlines()[-30:]
        return found | {"result": json.loads(result.read_text()) if result.exists() else None}


def wait(child: "subprocess.Popen[bytes]", seconds: float) -> str:
    try:
        return "ok" if child.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # the child, or what it left behind
        child.wait()


def run_all(names: list[str], arguments: argparse.Namespace) -> bool:
    """Each part in turn, what is left of the time shared out by weight. Whether all went well."""
    ends = time.perf_counter() + arguments.seconds
    document: dict[str, Any] = circumstances(arguments.device) | {"benchmark": "gpu_evidence", "parts": {}}
    ceiling = None
    for number, name in enumerate(names):
        left = ends - time.perf_counter()
        share = SHARES[name] / sum(SHARES[later] for later in names[number:])
        if left <= 0:
            found: dict[str, Any] = {"part": name, "status": "not begun", "error": ["the time for all parts was over"]}
        else:
            seconds, limit = min(0.9 * PART_SECONDS, share * left), min(PART_SECONDS, left)
            found = run_part(name, arguments, seconds=seconds, limit=limit, ceiling=ceiling)
        if name == "machine" and found.get("result"):
            ceiling = found["result"]["matmul_tflops"] * 1e12
        document["parts"][name] = found
        flux_step.write(document, arguments.out)
        print(json.dumps(found), flush=True)
    return all(part["status"] == "ok" for part in document["parts"].values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", help=f"comma-separated: {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of some thousand weights, to rehearse")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all parts together")
    parser.add_argument("--out", type=Path, help="JSON file; on a GPU a dated one in benchmarks/results by default")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        left = arguments.seconds - (time.time() - psutil.Process().create_time())  # importing takes its share
        setting = Setting(torch.device(arguments.device), arguments.tiny, left, arguments.ceiling or None)
        PARTS[arguments.part](setting, lambda found: flux_step.write(found, arguments.result))
        return
    names = arguments.parts.split(",") if arguments.parts else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts {unknown[0]}: there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny --out FILE rehearses")
    if arguments.device == "cpu":
        if not arguments.tiny:
            parser.error("--device cpu needs --tiny: the true sizes would take a CPU hours")
        if arguments.out is None or RESULTS in arguments.out.resolve().parents:
            parser.error("--device cpu needs --out, elsewhere than in benchmarks/results: it measures nothing")
    if arguments.out is None:
        gpu = torch.cuda.get_device_name().lower().replace("nvidia", "").strip().replace(" ", "-")
        arguments.out = RESULTS / f"{date.today()}-gpu-evidence-{gpu}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work is ended with this
    sys.exit(0 if run_all(names, arguments) else 1)


if __name__ == "__main__":
    main()
