"""A sweep's trials under Ray Tune, each a run of `train_recipe` with its Ray Train workers; MLflow records them.

The only module of this folder that imports Ray. Tune starts, restarts and stops the trials; what is tried next, and
what came of it, is the business of sweeps/space.py and sweeps/journal.py, which a killed sweep finds again.
"""

import logging
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType, SimpleNamespace
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from cluster import runtime, storage
from cluster.errors import UserError
from cluster.evaluations import KIND, PARENT
from cluster.names import check_path_part
from cluster.provenance import git_commit
from cluster.registry import RegisteredModel
from cluster.tracking import (
    Status,
    Tracker,
    TrackingError,
    connect,
    explained,
    find_run,
    without_secrets,
)
from data_shards import Manifest
from sweeps import objective, space
from sweeps.guidance_document import GuidanceSweep
from sweeps.guidance_spec import GuidanceGrid
from sweeps.journal import Journal
from sweeps.spec import ASHA, State, SweepSpec, Trial, dump_spec
from trainers import lease
from trainers.checkpoint_folders import checkpoint_folder
from trainers.families import family_of
from trainers.launch import (
    Progress,
    RunCutOffError,
    RunStopped,
    TrainedRun,
    check_fits,
    check_recipe,
    finish_run,
    recorded_by,
    register_run,
    release,
    train_recipe,
)
from trainers.model_source import sampling_tags
from trainers.recipe import Recipe, at_absolute_paths, dump_recipe, load_recipe
from trainers.records import FLUSH_SECONDS, RETRY_SECONDS, Records
from trainers.run_folder import RunFolder

CANDIDATE = "candidate"
ENDED = "medsynth.ended"  # tag of a trial's run: why it was not trained to its end
STEP, VALUE = "step", "value"  # of a trial's reports to Tune
SAVE_SECONDS = 300  # that trials have to save their state when the sweep is cut off

# Trials work where the sweep was started, as paths in the environment may be relative to it.
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
# What Tune prints at the end tells of files that are not looked at.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# A process goes on with another trial when the ranks of a stopped one have saved their state.
# If it were not waited for, Tune would count the next trial as lost, and tell nobody.
os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "86400")
# What is to be done when the sweep is interrupted is said below.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
# A trial that failed reports no value.
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")


class Watch(Protocol):
    """Whoever watches a sweep."""

    def show(self, trials: Sequence[Trial], steps: int) -> None:
        """All trials as they are now, and the steps that each is to have."""

    def say(self, line: str) -> None: ...

    def show_training(self, progress: Progress) -> None:
        """How the training of what all trials share proceeds."""


@dataclass(frozen=True)
class Swept:
    """Where an ended sweep's results are."""

    journal: Journal
    tracker: Tracker
    trials: tuple[Trial, ...]
    steps: int  # that a trial has in the objective's stage, at most
    best: Trial | None  # None if no trial was trained to its end
    model_uri: str | None  # models:/NAME/VERSION, or the best model's folder when it is not registered
    shortfall: str = ""  # why it is not, where it was trained for fewer steps than its recipe's file asks for


class SweepStopped(Exception):  # noqa: N818 - what happened, not what went wrong
    """The sweep was interrupted; it goes on when it is resumed."""


