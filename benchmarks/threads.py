"""One thread, two that spin while they wait for one another, two that sleep: seconds and processor seconds of each.

    python -m benchmarks.threads                # beside whatever else the machine does
    python -m benchmarks.threads --alone        # before all else, by real-time priority: as on an idle machine (root)

Four kinds of work at the demo's size: the U-Net draws, the U-Net trains, the autoencoder encodes, random-vgg judges.
Each is timed in a process of its own, in turns. The load of the machine is told with each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from cluster.environment import WAIT_POLICY

VARIANTS: Mapping[str, tuple[int, Mapping[str, str]]] = {
    "1 thread": (1, {}),
    "2 threads that spin": (2, {}),  # as GNU's OpenMP does by default
    "2 threads that sleep": (2, {WAIT_POLICY: "PASSIVE"}),
}
KINDS = {"draw": 6, "train": 3, "encode": 3, "judge": 1}
"""How often each is done."""
BATCH = 8


def work(kind: str) -> Callable[[], object]:
    """What is timed."""
    import torch

    from trainers.fidelity.extractors import kept_extractor
    from trainers.msdm.unet import build_unet
    from trainers.msdm.vae import build_vae
    from trainers.recipe import MSDMRecipe, load_recipe

    recipe = load_recipe(str(ROOT / "recipes/msdm-demo.yaml"))
    assert isinstance(recipe, MSDMRecipe)
    torch.manual_seed(0)
    if kind == "judge":
        extractor = kept_extractor("random-vgg:64", "cpu")
        pixels = torch.randint(0, 256, (BATCH, 64, 64, 3), dtype=torch.uint8)
        return lambda: extractor.features(pixels)
    if kind == "encode":
        vae, images = build_vae(recipe.vae.architecture, 64), torch.randn(BATCH, 3, 64, 64)
        return torch.no_grad()(lambda: vae.encode(images))
    unet = build_unet(recipe.denoiser.architecture, latent_channels=4, latent_side=16, embedding_dim=384)
    latents, prompts = torch.randn(BATCH, 4, 16, 16), torch.randn(BATCH, 32, 384)

    def predict() -> torch.Tensor:
        prediction: torch.Tensor = unet(latents, torch.tensor(5), prompts).sample
        return prediction

    return torch.no_grad()(predict) if kind == "draw" else lambda: predict().square().mean().backward()


def time_here(kind: str, threads: int) -> None:
    """Print (seconds, processor seconds) of the work, in this process."""
    import torch

    torch.set_num_threads(threads)
    once = work(kind)
    once()
    seconds, processor_seconds = time.perf_counter(), time.process_time()
    for _ in range(KINDS[kind]):
        once()
    print(json.dumps([time.perf_counter() - seconds, time.process_time() - processor_seconds]))


def time_in_process(kind: str, variant: str, *, alone: bool) -> list[float]:
    threads, environment = VARIANTS[variant]
    command = [sys.executable, "-m", "benchmarks.threads", "--kind", kind, "--threads", str(threads)]
    inherited = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    found = subprocess.run(
        ["chrt", "--rr", "1", *command] if alone else command,
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds: list[float] = json.loads(found.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        time_here(options.kind, options.threads)
        return
    result: dict[str, Any] = circumstances() | {"alone": options.alone, "loads": []}
    found: dict[tuple[str, str], list[list[float]]] = {(kind, name): [] for kind in KINDS for name in VARIANTS}
    for _ in range(options.rounds):
        result["loads"].append(round(os.getloadavg()[0], 1))
        for kind, name in found:
            found[kind, name].append(time_in_process(kind, name, alone=options.alone))
    result["rows"] = []
    for (kind, name), times in found.items():
        seconds, processor_seconds = (round(statistics.median(those), 3) for those in zip(*times, strict=True))
        result["rows"].append({"kind": kind, "variant": name, "seconds": seconds, "cpu_seconds": processor_seconds})
        print(f"{kind:8}{name:24}{seconds:8.2f} s {processor_seconds:8.2f} processor s", flush=True)
    name = f"{date.today()}-threads-{'alone' if options.alone else 'busy'}-cpu.json"
    (options.out or RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
