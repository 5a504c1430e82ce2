"""What a training loses to each fault. Real processes are killed, stopped and cut off; what comes out is compared.

    python -m benchmarks.faults                            # both engines, every fault
    python -m benchmarks.faults --engines ddp --faults worker driver

The machines are raylets of one Ray cluster on this computer: a head without CPUs, two machines with one CPU each for
two ranks, and one to spare. The training is `medsynth train`, a process of its own: a small MSDM on two DDP ranks
("ddp"), or FLUX in miniature cut over two ZeRO-3 ranks ("zero3"). Its data and checkpoints are on an S3 server behind
a proxy that fails on demand, its record is on an MLflow server.

Each engine's first run is left in peace. A run that meets a fault at half-time must end with that run's weights, to
the last bit, and leave its very history of metrics in a single MLflow run: so no sample was lost or repeated, and no
metric. What a fault costs is the time that its run took longer. Prints the table of docs/reliability.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import boto3
import psutil
import safetensors.torch
import torch
from ray.cluster_utils import Cluster

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from benchmarks.sweep_trials import prepare, write_frames
from cluster import storage
from cluster.tracking import Tracker, find_run
from tests.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.servers import free_port, mlflow_server, s3_server
from trainers.recipe import Recipe, dump_recipe, load_recipe
from trainers.run_folder import RunFolder

BUCKET = "s3://faults"
RUN_SECONDS = 600
PROGRESS = re.compile(r"^[\d:]+ (\w+) (\d+)/(\d+) ")
COMPARED = ("loss", "validation_loss", "grad_norm", "learning_rate")
DRAIN_SECONDS, REFUSED_SECONDS, AWAY_SECONDS, HANG_SECONDS = 20, 30, 60, 30


# --- where a training lives ---


class World:
    """Machines, storage and records, each of which can be made to fail."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack
        self._records = ExitStack()
        self._records_port = free_port()
        real = stack.enter_context(s3_server(folder))
        self.proxy: FaultProxy = stack.enter_context(fault_proxy(real))
        stack.callback(self._records.close)
        self.records_up()
        os.environ |= {
            "AWS_ENDPOINT_URL": self.proxy.address,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        boto3.Session().client("s3").create_bucket(Bucket=BUCKET.removeprefix("s3://"))
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        stack.callback(self.cluster.shutdown)
        os.environ["RAY_ADDRESS"] = self.cluster.address
        for _ in range(3):
            self.add_machine()

    def records_up(self) -> None:
        os.environ["MLFLOW_TRACKING_URI"] = self._records.enter_context(mlflow_server(self.folder, self._records_port))

    def records_down(self) -> None:
        self._records.close()

    def add_machine(self) -> None:
        self.cluster.add_node(num_cpus=1)

    def machine_of(self, rank: psutil.Process) -> Any:
        """The machine a rank runs on."""
        (machine,) = (node for node in self.cluster.worker_nodes if raylet_of(node).pid == rank.ppid())
        return machine

    def lose(self, machine: Any) -> None:
        """kill -9 all that runs on a machine, its raylet first."""
        raylet = raylet_of(machine)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()
        self.cluster.remove_node(machine, allow_graceful=False)


def raylet_of(machine: Any) -> psutil.Process:
    return psutil.Process(machine.all_processes["raylet"][0].process.pid)


def ranks() -> list[psutil.Process]:
    """The processes of the ranks that train."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in word for word in process.cmdline()[:1]):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


class Training:
    """`medsynth train`, and how far it is."""

    def __init__(self, recipe: Path, name: str) -> None:
        self._command = [sys.executable, "-m", "medsynth", "train", str(recipe), "--run", name]
        self.step, self._changed = 0, Condition()
        self.output: list[str] = []
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout or ():
            with self._changed:
                self.output.append(line)
                if found := PROGRESS.match(line):
                    self.step = int(found[2])
                self._changed.notify_all()

    def wait_for(self, step: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self.step >= step, RUN_SECONDS):
                raise SystemExit(f"step {step} was not reached:\n{''.join(self.output)}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def finish(self) -> None:
        if self._process.wait(RUN_SECONDS):
            raise SystemExit(f"the training failed:\n{''.join(self.output)}")


# --- what happens to it, at half-time ---


def a_worker(world: World, training: Training) -> None:
    ranks()[-1].kill()


def a_machine(world: World, training: Training) -> None:
    world.lose(world.machine_of(ranks()[-1]))
    world.add_machine()  # to spare, for the next fault


def the_driver(world: World, training: Training) -> None:
    training.kill()
    training.start()


def a_drained_machine(world: World, training: Training) -> None:
    machine = world.machine_of(ranks()[-1])
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", world.cluster.address]
    command += ["--node-id", machine.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(DRAIN_SECONDS)], check=True, capture_output=True)
    time.sleep(DRAIN_SECONDS)
    world.lose(machine)
    world.add_machine()


def an_upload(world: World, training: Training) -> None:
    world.proxy.decide = lambda method, path: Fault.STALLED if method in ("PUT", "POST") and "/step-" in path else None
    assert world.proxy.stalled.wait(RUN_SECONDS)
    ranks()[0].kill()
    world.proxy.decide = lambda method, path: None
    world.proxy.release()


def the_storage(world: World, training: Training) -> None:
    world.proxy.decide = lambda method, path: Fault.SLOW_DOWN if method in ("PUT", "POST") else None
    time.sleep(REFUSED_SECONDS)
    world.proxy.decide = lambda method, path: None


def mlflow(world: World, training: Training) -> None:
    world.records_down()
    time.sleep(AWAY_SECONDS)
    world.records_up()


def a_hung_rank(world: World, training: Training) -> None:
    ranks()[-1].suspend()


def fewer_machines(world: World, training: Training) -> None:
    """Only one is left, and some steps later all are there again."""
    for machine in list(world.cluster.worker_nodes)[1:]:
        world.lose(machine)
    training.wait_for(training.step + 40)
    for _ in range(2):
        world.add_machine()


@dataclass(frozen=True)
class Disturbance:
    what: str
    happens: Callable[[World, Training], None]
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe's block `cluster` that are other than in the undisturbed run."""
    loss_tolerance: float = 0.0
    """How far losses may be from the undisturbed run's; at 0 the weights must be equal, too."""


DISTURBANCES = {
    "worker": Disturbance("kill -9 a rank", a_worker),
    "machine": Disturbance("kill -9 a machine: its raylet and all that runs there", a_machine),
    "driver": Disturbance("kill -9 `medsynth train`; the same command again", the_driver),
    "drain": Disturbance(f"a machine drained, gone {DRAIN_SECONDS} s later", a_drained_machine),
    "upload": Disturbance("kill -9 a rank that uploads a checkpoint", an_upload),
    "storage": Disturbance(f"storage that refuses writes for {REFUSED_SECONDS} s", the_storage),
    "mlflow": Disturbance(f"MLflow's server gone for {AWAY_SECONDS} s", mlflow),
    "hang": Disturbance(f"a rank that hangs, with `hang_timeout_seconds: {HANG_SECONDS}`", a_hung_rank),
    "elastic": Disturbance(
        "two machines, then one, then two, with `num_workers: [1, 2]`",
        fewer_machines,
        cluster={"num_workers": (1, 2), "resize_seconds": 5.0},
        loss_tolerance=1e-4,
    ),
}


# --- what is trained ---


@dataclass(frozen=True)
class Trained:
    """A recipe, and what its runs are given beforehand."""

    recipe: Recipe
    stage: str  # that is disturbed
    steps: int
    autoencoder: Path | None  # a finished one

    def with_cluster(self, changes: Mapping[str, Any]) -> "Trained":
        cluster = self.recipe.cluster.model_copy(update=dict(changes))
        return replace(self, recipe=self.recipe.model_copy(update={"cluster": cluster}))

    def begin(self, name: str) -> RunFolder:
        run = RunFolder.of(self.recipe, name)
        if self.autoencoder:
            storage.upload_folder(self.autoencoder, run.model("vae"))
            run.mark_complete("vae")
        return run


def small_msdm(folder: Path) -> Trained:
    steps = 300
    small = prepare(folder, steps=steps, vae_steps=100)
    storage.upload_folder(folder / "shards", f"{BUCKET}/shards")
    recipe = _recipe_at(
        folder / "recipe.yaml",
        f"data.shards={BUCKET}/shards",
        "cluster.num_workers=2",
        "vae.training.micro_batch_size=4",
        "denoiser.training.micro_batch_size=8",
        "denoiser.training.log_every_steps=10",
        "denoiser.training.validate_every_steps=100",
        "denoiser.training.checkpoint_every_steps=50",
    )
    return Trained(recipe, "denoiser", steps, Path(RunFolder.of(small, "shared").model("vae")))


def flux_in_miniature(folder: Path) -> Trained:
    steps = 160
    recipe = _recipe_at(
        ROOT / "recipes/flux-tiny.yaml",
        f"pretrained={ROOT}/tests/data/flux-tiny",
        f"data.shards={BUCKET}/flux-shards",
        f"data.precomputed={BUCKET}/flux-64",
        "data.num_workers=0",
        f"transformer.training.steps={steps}",
        "transformer.training.log_every_steps=5",
        f"transformer.training.validate_every_steps={steps // 2}",
        f"transformer.training.preview_every_steps={steps}",
        "transformer.training.checkpoint_every_steps=20",
        "tracking.register_as=null",
    )
    write_frames(recipe.data.shards, resize=recipe.data.resolution)
    path = folder / "flux.yaml"
    path.write_text(dump_recipe(recipe))
    subprocess.run([sys.executable, "-m", "medsynth", "shards", "precompute", str(path)], check=True)
    return Trained(recipe, "transformer", steps, None)


def _recipe_at(path: Path, *own: str) -> Recipe:
    everywhere = (f"cluster.storage={BUCKET}/runs", f"cluster.hang_timeout_seconds={HANG_SECONDS}")
    return load_recipe(str(path), [*own, *everywhere])


ENGINES = {"ddp": small_msdm, "zero3": flux_in_miniature}


# --- what comes of it ---


@dataclass(frozen=True)
class Result:
    """What a run took and left."""

    seconds: float
    weights: Mapping[str, torch.Tensor]
    history: Mapping[str, Sequence[tuple[int, float]]]
    num_mlflow_runs: int


def train(world: World, trained: Trained, name: str, disturbance: Disturbance | None) -> Result:
    if disturbance:
        trained = trained.with_cluster(disturbance.cluster)
    recipe = world.folder / f"{name}.yaml"
    recipe.write_text(dump_recipe(trained.recipe))
    run = trained.begin(name)
    started = time.monotonic()
    training = Training(recipe, name)
    if disturbance:
        training.wait_for(trained.steps // 2)
        disturbance.happens(world, training)
    training.finish()
    seconds = time.monotonic() - started
    (world.folder / f"{name}.log").write_text("".join(training.output))
    recorded = run.mlflow_run()
    tracker = find_run(recorded["run_id"]) if recorded else None
    assert tracker is not None
    return Result(
        seconds,
        _weights(run.model(trained.stage)),
        {name: tracker.metric_history(f"{trained.stage}/{name}") for name in COMPARED},
        _num_runs_named(tracker, name),
    )


def _weights(model: str) -> dict[str, torch.Tensor]:
    with storage.local_folder(model) as folder:
        return {
            f"{path.relative_to(folder)}/{name}": weight
            for path in sorted(folder.rglob("*.safetensors"))
            for name, weight in safetensors.torch.load_file(path).items()
        }


def _num_runs_named(tracker: Tracker, name: str) -> int:
    experiment = tracker.client.get_run(tracker.run_id).info.experiment_id
    return len(tracker.client.search_runs([experiment], f"attributes.run_name = '{name}'"))


def beside(calm: Result, met: Result, loss_tolerance: float) -> dict[str, Any]:
    """How a disturbed run ended, beside the undisturbed one."""
    weights_equal = met.weights.keys() == calm.weights.keys() and all(
        torch.equal(weight, calm.weights[name]) for name, weight in met.weights.items()
    )
    losses = [(name, step, value) for name in ("loss", "validation_loss") for step, value in calm.history[name]]
    met_losses = [(name, step, value) for name in ("loss", "validation_loss") for step, value in met.history[name]]
    told_once = [loss[:2] for loss in losses] == [loss[:2] for loss in met_losses]
    difference = max(abs(one[2] - other[2]) for one, other in zip(losses, met_losses, strict=False))
    return {
        "seconds": met.seconds,
        "seconds_lost": met.seconds - calm.seconds,
        "weights_equal": weights_equal,
        "history_equal": met.history == calm.history,
        "loss_difference": difference,
        "loss_tolerance": loss_tolerance,
        "mlflow_runs": met.num_mlflow_runs,
        "as_undisturbed": told_once
        and met.num_mlflow_runs == 1
        and difference <= loss_tolerance
        and (loss_tolerance > 0 or (weights_equal and met.history == calm.history)),
    }


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown, by fault and engine."""
    lines = [
        f"| fault | {' | '.join(f'{engine}: end | seconds lost' for engine in rows)} |",
        f"|---|{'---|---|' * len(rows)}",
    ]
    for fault in dict.fromkeys(fault for found in rows.values() for fault in found):
        cells = []
        for found in rows.values():
            row = found.get(fault)
            cells += [_end_of(row), f"{row['seconds_lost']:.0f}"] if row else ["", ""]
        lines.append(f"| {DISTURBANCES[fault].what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _end_of(row: Mapping[str, Any]) -> str:
    if not row["as_undisturbed"]:
        return "**another**"
    return f"same losses within {row['loss_tolerance']:g}" if row["loss_tolerance"] else "the same, bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--faults", nargs="+", choices=DISTURBANCES, default=list(DISTURBANCES))
    parser.add_argument("--keep", type=Path, help="a folder for logs and recipes; else they are gone afterwards")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-faults-cpu.json")
    options = parser.parse_args()
    here = circumstances()
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    calm_seconds = {}
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        world = World(folder.absolute(), stack)
        for engine in options.engines:
            trained = ENGINES[engine](world.folder)
            calm = train(world, trained, f"{engine}-calm", None)
            calm_seconds[engine] = calm.seconds
            print(f"{engine}, undisturbed: {calm.seconds:.0f} s", flush=True)
            rows[engine] = {}
            for fault in options.faults:
                met = train(world, trained, f"{engine}-{fault}", DISTURBANCES[fault])
                rows[engine][fault] = beside(calm, met, DISTURBANCES[fault].loss_tolerance)
                print(f"{engine}, {DISTURBANCES[fault].what}: {rows[engine][fault]}", flush=True)
    document = {**here, "seconds_undisturbed": calm_seconds, "faults": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{table(rows)}\nwritten: {options.out}")


if __name__ == "__main__":
    main()