def run_sweep(spec: SweepSpec, name: str, *, is_new: bool, watch: Watch) -> Swept:
    """Try the recipes of a new sweep, or go on with one that was cut off; register the best model as `candidate`.

    A model that was trained for fewer steps than the recipe's file asks for is not registered: it would be the newest
    version of its name, and no more than a trial.
    Trials that ended are never run again; those that were cut off go on from their checkpoints. Raises UserError for
    what the user can mend, before anything starts where possible, and SweepStopped when it was interrupted.
    """
    began = time.monotonic()
    check_path_part(name, "the sweep's name")
    corners, full = [at_absolute_paths(corner) for corner in space.check(spec)], space.full_steps(spec)
    recipe = space.recipe_of(spec, {})
    runtime.check_outlives_job(recipe.cluster.storage)
    recipe = at_absolute_paths(recipe)
    manifest = check_recipe(recipe)
    for corner in corners:
        check_recipe(corner)
    if spec.guidance:
        _check_guidance(spec.guidance, recipe)
    journal = Journal(storage.join(recipe.cluster.storage, name))
    previous = journal.previous(spec, recipe)
    if is_new and previous:
        raise UserError(
            f"there is a sweep at {journal.uri}: give --resume {shlex.quote(name)} to go on with it, or another name"
        )
    if not is_new and not previous:
        raise UserError(f"there is no sweep at {journal.uri} to resume")
    workers = [r.cluster.max_workers + (r.fidelity is not None) for r in corners]
    min_cpus = max(number * r.cluster.cpus_per_worker for number, r in zip(workers, corners, strict=True))

    def on_waiting(silent: float, limit: float) -> None:
        watch.say(f"{journal.uri} has an owner that gives no sign of life: it is taken over in {limit - silent:.0f} s")

    with lease.held(journal.uri, on_waiting), runtime.connect(min_cpus=min_cpus):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        limit = space.concurrency(spec, corners, nodes, grows=runtime.grows())
        for corner in corners:
            check_fits(corner)
        tracker = _begin(spec, recipe, manifest, journal, previous)
        # Whoever edits the recipe's file while the sweep runs does not change what later trials are.
        spec = spec.model_copy(update={"recipe": journal.base_recipe})
        recording = _Recording(watch)
        status: Status = "FAILED"

        def show_shared(progress: Progress) -> None:
            recording.note(journal.shared_run, progress.unrecorded)
            watch.show_training(progress)

        try:
            shared = space.shared_stages(spec, recipe)
            if shared:
                train_recipe(
                    _of_sweep(recipe, journal),
                    journal.shared_run,
                    on_progress=show_shared,
                    on_stop_requested=lambda: watch.say("Stopping: saving the state. Ctrl-C again to give up on it."),
                    until=shared[-1],
                    tags={PARENT: tracker.run_id, KIND: "shared"},
                )
            conductor = _Conductor(spec, corners, journal, tracker, watch, recording, limit, began)
            _run_trials(conductor, _Setting(spec, journal, tracker, shared))
            best = space.best_trial(spec, conductor.trials)
            model_uri, shortfall = _keep(conductor, best, manifest, full) if best else (None, "")
            _write_report(conductor)
            status = "FINISHED"
        except (RunStopped, SweepStopped, KeyboardInterrupt):
            status = "KILLED"
            raise SweepStopped from None
        finally:
            finish_run(tracker, status)
    return Swept(journal, tracker, tuple(conductor.trials), conductor.steps, best, model_uri, shortfall)


def _check_guidance(grid: GuidanceGrid, recipe: Recipe) -> None:
    """Raise UserError for what would fail when the first trial is trained."""
    from sweeps.guidance import check_grid  # as below

    check_grid(grid, recipe.data.shards)


def _begin(
    spec: SweepSpec, recipe: Recipe, manifest: Manifest, journal: Journal, previous: Mapping[str, str] | None
) -> Tracker:
    """The MLflow run this sweep began with, if it is resumed; else a new one that says what will be tried."""
    if previous:
        recorded = recorded_by(previous)
        recorded.check_is_there("restore it, mend MLFLOW_TRACKING_URI, or begin a new sweep")
        RunFolder(journal.uri).follow(recipe)
        return Tracker.resume(recorded.run_id, recorded.tracking_uri)
    tracker = Tracker.start(
        experiment=recipe.tracking.experiment,
        run_name=journal.name,
        tags={
            KIND: "sweep",
            "git_commit": git_commit(),
            "manifest_digest": manifest.digest,
            "sweep_folder": journal.uri,
        },
        artifact_location=recipe.tracking.artifact_location,
    )
    tracker.log_params(spec.model_dump(mode="json"))
    tracker.log_text(dump_spec(spec), "sweep.yaml")
    journal.begin(spec, recipe, {"run_id": tracker.run_id, "tracking_uri": without_secrets(tracker.tracking_uri)})
    return tracker


