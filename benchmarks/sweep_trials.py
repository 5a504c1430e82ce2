"""Sweeps over recipes: how many steps a good recipe takes to find, and what a sweep costs beyond its trials.

Run by benchmarks/sweeps.py. All trials train one small MSDM on the colonoscopy frames of the tests, in the latents of
one autoencoder that is trained beforehand and given to each sweep, so that losses compare to the last digit.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from sweeps.journal import Journal
from sweeps.spec import SweepSpec, Trial
from trainers.recipe import MSDMRecipe, Recipe, dump_recipe, load_recipe
from trainers.run_folder import RunFolder

if TYPE_CHECKING:  # Ray takes seconds to import, which belong to what is measured
    from trainers.launch import Progress

METRIC = "denoiser/validation_loss"
RATE, WARMUP = "denoiser.training.learning_rate", "denoiser.training.warmup_steps"
RATES, WARMUPS = (1e-4, 1e-2), (0, 50)
STOPPED = "stopped; with --keep, the same command goes on"
NEAR = 1.02
"""A loss is as good as the grid's best up to this factor."""

# The demo's recipe in small: latents of 8 x 8 x 8 and a U-Net of 3 M parameters, one process and one thread a trial.
SMALL = (
    "data.num_workers=0",
    "vae.architecture.block_out_channels=[8, 16, 32, 32]",
    "vae.architecture.latent_channels=8",
    "vae.kl_weight=1e-6",
    "vae.training.global_batch_size=8",
    "vae.training.warmup_steps=60",
    "vae.training.micro_batch_size=8",
    "vae.training.preview_every_steps=1000000",
    "denoiser.architecture.block_out_channels=[32, 64, 96]",
    "denoiser.training.global_batch_size=16",
    "denoiser.training.micro_batch_size=16",
    "denoiser.training.learning_rate_schedule=constant",  # a trial's loss at a step is the loss of a run so long
    "denoiser.training.validate_every_steps=20",
    "denoiser.training.checkpoint_every_steps=1000000",  # the last step does so in any case
    "denoiser.training.preview_every_steps=1000000",
    "sampling.prompts=[Generate an image with a large polyp.]",
    "sampling.num_inference_steps=10",
    "cluster.num_workers=1",
    "cluster.keep_checkpoints=1",
    "tracking.experiment=sweeps",
    "tracking.register_as=null",
)


class Lines:
    """Watches a sweep: a line when a trial begins or ends."""

    def __init__(self) -> None:
        self._states: dict[int, str] = {}

    def show(self, trials: Sequence[Trial], steps: int) -> None:
        for trial in trials:
            if self._states.get(trial.number) != trial.state:
                self._states[trial.number] = trial.state
                loss = "" if trial.value is None else f"  loss {trial.value:.5f} at step {trial.steps}/{steps}"
                values = "  ".join(f"{key.rpartition('.')[2]} {value:.4g}" for key, value in trial.params.items())
                self.say(f"trial {trial.number} {trial.state}: {values}{loss}  {trial.seconds:.1f} s")

    def say(self, line: str) -> None:
        print(f"  {line}", flush=True)

    def show_training(self, progress: "Progress") -> None:
        losses = "  ".join(f"{name} {value:.5f}" for name, value in progress.metrics.items() if "loss" in name)
        self.say(f"{progress.stage} {progress.step}/{progress.steps}  {losses}")


# --- what all trials share ---


