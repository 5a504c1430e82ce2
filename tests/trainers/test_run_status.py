"""How a run that did not reach its end stands in MLflow."""

from contextlib import nullcontext
from typing import Any

import pytest

from cluster import runtime
from cluster.tracking import Tracker
from trainers import launch
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
