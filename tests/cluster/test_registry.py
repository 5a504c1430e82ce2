"""The registry: the way from a model's name to its files, aliases, tags and the lock, on SQLite and a real server."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import mlflow.artifacts
import pytest
from mlflow import MlflowClient

from cluster.errors import UserError
from cluster.registry import DIGEST_TAG, RegisteredModel, Version, model_folder, register
from cluster.tracking import Tracker, default_tracking_uri
from tests.conftest import named_store


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return named_store(request.param, request, monkeypatch)


@pytest.fixture
def name(store: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a model that no other test registers, in versions 1 and 2."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    for version in (1, 2):
        assert register_version(version, name) == version
    yield name
    assert not MlflowClient().search_registered_models(f"name = '{name}.promoting'")


def own_tags(version: Version) -> dict[str, str]:
    """All but the digest, which tests/trainers/test_registration.py is about."""
    return {name: value for name, value in version.tags.items() if name != DIGEST_TAG}


def register_version(number: int, name: str) -> int:
    folder = Path(f"v{number}")
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").write_text(str(number))
    (folder / "card").write_text("of the pipeline")
    beside = Path(f"beside{number}")
    beside.mkdir()
    (beside / "card").write_text(f"of version {number}")
    tracker = Tracker.start(experiment="models", run_name="r", tags={})
    version = register(tracker, [folder, beside], name=name, tags={"number": str(number)})
    assert register(tracker, [folder, beside], name=name, tags={}) == version, "a run has one version"
    return version


def test_another_name_for_a_runs_model_changes_no_file_of_the_first(name: str) -> None:
    _, first = RegisteredModel.of(f"models:/{name}/1")
    assert first.run_id is not None
    tracker, folder = Tracker(default_tracking_uri(), first.run_id), Path("other")
    folder.mkdir()
    (folder / "card").write_text("of another name")
    assert register(tracker, [folder], name=f"{name}-other", tags={}) == 1
    assert register(tracker, [folder], name=name, tags={}, artifact_folder="model-12-steps") == 3
    cards = {f"{name}/1": "of version 1", f"{name}-other/1": "of version 1", f"{name}/3": "of another name"}
    for uri, card in cards.items():
        with model_folder(f"models:/{uri}") as found:  # which checks the digests
            assert (found / "card").read_text() == card


def test_a_copy_is_of_the_name_that_it_was_made_by(tracking_uri: str, tmp_path: Path) -> None:
    """One run registered two names: the tags of each, such as how to draw, are its own."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "MLmodel").write_text("flavors: {}\n")
    tracker = Tracker.start(experiment="models", run_name="r", tags={})
    for name, value in (("first", "2"), ("second", "3"), ("second", "4")):
        register(tracker, [tmp_path / "a"], name=name, tags={"guidance": value})

    def guidance(uri: str) -> str | None:
        copy = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / uri.replace("/", "-"))))
        version = RegisteredModel.version_of_copy(copy, tracker.run_id)
        return version.tags["guidance"] if version else None

    assert guidance("models:/first/1") == "2"
    assert guidance("models:/second/1") == "3"
    with pytest.raises(UserError, match="registered models of several names, first, second: name one"):
        guidance(f"runs:/{tracker.run_id}/model")
    MlflowClient().delete_registered_model("second")
    assert guidance(f"runs:/{tracker.run_id}/model") == "2"
    MlflowClient().delete_registered_model("first")
    assert guidance(f"runs:/{tracker.run_id}/model") is None


def test_registered_models_are_found_by_version_alias_and_run(name: str) -> None:
    model, second = RegisteredModel.of(f"models:/{name}/latest")
    assert (second.number, own_tags(second)) == (2, {"number": "2"})
    model.point("champion", 1)
    assert model.aliases() == {"champion": 1}

    def content(uri: str) -> str:
        with model_folder(uri) as found:
            assert (found / "card").read_text().startswith("of version") or uri == "v1"
            return (found / "unet" / "weights").read_text()

    assert content(f"models:/{name}/1") == "1"
    assert content(f"models:/{name}/2") == "2"
    assert content(f"models:/{name}/latest") == "2"
    assert content(f"models:/{name}@champion") == "1"
    assert content(f"runs:/{second.run_id}/model") == "2"
    assert content("v1") == "1"

    for wrong, said in {
        f"models:/{name}x/1": f"did you mean '{name}'",
        f"models:/{name}/7": "has no version 7: there are 1, 2",
        f"models:/{name}@chamption": "has no alias 'chamption': there are champion",
        f"models:/{name}": "write models:/NAME/VERSION",
        f"runs:/{'0' * 32}/model": "not found",
        "nowhere": "there is no folder",
    }.items():
        with pytest.raises(UserError, match=said):
            content(wrong)


def test_no_model_at_all(tracking_uri: str) -> None:
    with pytest.raises(UserError, match="no model 'x' is registered: there are none"), model_folder("models:/x/1"):
        pass


def test_tags_are_added_and_replaced(name: str) -> None:
    model, _ = RegisteredModel.of(f"models:/{name}/1")
    model.tag(1, {"number": "one", "approved_by": "a reader"})
    assert own_tags(model.version(1)) == {"number": "one", "approved_by": "a reader"}
    assert own_tags(model.version(2)) == {"number": "2"}


def test_one_lock_at_a_time_and_its_holder_is_named(name: str) -> None:
    model, _ = RegisteredModel.of(f"models:/{name}/1")
    with model.lock() as still_held:
        still_held()
        with pytest.raises(UserError, match=r"is being promoted by .+@.+ since 2\d{3}-.*--unlock"), model.lock():
            pass
        still_held()
    with model.lock():
        pass


def test_of_many_who_lock_at_once_one_does(name: str) -> None:
    model, _ = RegisteredModel.of(f"models:/{name}/1")
    start, leave = threading.Barrier(6), threading.Barrier(6)
    locked: list[int] = []

    def lock(number: int) -> None:
        with ExitStack() as stack:
            start.wait()
            try:
                stack.enter_context(model.lock())
                locked.append(number)
            except UserError:
                pass
            leave.wait()

    threads = [threading.Thread(target=lock, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(locked) == 1


def test_a_lock_whose_holder_died_is_removed_by_hand_and_the_holder_notices(name: str) -> None:
    model, _ = RegisteredModel.of(f"models:/{name}/1")
    assert not model.unlock()
    with model.lock() as still_held:
        assert model.unlock()
        with model.lock(), pytest.raises(UserError, match=r"the lock of .* was taken away"):
            still_held()
        with pytest.raises(UserError, match="was taken away"):
            still_held()
