"""How a run that did not reach its end stands in MLflow."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster import runtime
from cluster.tracking import Tracker
from trainers import launch, run_folder
from trainers.recipe import MSDMRecipe
from trainers.run_folder import RunFolder


@pytest.mark.parametrize(("asked_to_stop", "status"), [(False, "FAILED"), (True, "KILLED")])
def test_what_fails_after_it_was_asked_to_stop_was_stopped(
    asked_to_stop: bool, status: str, recipe: MSDMRecipe, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray Tune ends the process of a trial whose ranks are still saving."""

    def is_ended(recipe: MSDMRecipe, stage: str, manifest: Any, run: RunFolder, *_: Any) -> None:
        if asked_to_stop:
            run.request_stop()
        raise RuntimeError("the actor is gone")

    monkeypatch.setattr(launch, "_train_stage", is_ended)
    monkeypatch.setattr(runtime, "connect", lambda **_: nullcontext())
    monkeypatch.setattr(runtime, "check_capacity", lambda **_: None)
    monkeypatch.setattr(runtime, "grows", lambda: False)
    monkeypatch.setattr(runtime, "nodes", lambda: [])
    with pytest.raises(RuntimeError, match="gone"):
        launch.train_recipe(recipe, "tiny", on_progress=lambda _: None, on_stop_requested=lambda: None)
    begun = RunFolder.of(recipe, "tiny").mlflow_run()
    assert begun is not None
    tracker = Tracker(tracking_uri, begun["run_id"])
    assert tracker.client.get_run(tracker.run_id).info.status == status


def test_the_legend_of_a_runs_folder_names_each_file() -> None:
    """Whoever finds a file in there looks it up in one place."""
    root = Path(__file__).parents[2]
    sources = [path.read_text() for room in ("trainers", "sweeps") for path in (root / room).rglob("*.py")]
    own = (root / "trainers" / "run_folder.py").read_text().replace("self.uri", "run.uri")
    written = {name for text in [*sources, own] for name in re.findall(r'join\(run\.uri, "([^"{]+)"', text)}
    written |= {"lr-find.json", "lr-find.png"}
    assert {"run.json", "recipe.yaml", "unrecorded.json", "measured", "registered.json", "STOP"} <= written
    assert run_folder.__doc__
    named = re.findall(r"^RUN/([\w.-]+)", run_folder.__doc__, re.MULTILINE)
    assert written <= set(named)
    assert len(named) == len(set(named))