@contextmanager
def workplace(keep: Path | None, asked: Mapping[str, Any]) -> Iterator[Path]:
    """The folder `keep`, where a killed benchmark goes on, or one that is gone afterwards; MLflow's database is in it.

    Raises SystemExit if the folder was begun with other options.
    """
    with TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / "asked.json"
        if begun.exists() and json.loads(begun.read_text()) != asked:
            raise SystemExit(f"{folder} was begun with other options: {begun.read_text()}")
        begun.write_text(json.dumps(asked))
        os.environ |= {
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        yield folder


def prepare(folder: Path, *, steps: int, vae_steps: int) -> Recipe:
    """Write the shards and the recipe, and train the autoencoder, unless an earlier start has done so."""
    from trainers.launch import RunStopped, train_recipe

    write_frames(str(folder / "shards"), resize=64)
    recipe = small_recipe(folder, steps=steps, vae_steps=vae_steps)
    _recipe_file(folder).write_text(dump_recipe(recipe))
    if not _shared(folder).has_model("vae"):
        lines = Lines()
        try:
            train_recipe(
                recipe,
                "shared",
                on_progress=lines.show_training,
                on_stop_requested=lambda: lines.say("Stopping: saving the state."),
                until="vae",
            )
        except RunStopped:
            raise SystemExit(STOPPED) from None
    return recipe


def write_frames(shards: str, *, resize: int | None) -> None:
    """The colonoscopy frames of the tests as shards."""
    from data_shards import Settings, write_shards
    from data_shards.sources import medvqa_records

    images = str(ROOT / "tests/data/colonoscopy")
    splits = {"train": 0.8, "validation": 0.1, "test": 0.1}
    settings = Settings("colonoscopy", splits, samples_per_shard=100, resize=resize)
    write_shards(medvqa_records(images), shards, settings, source={"format": "medvqa", "uri": images})


def small_recipe(folder: Path, *, steps: int, vae_steps: int) -> MSDMRecipe:
    own = (
        f"data.shards={folder}/shards",
        f"cluster.storage={folder}/runs",
        f"vae.training.steps={vae_steps}",
        f"vae.training.validate_every_steps={vae_steps}",
        f"vae.training.checkpoint_every_steps={vae_steps}",
        f"denoiser.training.steps={steps}",
    )
    recipe = load_recipe(str(ROOT / "recipes/msdm-demo.yaml"), [*SMALL, *own])
    assert isinstance(recipe, MSDMRecipe)
    return recipe


def _recipe_file(folder: Path) -> Path:
    return folder / "recipe.yaml"


def _shared(folder: Path) -> RunFolder:
    return RunFolder(str(folder / "runs/shared"))


def _give_autoencoder(folder: Path, run: RunFolder) -> None:
    """Put the trained autoencoder where `run` would leave its own, so that it trains none, and share its latents."""
    shutil.copytree(_shared(folder).model("vae"), run.model("vae"), dirs_exist_ok=True)
    run.borrow_precomputed(_shared(folder))


# --- search: steps to a good recipe ---


def spec_of(
    method: str,
    recipe: Path,
    *,
    seed: int = 0,
    trials: int = 12,
    num_rates: int = 9,
    grace_steps: int = 20,
    reduction: float = 3,
    concurrency: int = 2,
) -> SweepSpec:
    """Of `grid`, every trial to its end; `random`, the same without a grid; `asha-tpe`, which learns and stops."""
    low, high = RATES
    document: dict[str, Any] = {
        "name": method if method == "grid" else f"{method}-{seed}",
        "recipe": str(recipe),
        "space": {RATE: {"loguniform": RATES}, WARMUP: {"choice": WARMUPS}},
        "objective": {"metric": METRIC},
        "search": {"grid": "grid", "random": "random", "asha-tpe": "optuna"}[method],
        "seed": seed,
        "concurrency": concurrency,
        "budget": {"trials": trials},
    }
    if method == "grid":
        rates = [low * (high / low) ** (place / (num_rates - 1)) for place in range(num_rates)]
        document |= {"space": {RATE: {"grid": rates}, WARMUP: {"grid": WARMUPS}}, "budget": {}}
    if method == "asha-tpe":
        document["scheduler"] = {"kind": "asha", "grace_steps": grace_steps, "reduction": reduction}
    return SweepSpec.model_validate(document)


def search(
    *, keep: Path | None, seeds: Sequence[int], steps: int, vae_steps: int, out: Path | None, **asked: Any
) -> None:
    """Grid, random search and ASHA with TPE, one after the other; `asked` are arguments of `spec_of`."""
    here = circumstances()
    with workplace(keep, {"steps": steps, "vae_steps": vae_steps, **asked}) as folder:
        prepare(folder, steps=steps, vae_steps=vae_steps)
        recipe = _recipe_file(folder)
        seeded = [(name, seed) for name in ("asha-tpe", "random") for seed in seeds]
        specs = [spec_of(name, recipe, seed=seed, **asked) for name, seed in [("grid", 0), *seeded]]
        rows = [_row_of_sweep(folder, spec) for spec in specs]
        document = {
            **here,
            "asked": {"steps": steps, "vae_steps": vae_steps, "seeds": list(seeds), **asked},
            "recipe": _recipe_file(folder).read_text(),
            "sweeps": beside_grid(rows),
        }
    for row in document["sweeps"]:
        print(
            f"{row['name']}: {row['num_trials']} trials, {row['steps']} steps ({row['steps_beside_grid']:.3f} of the "
            f"grid's), best loss {row['best']['value']:.5f} ({row['loss_beside_grid']:.4f} of the grid's), "
            f"within {NEAR - 1:.0%} after {row['steps_until_near']} steps, {row['seconds'] or float('nan'):.0f} s"
        )
    _write(document, out or RESULTS / f"{date.today()}-sweep-search-cpu.json")


def _row_of_sweep(folder: Path, spec: SweepSpec) -> dict[str, Any]:
    """Run a sweep and keep what came of it; one that an earlier start ended is not run again."""
    from sweeps.tune import SweepStopped, run_sweep

    kept = folder / f"{spec.name}.json"
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text())
        return row
    journal = Journal(str(folder / "runs" / spec.name))
    is_new = not (folder / "runs" / spec.name / "sweep.yaml").exists()
    if is_new:
        _give_autoencoder(folder, RunFolder(f"{journal.uri}/{journal.shared_run}"))
    print(f"{spec.name}:", flush=True)
    load_before, started = os.getloadavg()[0], time.perf_counter()
    try:
        swept = run_sweep(spec, spec.name, is_new=is_new, watch=Lines())
    except SweepStopped:
        raise SystemExit(STOPPED) from None
    if swept.best is None:
        raise SystemExit(f"{spec.name}: no trial was trained to its end")
    row = {
        "name": spec.name,
        "spec": spec.model_dump(mode="json"),
        "load_before": load_before,
        "seconds": time.perf_counter() - started if is_new else None,  # of one that was cut off nobody knows
        "num_trials": len(swept.trials),
        "steps": sum(trial.steps for trial in swept.trials),
        "best": {"number": swept.best.number, "params": swept.best.params, "value": swept.best.value},
        "trials": [_as_row(trial) for trial in swept.trials],
    }
    kept.write_text(json.dumps(row))
    shutil.rmtree(journal.uri)  # a hundred MB a trial
    return row