def _of_sweep(recipe: Recipe, journal: Journal) -> Recipe:
    """The recipe as a trial trains it: in the sweep's folder, and without registering what may not be best."""
    return recipe.model_copy(
        update={
            "cluster": recipe.cluster.model_copy(update={"storage": journal.uri}),
            "tracking": recipe.tracking.model_copy(update={"register_as": None}),
        }
    )


def _keep(conductor: "_Conductor", best: Trial, manifest: Manifest, full: Mapping[str, int]) -> tuple[str, str]:
    """Write the best trial's recipe as one that `medsynth train` takes, and register its model as candidate if it was
    trained for the `full` steps of each stage; the model's URI, and the shortfall."""
    spec, journal, tracker = conductor.spec, conductor.journal, conductor.tracker
    setting = GuidanceSweep.load(journal.guidance(best.number)).best.setting if spec.guidance else {}
    recipe = at_absolute_paths(space.with_sampling(space.recipe_of(spec, best.params), setting))
    text = space.history_of(conductor.trials, best) + dump_recipe(recipe)
    storage.write_bytes(journal.best_recipe, text.encode())
    tracker.log_text(text, "best-recipe.yaml")
    if best.value is not None:
        tracker.log_metrics({f"best/{spec.objective.metric}": best.value}, len(conductor.trials))
    assert best.run_id is not None  # it was trained to its end
    run = journal.run_folder(best.number)
    trained = at_absolute_paths(space.with_sampling(space.recipe_of_trial(spec, best), setting))
    if shortfall := space.shortfall(trained, full):
        return run.model(family_of(trained).STAGES[-1]), shortfall
    model_uri = register_run(trained, manifest, run, Tracker(tracker.tracking_uri, best.run_id))
    # A sweep that is resumed when it has ended takes the alias from nobody.
    if model_uri.startswith("models:/") and journal.candidate() != model_uri:
        name, _, number = model_uri.removeprefix("models:/").rpartition("/")
        model = RegisteredModel(tracker.tracking_uri, name)
        model.tag(int(number), sampling_tags(setting))
        model.point(CANDIDATE, int(number))
        journal.note_candidate(model_uri)
    return model_uri, ""


def _write_report(conductor: "_Conductor") -> None:
    """The pictures of the trials, into the sweep's folder and its MLflow run."""
    from sweeps.report import write_sweep_report  # plotly takes seconds to import, and trials need none of it

    with TemporaryDirectory() as temporary:
        for path in write_sweep_report(conductor.trials, conductor.spec, Path(temporary)):
            storage.upload_file(path, storage.join(conductor.journal.report, path.name))
        conductor.tracker.log_folder(Path(temporary), "report")


# --- in the process of the sweep ---


