"""Sweeps beside what people do without them.

    python -m benchmarks.sweeps search --keep search                     # ASHA with TPE, random search and a grid
    python -m benchmarks.sweeps overhead                                 # a sweep beside its bare trials
    python -m benchmarks.sweeps guidance --model runs/msdm-demo/… --data demo/shards --extractor random-vgg:64

search: over learning rate and warm-up of a small MSDM on real images, how many training steps does ASHA with TPE take
to come within 2 % of a grid's best loss, and how many does random search?

overhead: what Ray Tune, journal and MLflow add to trials that `train_recipe` could as well train in a loop.

guidance: a guidance sweep beside the naive loop, one `medsynth evaluate` for each setting, one after the other. Each
process of the loop opens model and extractor and looks at the real images anew; the sweep opens them once in each
of two actors (Ray's start is counted), looks at the real images once, and measures while it draws. The model should be
a trained one and the images real, for then the figures mean something: they must be the same in both ways.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import sweep_trials
from benchmarks.circumstances import RESULTS, circumstances
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
    here = circumstances()
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
        **here,
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
    out = options.out or RESULTS / f"{date.today()}-guidance-sweep-cpu.json"
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

    options = kinds.add_parser("search", help="ASHA with TPE beside random search and a grid")
    options.set_defaults(run=lambda chosen: sweep_trials.search(**_values(chosen)))
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the searches; the trials' stays")
    options.add_argument("--trials", type=int, default=12, help="of each search")
    options.add_argument("--num-rates", type=int, default=9, help="of the grid, for each of two warm-ups")
    options.add_argument("--grace-steps", type=int, default=20)
    options.add_argument("--reduction", type=float, default=3)
    options.add_argument("--steps", type=int, default=180, help="of a trial")
    _common(options, "search")

    options = kinds.add_parser("overhead", help="a sweep beside its bare trials")
    options.set_defaults(run=lambda chosen: sweep_trials.overhead(**_values(chosen)))
    options.add_argument("--trials", type=int, default=4)
    options.add_argument("--steps", type=int, default=240, help="of a trial")
    _common(options, "overhead", concurrency=1)

    chosen = parser.parse_args()
    chosen.run(chosen)


def _common(options: argparse.ArgumentParser, kind: str, concurrency: int = 2) -> None:
    options.add_argument("--vae-steps", type=int, default=300, help="of the autoencoder that all trials share")
    options.add_argument("--concurrency", type=int, default=concurrency, help="trials at a time")
    options.add_argument("--keep", type=Path, help="folder in which a benchmark that was cut off goes on")
    options.add_argument("--out", type=Path, help=f"JSON; default: benchmarks/results/DATE-sweep-{kind}-cpu.json")


def _values(chosen: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(chosen).items() if name != "run"}


if __name__ == "__main__":
    main()
