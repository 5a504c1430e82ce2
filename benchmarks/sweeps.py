"""Sweeps beside what people do without them.

    python -m benchmarks.sweeps guidance --model runs/msdm-demo/… --data demo/shards --extractor random-vgg:64

guidance: a guidance sweep beside the naive loop, one `medsynth evaluate` for each setting, one after the other. Each
process of the loop opens model and extractor and looks at the real images anew; the sweep opens them once in each
of two actors (Ray's start is counted), looks at the real images once, and measures while it draws. The model should be
a trained one and the images real, for then the figures mean something: they must be the same in both ways.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweeps.guidance_document import GuidanceSweep
from trainers.fidelity.evaluation import Evaluation

SWEEP = """
import sys, json
from sweeps.guidance import sweep_guidance
asked = json.loads(sys.argv[1])
sweep_guidance(asked.pop("model"), asked.pop("data"), asked.pop("out"), **asked)
"""


def naive_loop(options: argparse.Namespace, settings: list[dict[str, Any]], out: Path) -> dict[str, Evaluation]:
    """What someone types, once for each setting."""
    found = {}
    for number, setting in enumerate(settings):
        place = out / str(number)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in setting.items()]
        command = [sys.executable, "-m", "medsynth", "evaluate", options.model, "--data", options.data, *flags]
        command += ["--num-samples", str(options.num_samples), "--extractor", options.extractor, "--no-record"]
        # A cache of its own each: to share one is what the sweep does.
        command += ["--out", str(place), "--cache", str(place / "features"), "--device", "cpu"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found[json.dumps(setting, sort_keys=True)] = Evaluation.load(str(place))
    return found


def one_sweep(options: argparse.Namespace, out: Path) -> GuidanceSweep:
    asked = {
        "model": options.model,
        "data": options.data,
        "out": str(out),
        "guidance_scales": options.scales,
        "num_inference_steps": options.steps,
        "samplers": options.samplers,
        "num_samples": options.num_samples,
        "extractors": [options.extractor],
        "num_workers": options.workers,
        "device": "cpu",
    }
    subprocess.run([sys.executable, "-c", SWEEP, json.dumps(asked)], check=True, stdout=subprocess.DEVNULL)
    return GuidanceSweep.load(str(out))


def guidance(options: argparse.Namespace) -> None:
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        started = time.perf_counter()
        sweep = one_sweep(options, Path(temporary) / "sweep")
        swept = time.perf_counter() - started
        print(f"sweep of {len(sweep.settings)} settings: {swept:.1f} s", flush=True)
        started = time.perf_counter()
        loop = naive_loop(options, [result.setting for result in sweep.settings], Path(temporary) / "loop")
        looped = time.perf_counter() - started
        print(f"naive loop: {looped:.1f} s, {looped / swept:.2f} times the sweep's", flush=True)
    rows = []
    for result in sweep.settings:
        alone = loop[json.dumps(result.setting, sort_keys=True)]
        figures = {
            name: {"sweep": result.measures[name].value, "loop": alone.measures[name].value}
            for name in (sweep.fidelity, sweep.alignment)
        }
        rows.append({"setting": result.setting, "in_front": result.name in sweep.front} | figures)
    document = {
        "date": date.today().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before": load_before,
        "versions": {name: version(name) for name in ("torch", "ray", "diffusers")},
        "git_commit": sweep.git_commit,
        "num_samples": options.num_samples,
        "num_real_images": sweep.reference.num_images,
        "extractor": options.extractor,
        "actors": options.workers,
        "seconds": {"sweep": swept, "naive loop": looped},
        "ratio": looped / swept,
        "recommended": sweep.best.setting,
        "settings": rows,
    }
    out = options.out or Path(f"benchmarks/results/{date.today()}-guidance-sweep-cpu.json")
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    options = kinds.add_parser("guidance", help="beside one evaluation for each setting")
    options.set_defaults(run=guidance)
    options.add_argument("--model", required=True)
    options.add_argument("--data", required=True)
    options.add_argument("--extractor", default="random-vgg:64")
    options.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0, 3.5, 5.0])
    options.add_argument("--steps", type=int, nargs="+", default=[10])
    options.add_argument("--samplers", nargs="+", default=["ddim", "dpm-solver++"])
    options.add_argument("--num-samples", type=int, default=32)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--out", type=Path, help="JSON; default: benchmarks/results/DATE-guidance-sweep-cpu.json")
    chosen = parser.parse_args()
    chosen.run(chosen)


if __name__ == "__main__":
    main()