class _Recording:
    """Says when reports begin to wait because MLflow does not answer, and when it knows all of them."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._waiting: set[str] = set()  # runs that have such reports

    def note(self, run: str, unrecorded: int) -> None:
        before = bool(self._waiting)
        if unrecorded:
            self._waiting.add(run)
        else:
            self._waiting.discard(run)
        if before != bool(self._waiting):
            self._watch.say(
                "MLflow answers again; it knows all reports."
                if before
                else "MLflow does not answer; the sweep goes on, and reports wait in the runs' folders."
            )


class _Conductor(tune.Callback):
    """Says which trial is next, and keeps the record of all: in the journal, in MLflow and before whoever watches."""

    def __init__(
        self,
        spec: SweepSpec,
        corners: Sequence[Recipe],
        journal: Journal,
        tracker: Tracker,
        watch: Watch,
        recording: _Recording,
        limit: int,
        began: float,
    ) -> None:
        self.spec = spec
        self.journal = journal
        self.tracker = tracker
        self.watch = watch
        self.recording = recording
        self.trials = journal.trials()
        self.limit = limit
        self.total = space.num_trials(spec)
        self.gpus = max(space.gpus_of(corner) for corner in corners)
        self.steps = max(objective.objective_steps(spec, corner) for corner in corners)
        self.began = began
        self.is_over = False  # there is no trial left to begin
        self.is_cut_off = False  # it was interrupted, or cannot go on now
        self.patience_ends = math.inf  # when trials that have not saved their state yet are ended without
        self.untold: dict[int, tuple[Status, str]] = {}  # how trials ended, while MLflow did not answer
        self.waiting = deque(trial.number for trial in self.trials if trial.state == "running")  # cut off earlier
        self.since: dict[int, tuple[float, float]] = {}  # running trial -> (clock at its start, seconds before that)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves itself with all it holds, to restore itself, which is not what sweeps go on from."""
        return {}

    def next_config(self) -> dict[str, Any] | str | None:
        """What Tune is to start now: a trial's config, nothing yet (None), or never more (FINISHED)."""
        is_last = self.total is not None and len(self.trials) >= self.total
        if self.is_cut_off or self.is_spent() or (not self.waiting and is_last):
            self.is_over = True
            return Searcher.FINISHED
        if len(self.since) >= self.limit:
            return None
        if self.waiting:
            number = self.waiting.popleft()
        else:
            try:
                trial = space.next_trial(self.spec, self.trials, self.steps)
            except ValueError as error:
                self.watch.say(f"The sweep ends here: {error}")
                self.is_over = True
                return Searcher.FINISHED
            if trial is None:
                return None
            number = trial.number
            self.trials.append(trial)
            try:
                recipe = at_absolute_paths(space.recipe_of_trial(self.spec, trial))
            except storage.StorageError:
                raise
            except UserError as error:
                self._end(number, "failed", str(error))
                return None
            self.journal.write_recipe(number, _of_sweep(recipe, self.journal))
            self._update(number)
        self.since[number] = (time.monotonic(), self.trials[number].seconds)
        self.watch.show(self.trials, self.steps)
        return {"number": number, "start_from": self._start_of(self.trials[number])}

    def _start_of(self, trial: Trial) -> str | None:
        """URI of the checkpoint that it goes on from."""
        if trial.parent is None:
            return None
        recipe = load_recipe(self.journal.recipe(trial.parent))
        stage = objective.objective_stage(self.spec, recipe)
        folder = checkpoint_folder(trial.begin, recipe.cluster.max_workers)
        return storage.join(self.journal.run_folder(trial.parent).uri, stage, folder)

    def is_spent(self) -> bool:
        """Whether the time that the budget gives is used up."""
        budget, now = self.spec.budget, time.monotonic()
        if budget.wall_hours is not None and now - self.began >= budget.wall_hours * 3600:
            return True
        if budget.gpu_hours is None:
            return False
        ended = sum(trial.seconds for trial in self.trials if trial.number not in self.since)
        running = sum(before + now - start for start, before in self.since.values())
        return (ended + running) * self.gpus >= budget.gpu_hours * 3600

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if not (self.is_cut_off or self.is_spent()):
            return
        if self.patience_ends == math.inf:
            self.patience_ends = time.monotonic() + SAVE_SECONDS
            self.watch.say("Stopping: the trials save their state. Ctrl-C again to give up on it.")
        for number in self.since:
            with suppress(storage.StorageError):  # it is asked again, as is one that had not begun when it was
                self.journal.run_folder(number).request_stop()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **_: Any
    ) -> None:
        number = trial.config["number"]
        self.recording.note(self.journal.run_name(number), result["unrecorded"])
        changes: dict[str, Any] = {"run_id": result["run_id"]}
        if VALUE in result:
            step, value = result[STEP], result[VALUE]
            intermediate = self.trials[number].intermediate | {step: value}
            changes |= {"steps": step, "value": value, "intermediate": intermediate}
        self._update(number, **changes)
        if result["state"] != "running":
            self._end(number, result["state"], result["reason"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        number = trial.config["number"]
        if self.trials[number].state == "running" and self.patience_ends == math.inf:  # else it has saved its state
            # Its process is kept for the next trial, and so does not take its workers along when it ends.
            self.journal.run_folder(number).request_stop()
            self._end(number, "stopped", "others were better at its step")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.watch.say(f"Trial {trial.config['number']} was lost; it is started again, from its latest checkpoint.")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self.patience_ends < math.inf:
            return
        reason = str(trial.get_error() or "its process was lost").strip().splitlines()[-1]
        try:
            connect(self.tracker.tracking_uri)
        except TrackingError as error:  # so would all other trials fail, one after the other
            self.is_cut_off = True
            self.watch.say(f"The sweep cannot go on: {error}")
        else:
            self._end(trial.config["number"], "failed", reason)

    def tell_rest(self) -> None:
        """Tell MLflow what it could not be told of trials that were ended while it did not answer.

        Raises TrackingError if it still does not.
        """
        for trial in self.trials:
            run = self.journal.run_folder(trial.number)
            waits = storage.exists(run.unrecorded) or storage.list_files(run.measured)
            if trial.state in ("stopped", "failed") and trial.run_id and waits:
                Records(run, Tracker(self.tracker.tracking_uri, trial.run_id)).flush()
                self.recording.note(self.journal.run_name(trial.number), 0)
        for number in list(self.untold):
            self._finish_run(number, *self.untold.pop(number))

    def cut_off(self) -> None:
        """Say in MLflow that the trials still running do so no more; the journal keeps them as running."""
        for number in self.since:
            self._finish_run(number, "KILLED")

    def _end(self, number: int, state: State, reason: str) -> None:
        self._update(number, state=state)
        self.since.pop(number, None)
        if state != "finished":
            self._finish_run(number, "KILLED" if state == "stopped" else "FAILED", reason)
        if state == "failed":
            self.watch.say(f"Trial {number} failed: {reason}")

    def _finish_run(self, number: int, status: Status, reason: str = "") -> None:
        """Say in MLflow what a trial that is ended from outside cannot say itself."""
        run = self.journal.run_folder(number).mlflow_run()
        if run is None:  # it never began
            return
        self._update(number, run_id=run["run_id"])
        tracker = Tracker(self.tracker.tracking_uri, run["run_id"])
        try:
            with explained(tracker.tracking_uri, f"end of trial {number}"):
                tracker.finish(status)
                if reason:
                    tracker.client.set_tag(tracker.run_id, ENDED, reason)
        except UserError as error:  # what Tune would take for a failure of its own
            self.untold[number] = (status, reason)
            self.watch.say(str(error))

    def _update(self, number: int, **changes: Any) -> None:
        if number in self.since:
            start, before = self.since[number]
            changes["seconds"] = before + time.monotonic() - start
        self.trials[number] = replace(self.trials[number], **changes)
        self.journal.write(self.trials[number])
        self.watch.show(self.trials, self.steps)


class _Search(Searcher):
    """Tune's way to ask the conductor, who keeps all state in the journal: Tune need save none."""

    def __init__(self, conductor: _Conductor) -> None:
        super().__init__()
        self._conductor = conductor

    def suggest(self, trial_id: str) -> Any:
        return self._conductor.next_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save_to_dir(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Patience(tune.Stopper):
    """Ends what has not ended by itself when the sweep was cut off."""

    def __init__(self, conductor: _Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return time.monotonic() >= self._conductor.patience_ends


def _run_trials(conductor: _Conductor, setting: "_Setting") -> None:
    """Have Tune run the trials that are left. Raises SweepStopped if it was interrupted."""
    spec = setting.spec
    filesystem, path = storage.arrow_filesystem(setting.journal.uri)
    # A trial's own process only waits for its workers, which Ray Train places; Ray Train's controller stays beside it.
    # One byte of memory is what it asks for, as Tune places nothing that asks for nothing.
    place = tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[runtime.off_spot()])
    trainable = tune.with_resources(tune.with_parameters(_run_trial, setting=setting), place)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_Search(conductor),
            scheduler=_scheduler(spec, conductor),
            num_samples=-1,
            max_concurrent_trials=conductor.limit,  # or Tune would start one process after the other
            reuse_actors=True,  # a process takes seconds to import what trains
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            stop=_Patience(conductor),
            failure_config=tune.FailureConfig(max_failures=spec.max_failures),
            callbacks=[conductor],
            verbose=0,
        ),
    )
    # What Tune logs of a lost trial is for those who develop it; on_trial_recover and on_trial_error say it in a line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def interrupt(number: int, frame: FrameType | None) -> None:
        if conductor.is_cut_off:
            raise KeyboardInterrupt
        conductor.is_cut_off = True

    # Being ended is being interrupted, even where Ray blocks Ctrl-C, as in a job.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tuner.fit()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        conductor.cut_off()
        for trial in conductor.trials:
            if trial.state != "finished":
                release(setting.journal.run_folder(trial.number))
    if conductor.is_cut_off or (not conductor.is_spent() and (conductor.since or not conductor.is_over)):
        raise SweepStopped
    conductor.tell_rest()
    if conductor.since:
        conductor.watch.say("The budget is used up; trials that were cut off go on with --resume.")


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:03d}-{trial.trial_id}"


