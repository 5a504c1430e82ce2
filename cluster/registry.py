"""The model registry: versions of registered models, their aliases and tags, and who may move an alias now."""

import getpass
import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import mlflow.artifacts
import mlflow.pyfunc
from mlflow import MlflowClient, MlflowException
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature

from cluster import storage
from cluster.checksums import MLFLOW_META, SUMS, check_folder, checksums, digest_of
from cluster.documents import parse_yaml, parsing
from cluster.errors import UserError, did_you_mean
from cluster.model_uri import parse_model_uri
from cluster.tracking import Tracker, artifact_uri, connect, connect_to_read, default_tracking_uri, explained
from cluster.tracking_store import sqlite_file

MODEL_FOLDER = "model"
CODE_FOLDER = "code"
DIGEST_TAG = "sha256sums"
"""Of a version: the digest of its file SHA256SUMS."""
LOCK = ".promoting"
"""Ending of the registered model that exists while an alias of the model without the ending is moved."""


@contextmanager
def model_folder(uri: str) -> Iterator[Path]:
    """A local folder with a model: models:/NAME/VERSION, models:/NAME/latest, models:/NAME@ALIAS, runs:/ID/model,
    or a folder or s3:// prefix. Raises UserError if there is no such model, naming those there are, or if its files are
    not those that were registered."""
    if not uri.startswith(("models:/", "runs:/")):
        with storage.local_folder(uri) as folder:
            yield folder
        return
    tracking_uri = default_tracking_uri()
    client = connect_to_read(tracking_uri)
    with tempfile.TemporaryDirectory() as temporary:
        with explained(tracking_uri, uri):
            version = _find(client, uri) if uri.startswith("models:/") else _latest_of(client, uri)
            source = version.source if version else artifact_uri(client, uri)
        with explained(tracking_uri, uri, is_patient=True):
            downloaded = mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=temporary, tracking_uri=tracking_uri
            )
        if version is not None:
            check_registered(Path(downloaded), version.tags, uri)
        yield Path(downloaded)


def check_registered(folder: Path, tags: Mapping[str, str], uri: str) -> None:
    """Raise UserError, which calls it `uri`, unless a copy of a version with these tags is as it was registered.

    Of a version from before digests were recorded nothing is known, and nothing is refused.
    """
    if DIGEST_TAG not in tags:
        return
    path = folder / SUMS
    sums = path.read_text(errors="replace") if path.is_file() else ""
    if digest_of(sums) != tags[DIGEST_TAG]:
        raise UserError(
            f"{uri} is not what was registered: {SUMS} has SHA-256 {digest_of(sums)}, expected {tags[DIGEST_TAG]}: "
            "restore its files, or register it again"
        )
    check_folder(folder, sums, uri, ignoring=(SUMS, MLFLOW_META))


def register(
    tracker: Tracker,
    folders: Sequence[Path],
    *,
    name: str,
    tags: Mapping[str, str],
    artifact_folder: str = MODEL_FOLDER,
) -> int:
    """Upload what is in `folders` to the run as one model, and make it the next version of a registered model.

    A model of a run has one version of a name: asked again, it returns that, so what was cut off may be repeated. Under
    another name it is not uploaded again, for that would change the files of the version it has. The digests of the
    files are uploaded with them, and their own is a tag of the version: `model_folder` and serving check them.
    """
    client = tracker.client
    with explained(tracker.tracking_uri, is_patient=True):
        source = artifact_uri(client, f"runs:/{tracker.run_id}/{artifact_folder}")
        of_run = client.search_model_versions(f"run_id = '{tracker.run_id}'")
        known = [version for version in of_run if version.source == source]
        if own := [version for version in known if version.name == name]:
            return int(own[0].version)
        if known:
            tags = {**tags, **{key: value for key, value in known[0].tags.items() if key == DIGEST_TAG}}
        else:
            sums = checksums(folders)
            for folder in folders:
                tracker.log_folder(folder, artifact_folder)
            tracker.log_text(sums, f"{artifact_folder}/{SUMS}")
            tags = {**tags, DIGEST_TAG: digest_of(sums)}
        with _known_is_fine():
            client.create_registered_model(name)
        return int(client.create_model_version(name, source, run_id=tracker.run_id, tags=dict(tags)).version)