def _as_row(trial: Trial) -> dict[str, Any]:
    row = asdict(trial)
    del row["run_id"]
    return row


def beside_grid(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, the grid's first, with how each fared beside it."""
    steps, loss = rows[0]["steps"], rows[0]["best"]["value"]
    return [
        {
            "steps_beside_grid": row["steps"] / steps,
            "loss_beside_grid": row["best"]["value"] / loss,
            "steps_until_near": steps_until(row["trials"], NEAR * loss),
            **row,
        }
        for row in rows
    ]


def steps_until(trials: Sequence[Mapping[str, Any]], loss: float) -> int | None:
    """Steps of all trials up to the first that was trained to its end and came to `loss`; None if none did."""
    total = 0
    for trial in trials:
        total += int(trial["steps"])
        if trial["state"] == "finished" and trial["value"] <= loss:
            return total
    return None


# --- overhead: a sweep beside its bare trials ---


def overhead(*, keep: Path | None, trials: int, steps: int, vae_steps: int, concurrency: int, out: Path | None) -> None:
    here = circumstances()
    asked = {"trials": trials, "steps": steps, "vae_steps": vae_steps, "concurrency": concurrency}
    with workplace(keep, asked) as folder:
        recipe = prepare(folder, steps=steps, vae_steps=vae_steps)
        rates = [1e-3 * 2**-number for number in range(trials)]
        # The sweep first: what the machine has still to read from disk is at its expense.
        sides = {
            name: _in_fresh_process(side, folder, recipe, rates, concurrency)
            for name, side in (("sweep", _sweep), ("bare", _bare))
        }
    sweep, bare = sides["sweep"], sides["bare"]
    losses_agree = [row["loss"] for row in sweep["trials"]] == [row["loss"] for row in bare["trials"]]
    added = sweep["seconds"] / bare["seconds"] - 1
    print(
        f"the sweep's overhead: {added:.1%}; its losses {'are' if losses_agree else 'are NOT'} those of the bare runs"
    )
    document = {
        **here,
        "asked": asked,
        "overhead": added,
        "losses_agree": losses_agree,
        **sides,
    }
    _write(document, out or RESULTS / f"{date.today()}-sweep-overhead-cpu.json")


def _in_fresh_process(side: Any, folder: Path, recipe: Recipe, rates: Sequence[float], concurrency: int) -> Any:
    """What `side` returns, and the seconds it took from an empty process on, with imports and Ray's start."""
    load_before, started = os.getloadavg()[0], time.perf_counter()
    process: Executor
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        trials = process.submit(side, folder, recipe, rates, concurrency).result()
        seconds = time.perf_counter() - started
    print(f"{side.__name__.strip('_')}: {seconds:.1f} s", flush=True)
    return {"seconds": seconds, "load_before": load_before, "trials": trials}


def _sweep(folder: Path, recipe: Recipe, rates: Sequence[float], concurrency: int) -> list[dict[str, float]]:
    from sweeps.tune import run_sweep

    spec = SweepSpec.model_validate(
        {
            "name": "sweep",
            "recipe": str(_recipe_file(folder)),
            "space": {RATE: {"grid": rates}},
            "objective": {"metric": METRIC},
            "search": "grid",
            "concurrency": concurrency,
        }
    )
    journal = Journal(f"{recipe.cluster.storage}/sweep")
    shutil.rmtree(journal.uri, ignore_errors=True)
    _give_autoencoder(folder, RunFolder(f"{journal.uri}/{journal.shared_run}"))
    swept = run_sweep(spec, journal.name, is_new=True, watch=Lines())
    assert all(trial.state == "finished" and trial.value is not None for trial in swept.trials)
    return [{"loss": trial.value or 0, "seconds": trial.seconds} for trial in swept.trials]


def _bare(folder: Path, recipe: Recipe, rates: Sequence[float], concurrency: int) -> list[dict[str, float]]:
    """The loop that someone writes: one recipe after the other under one Ray, or a few side by side."""
    from cluster import runtime
    from trainers.launch import train_recipe

    def train(number: int) -> dict[str, float]:
        started = time.perf_counter()
        own = load_recipe(str(_recipe_file(folder)), [f"{RATE}={rates[number]:.17f}"])
        run = RunFolder.of(own, f"bare-{number}")
        shutil.rmtree(run.uri, ignore_errors=True)
        _give_autoencoder(folder, run)
        trained = train_recipe(own, f"bare-{number}", on_progress=lambda _: None, on_stop_requested=lambda: None)
        seconds = time.perf_counter() - started
        print(f"  bare {number}: {seconds:.1f} s", flush=True)
        return {"loss": trained.metrics[METRIC], "seconds": seconds}

    with runtime.connect(min_cpus=concurrency), ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(train, range(len(rates))))


def _write(document: Mapping[str, Any], out: Path) -> None:
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")