def _scheduler(spec: SweepSpec, conductor: _Conductor) -> ASHAScheduler | None:
    """Tune's, which is told what the trials of an earlier start had reached. A population needs none: see space.py."""
    if not isinstance(spec.scheduler, ASHA):
        return None
    scheduler = ASHAScheduler(
        time_attr=STEP,
        metric=VALUE,
        mode=spec.objective.mode,
        max_t=conductor.steps,
        grace_period=spec.scheduler.grace_steps,
        reduction_factor=spec.scheduler.reduction,
        stop_last_trials=False,
    )
    for trial in conductor.trials:
        if trial.state in ("finished", "stopped"):
            known: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            scheduler.on_trial_add(None, known)  # type: ignore[arg-type] # ASHA does not look at the controller
            for step, value in sorted(trial.intermediate.items()):
                scheduler.on_trial_result(None, known, {STEP: step, VALUE: value})  # type: ignore[arg-type]
    return scheduler


# --- in the process of a trial ---


@dataclass(frozen=True)
class _Setting:
    """What the trials of a sweep have in common."""

    spec: SweepSpec
    journal: Journal
    tracker: Tracker
    shared: tuple[str, ...]


class _Diverged(Exception):  # noqa: N818 - it ends the trial and no more
    """The objective is not a number."""