def check_rights(tracking_uri: str) -> None:
    """Raise TrackingError if registered models may not be made here; leaves nothing behind."""
    client, name = connect(tracking_uri), f"medsynth-doctor-{uuid4().hex[:12]}"
    with explained(tracking_uri, "registry"):
        client.create_registered_model(name)
        client.delete_registered_model(name)


def describe_pyfunc(
    folder: Path, *, code_file: str, signature: ModelSignature, tracker: Tracker, artifact_folder: str = MODEL_FOLDER
) -> None:
    """Write the file `MLmodel` that makes `folder`, or what it is uploaded beside, a model that MLflow serves.

    `code_file` in the same folder calls mlflow.models.set_model; CODE_FOLDER below it is put on the import path, and
    the artifact "pipeline" is the folder itself. mlflow's own save_model would copy all of it into another folder.
    """
    model = Model(artifact_path=artifact_folder, run_id=tracker.run_id, signature=signature)
    mlflow.pyfunc.add_to_model(
        model,
        loader_module="mlflow.pyfunc.loaders.code_model",
        code=CODE_FOLDER,
        python_env="python_env.yaml",
        model_code_path=code_file,
        model_config={"model_uri": f"runs:/{tracker.run_id}/{artifact_folder}"},
        artifacts={"pipeline": {"path": ".", "uri": "."}},
    )
    model.save(str(folder / "MLmodel"))


@dataclass(frozen=True)
class Version:
    """One version of a registered model, as it was when it was read."""

    number: int
    run_id: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True)
class RegisteredModel:
    """A registered model: its versions, and the aliases that point at them."""

    tracking_uri: str
    name: str

    @classmethod
    def of(cls, uri: str) -> tuple["RegisteredModel", Version]:
        """The model and the version that models:/NAME/VERSION or models:/NAME@ALIAS names.

        Raises UserError if there is none, naming those there are.
        """
        tracking_uri = default_tracking_uri()
        client = connect_to_read(tracking_uri)
        with explained(tracking_uri, uri):
            found = _find(client, uri)
        return cls(tracking_uri, found.name), _version(found)

    @classmethod
    def version_of_copy(cls, folder: Path, run_id: str, artifact_folder: str = MODEL_FOLDER) -> Version | None:
        """The version that a copy of a model is, as MLflow notes in those it makes of models:/NAME/…

        Of another copy it is the latest that the run registered. None if there is none, or no server of this
        environment's. Raises UserError if the server that the environment names does not answer, or if the run
        registered models of several names: their tags may differ.
        """
        tracking_uri = default_tracking_uri()
        if (file := sqlite_file(tracking_uri)) and not file.exists():
            return None  # to ask would make an empty one
        client = connect(tracking_uri)
        note = folder / MLFLOW_META
        if note.is_file():
            document = parse_yaml(note.read_bytes(), str(note))
            with parsing(str(note)):
                name, number = str(document["model_name"]), int(document["model_version"])
            return cls(tracking_uri, name).version(number)
        with explained(tracking_uri, run_id):
            source = artifact_uri(client, f"runs:/{run_id}/{artifact_folder}")
            of_run = client.search_model_versions(f"run_id = '{run_id}'")
            found = [version for version in of_run if version.source == source]
        if len(names := {version.name for version in found}) > 1:
            raise UserError(
                f"run {run_id} registered models of several names, {', '.join(sorted(names))}: "
                "name one, as models:/NAME/VERSION"
            )
        return max(map(_version, found), key=lambda version: version.number, default=None)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.tracking_uri)

    def aliases(self) -> dict[str, int]:
        with explained(self.tracking_uri, self.name):
            aliases: dict[str, str] = self.client.get_registered_model(self.name).aliases
        return {alias: int(number) for alias, number in aliases.items()}

    def version(self, number: int) -> Version:
        with explained(self.tracking_uri, self.name):
            return _version(self.client.get_model_version(self.name, str(number)))

    def tag(self, number: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version; others stay."""
        with explained(self.tracking_uri, f"tags of {self.name} {number}"):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.name, str(number), key, value)

    def point(self, alias: str, number: int) -> None:
        """Make the alias name the version `number`."""
        with explained(self.tracking_uri, f"alias '{alias}' of {self.name}"):
            self.client.set_registered_model_alias(self.name, alias, str(number))

    @contextmanager
    def lock(self) -> Iterator[Callable[[], None]]:
        """Be the only one who moves aliases of this model; yields a check that this still holds, else UserError.

        MLflow sets aliases without asking what they were, but of two who create a registered model of one name the
        database lets only one: so NAME.promoting is the lock. Raises UserError, naming the holder, if it is taken.
        """
        token = uuid4().hex
        tags = {"token": token, "holder": whoami(), "since": now()}
        with explained(self.tracking_uri, f"lock of {self.name}"):
            try:
                self.client.create_registered_model(self.name + LOCK, tags=tags)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                raise UserError(self._taken_by(self._lock_tags())) from None

        def check() -> None:
            held = self._lock_tags()
            if held.get("token") != token:
                raise UserError(f"the lock of '{self.name}' was taken away: {self._taken_by(held)}")

        try:
            yield check
        finally:
            # An error on the way out would hide the one that led here; what is left behind, `unlock` removes.
            with suppress(MlflowException, UserError):
                if self._lock_tags().get("token") == token:
                    self.client.delete_registered_model(self.name + LOCK)

    def unlock(self) -> bool:
        """Remove a lock whose holder is no more; False if there is none."""
        with explained(self.tracking_uri, f"lock of {self.name}"):
            if not self._lock_tags():
                return False
            self.client.delete_registered_model(self.name + LOCK)
        return True

    def _lock_tags(self) -> dict[str, str]:
        with explained(self.tracking_uri, f"lock of {self.name}"):
            found = self.client.search_registered_models(f"name = '{self.name}{LOCK}'")
        return dict(found[0].tags) if found else {}

    def _taken_by(self, held: Mapping[str, str]) -> str:
        if not held:
            return f"another promotion of '{self.name}' ended just now; run this again"
        latest = shlex.quote(f"models:/{self.name}/latest")
        return (
            f"'{self.name}' is being promoted by {held.get('holder')} since {held.get('since')}: wait for it, "
            f"or, if it is no more, remove its lock with: medsynth promote {latest} --unlock"
        )


def whoami() -> str:
    """Who acts, for people who read the record: USER@HOST."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers run under numbers that no one named
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _known_is_fine() -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, uri: str) -> ModelVersion:
    name, version, alias = parse_model_uri(uri)
    versions = client.search_model_versions(f"name = '{name}'")
    if not versions:
        names = [model.name for model in client.search_registered_models() if not model.name.endswith(LOCK)]
        hint = did_you_mean(name, names)
        raise UserError(f"no model '{name}' is registered: {hint}there are {', '.join(names) or 'none'}")
    by_number = {int(found.version): found for found in versions}
    if version == "latest":
        return by_number[max(by_number)]
    if alias:
        aliases = client.get_registered_model(name).aliases
        if alias not in aliases:
            raise UserError(f"model '{name}' has no alias '{alias}': there are {', '.join(aliases) or 'none'}")
        version = aliases[alias]
    if int(version) not in by_number:
        there = ", ".join(str(number) for number in sorted(by_number))
        raise UserError(f"model '{name}' has no version {version}: there are {there}")
    return by_number[int(version)]


def _latest_of(client: MlflowClient, uri: str) -> ModelVersion | None:
    """The newest version, under whatever name, that the files at runs:/ID/FOLDER became."""
    run_id, _, folder = uri.removeprefix("runs:/").partition("/")
    if not folder.startswith(MODEL_FOLDER):
        return None
    source = artifact_uri(client, uri)
    found = [version for version in client.search_model_versions(f"run_id = '{run_id}'") if version.source == source]
    return max(found, key=lambda version: (version.creation_timestamp, int(version.version)), default=None)


def _version(found: ModelVersion) -> Version:
    return Version(int(found.version), found.run_id or None, dict(found.tags))