def _run_trial(config: dict[str, Any], *, setting: _Setting) -> None:
    """What Tune runs: train the trial's recipe, telling Tune of each value of the objective as it comes.

    Those that its ranks measure are in their reports: Tune decides by them, whether MLflow answers or not. MLflow has
    those that other processes measure, and those from before a restart. A trial that cannot succeed reports that it
    failed; any other error has Tune start it again.
    """
    number, journal, metric = config["number"], setting.journal, setting.spec.objective.metric
    os.environ["MLFLOW_TRACKING_URI"] = setting.tracker.tracking_uri
    recipe, run = load_recipe(journal.recipe(number)), journal.run_folder(number)
    stage, steps = objective.objective_stage(setting.spec, recipe), objective.objective_steps(setting.spec, recipe)
    is_ended = False  # by Tune
    told = 0  # the last step that Tune knows of
    unrecorded = 0  # reports that wait because MLflow does not answer

    def tell(state: State, point: tuple[int, float] | None = None, *, reason: str = "") -> None:
        known = run.mlflow_run()
        values = {} if point is None else {STEP: point[0], VALUE: point[1]}
        run_id = known and known["run_id"]
        tune.report({"state": state, "reason": reason, "run_id": run_id, "unrecorded": unrecorded, **values})

    def tell_new(values: Mapping[int, float]) -> None:
        """Of the values before the last step, those that Tune does not know."""
        nonlocal told
        for step, value in sorted(values.items()):
            if told < step and not math.isfinite(value):
                raise _Diverged(f"{metric} is {value} at step {step}")
            if told < step < steps:
                told = step
                tell("running", (step, value))

    def recorded() -> dict[int, float]:
        """The values that MLflow knows; none while it does not answer, which the training outlives."""
        known = run.mlflow_run()
        if unrecorded or not known:
            return {}
        try:
            tracker = find_run(known["run_id"])
            return dict(tracker.metric_history(metric)) if tracker else {}
        except TrackingError:
            return {}

    def on_progress(progress: Progress) -> None:
        nonlocal unrecorded, is_ended
        is_news = bool(unrecorded) != bool(progress.unrecorded)
        unrecorded = progress.unrecorded
        measured = progress.metrics.get(metric.removeprefix(f"{progress.stage}/"))
        try:
            if is_news or progress.is_preparation:
                tell("running")
            if progress.stage == stage:
                tell_new(recorded() | ({} if measured is None else {progress.step: measured}))
        except SystemExit:  # how Tune ends a trial: its run is to say that it was ended, not that it failed
            is_ended = True
            raise RunStopped from None

    def await_mlflow() -> None:
        """Unlike a training, a trial that begins has just seen it answer: it will again."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while True:
            try:
                connect(setting.tracker.tracking_uri)
                return
            except TrackingError:
                if time.monotonic() >= deadline:
                    raise
            tell("running")  # which is where Tune ends a trial
            time.sleep(RETRY_SECONDS)

    try:
        await_mlflow()
        shared_run = RunFolder(storage.join(journal.uri, journal.shared_run))
        for shared in setting.shared:
            if not run.has_model(shared):
                run.take_model(shared, shared_run)
        if setting.shared:
            run.borrow_precomputed(shared_run)
        trained = train_recipe(
            recipe,
            journal.run_name(number),
            on_progress=on_progress,
            on_stop_requested=lambda: None,
            start_from=config["start_from"],
            tags={PARENT: setting.tracker.run_id, KIND: "trial", "medsynth.trial": str(number)},
        )
        unrecorded = 0
        if grid := setting.spec.guidance:
            _judge_at_best_guidance(trained, recipe, grid, journal, number, steps)
        history = dict(trained.tracker.metric_history(metric))
        tell_new(history)
    except RunStopped:
        if is_ended:
            sys.exit()
    except storage.NotFoundError as error:
        tell("failed", reason=str(error))
    except (
        storage.StorageError,
        TrackingError,
        RunCutOffError,
        lease.HeldError,
        lease.LostError,
    ):  # may be over in a moment: Tune starts the trial again
        raise
    except (UserError, _Diverged) as error:
        tell("failed", reason=str(error))
    else:
        if math.isfinite(history.get(steps, math.nan)):
            tell("finished", (steps, history[steps]))
        else:
            told_why = "; ".join(f"{what}: {why}" for what, why in trained.failures.items())
            tell("failed", reason=f"{metric} was not measured at step {steps}, or is not a number. {told_why}".strip())


def _judge_at_best_guidance(
    trained: TrainedRun, recipe: Recipe, grid: GuidanceGrid, journal: Journal, number: int, step: int
) -> None:
    """Sweep the trained model over guidance, and record what the setting recommended for it achieves."""
    from sweeps.guidance import log_files, sweep_guidance  # as above

    out, cluster = journal.guidance(number), recipe.cluster
    arguments = (trained.model_uri, recipe.data.shards, out)
    settings = grid.arguments | {
        "num_workers": cluster.max_workers,
        "device": "cuda" if cluster.use_gpu else "cpu",
        "cache": journal.features,
    }
    # This process holds nothing of the cluster: several workers are actors, and one is a task, with what a rank had.
    if cluster.max_workers > 1:
        found = sweep_guidance(*arguments, **settings)
    else:
        resources = {"cpus": cluster.cpus_per_worker, "gpus": int(cluster.use_gpu)}
        found = runtime.call(sweep_guidance, *arguments, **resources, **settings)
    figures = {f"{objective.GUIDANCE}{name}": measure.value for name, measure in found.best.measures.items()}
    trained.tracker.log_metrics(figures, step)
    trained.tracker.log_params({f"guidance.{name}": value for name, value in found.best.setting.items()})
    log_files(trained.tracker, out)
