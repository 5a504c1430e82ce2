"""A command as a job, before anything is sent: what is uploaded, which variables go along, what is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import jobs
from cluster.errors import UserError
from cluster.provenance import COMMIT_VARIABLE, git_commit
from cluster.runtime import FORWARDED_VARIABLES
from medsynth import app
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def _no_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", *FORWARDED_VARIABLES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def write(folder: Path, *names: str, size: int = 10) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)


def test_code_and_recipes_are_uploaded_and_nothing_else(tmp_path: Path) -> None:
    kept = ["medsynth.py", "recipes/a.yaml", "data_shards/writer.py", "trainers/msdm/vae.py", "samples.py"]
    left = [
        *(".git/HEAD", ".venv/bin/python", "medsynth.egg-info/PKG-INFO", "cluster/__pycache__/a.pyc", ".ruff_cache/x"),
        *("data/a.png", "demo/shards/a.json", "runs/a/run.json", "sweeps-out/x", "evaluations/x", "promotions/x"),
        *("mlruns/x", "mlartifacts/x", "mlflow.db", "deep/down/shard-000000.tar", "deep/model.safetensors"),
        *(".env", ".medsynth-stack/ray_token"),
        *("named-in-gitignore/x", "named-in-rayignore/x"),
    ]
    write(tmp_path, *kept, *left)
    (tmp_path / ".gitignore").write_text("/named-in-gitignore/\n")
    (tmp_path / ".rayignore").write_text("named-in-rayignore\n")
    assert sorted(jobs.files_to_upload(tmp_path)) == sorted([".gitignore", ".rayignore", *kept])


def test_this_project_is_small_enough() -> None:
    names = jobs.files_to_upload(ROOT)
    assert {"medsynth.py", "cluster/jobs.py", "recipes/msdm-demo.yaml", "pyproject.toml"} <= names.keys()
    assert sum(names.values()) < jobs.UPLOAD_BYTES / 2


def test_a_recipe_that_the_job_would_not_find_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write(folder, "recipes/msdm-demo.yaml", "runs/a/recipe.yaml", "../outside.yaml")
    files = jobs.files_to_upload(folder)
    for found in ("recipes/msdm-demo.yaml", "./recipes/msdm-demo.yaml", "s3://b/r.yaml", "/shared/r.yaml", "a=b.yaml"):
        jobs.check_named(["train", found], folder, files)
    with pytest.raises(
        UserError, match=r"there is no recipes/msdm-dmo.yaml in .*: did you mean 'recipes/msdm-demo.yaml'\?"
    ):
        jobs.check_named(["train", "recipes/msdm-dmo.yaml"], folder, files)
    for lost in ("runs/a/recipe.yaml", "../outside.yaml"):
        with pytest.raises(UserError, match=f"{lost} is not uploaded"):
            jobs.check_named(["sweep", lost], folder, files)


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "UPLOAD_BYTES", 3 * 2**20)
    write(tmp_path, "small.py")
    write(tmp_path, "volumes/b.nii", size=2 * 2**20)
    jobs.check_size(tmp_path, jobs.files_to_upload(tmp_path))
    write(tmp_path, "volumes/a.nii", size=3 * 2**20)
    with pytest.raises(UserError, match=r"has 5\.0 MiB to upload, the job server takes 3\.0 MiB") as caught:
        jobs.check_size(tmp_path, jobs.files_to_upload(tmp_path))
    assert "the largest: volumes/a.nii (3.0 MiB), volumes/b.nii (2.0 MiB), small.py" in str(caught.value)
    with pytest.raises(UserError, match="there is no folder"):
        jobs.files_to_upload(tmp_path / "nowhere")


def test_variables_go_by_name_and_never_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "medsynth.py", "r.yaml")
    environment = {
        "AWS_ENDPOINT_URL": "http://store:9000",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "MY_TOKEN": SECRET,
        "OTHER": "not asked for",
    }
    job = jobs.prepare(["train", "r.yaml"], folder=tmp_path, variables=["MY_TOKEN"], environment=environment)
    given = job.runtime_env["env_vars"]
    assert given["MY_TOKEN"] == SECRET
    assert job.variables == ["AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "MY_TOKEN"]
    assert "AWS_SECRET_ACCESS_KEY" not in given
    assert SECRET not in repr((job.metadata, job.entrypoint, job.notices, job.variables))
    assert [notice.partition(" ")[0] for notice in job.notices] == ["MY_TOKEN:"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("variables", "environment", "said"),
    [
        (["MY_TOKEN"], {}, "--env MY_TOKEN: it is not set here"),
        ([f"MY_TOKEN={SECRET}"], {}, "--env MY_TOKEN: give the name alone"),
        ([], {"MLFLOW_TRACKING_URI": "sqlite:////home/me/mlflow.db"}, "names a file of this machine"),
        ([], {"MLFLOW_TRACKING_URI": "mlruns"}, "names a file of this machine"),
        ([], {"MLFLOW_TRACKING_URI": f"http://me:{SECRET}@mlflow:5000"}, "has a password in it"),
    ],
)
def test_variables_that_make_no_sense_are_refused(variables: list[str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        jobs.forwarded(variables, environment)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite:////shared/mlflow.db", f"http://me:{SECRET}@mlflow:5000"])
def test_what_is_asked_for_by_name_is_the_users_business(uri: str) -> None:
    store = {"MLFLOW_TRACKING_URI": uri}
    assert jobs.forwarded(["MLFLOW_TRACKING_URI"], store) == store


def test_a_job_says_what_it_is(tmp_path: Path) -> None:
    write(tmp_path, "r.yaml", "recipes/msdm-demo.yaml")
    job = jobs.prepare(["train", "recipes/msdm-demo.yaml", "--set", "a.b=c d"], folder=tmp_path, environment={})
    assert job.id.startswith("train-msdm-demo-2")
    assert job.metadata == {
        "command": f"medsynth train recipes/msdm-demo.yaml --set 'a.b=c d' --run {job.id}",
        "git_commit": "unknown",
        "medsynth_version": jobs._version(),
        "run": job.id,
    }
    assert job.entrypoint == f"python -m {job.metadata['command']}"
    assert "MLFLOW_TRACKING_URI is not set" in job.notices[0]
    assert "has no medsynth.py" in job.notices[1]
    named = jobs.prepare(["train", "r.yaml", "--run=mine"], folder=tmp_path, environment={})
    assert named.metadata["run"] == "mine"
    assert named.entrypoint == "python -m medsynth train r.yaml --run=mine"
    assert jobs.job_id(["evaluate", "models:/msdm-demo/1"]).startswith("evaluate-models-msdm-demo-1-2")
    assert jobs.job_id(["sweep", "--guidance"]).startswith("sweep-2")


def test_a_job_knows_its_commit_though_its_folder_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(COMMIT_VARIABLE, "abc")
    assert git_commit() == "abc"
    assert git_commit(tmp_path) == "unknown"  # of a folder that is submitted


def test_the_job_server_is_named_by_rays_variables() -> None:
    both = {"RAY_API_SERVER_ADDRESS": "http://a:8265/", "RAY_ADDRESS": "b:6379"}
    assert jobs.server_address(None, both) == "http://a:8265"
    assert jobs.server_address("https://c", both) == "https://c"
    assert jobs.server_address(None, {"RAY_ADDRESS": "http://b:8265"}) == "http://b:8265"
    with pytest.raises(UserError, match="b:6379 is no address of a job server: give the http:// address"):
        jobs.server_address(None, {"RAY_ADDRESS": "b:6379"})
    with pytest.raises(UserError, match="name the cluster's job server"):
        jobs.server_address(None, {})


def refused(*arguments: str) -> str:
    """What the command says of a mistake."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0, result.output
    error = result.exception
    return f"{error}" if isinstance(error, UserError) else result.output


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["trian", "r.yaml"], "'trian' is no command of medsynth: did you mean 'train'?"),
        (["submit", "--", "train"], "'submit' is no command"),
        (["stack", "up"], "'stack' is no command"),
        (["shards", "inspct", "x"], "'inspct' is no command of medsynth shards: did you mean 'inspect'?"),
        (["train", "r.yaml", "--stes", "3"], "No such option: --stes"),
        (["train"], "Missing argument"),
    ],
)
def test_a_command_that_could_not_run_is_refused_before_the_cluster_is_asked(command: list[str], said: str) -> None:
    assert said in refused("submit", "--address", f"http://127.0.0.1:{free_port()}", "--", *command)


def test_nobody_answers(tmp_path: Path) -> None:
    write(tmp_path, "medsynth.py", "r.yaml")
    address = f"http://127.0.0.1:{free_port()}"
    said = f"no job server answers at {address}"
    command = ["train", "r.yaml", "--run", "a"]
    assert said in refused("submit", "--address", address, "--working-dir", str(tmp_path), *command)
    assert said in refused("jobs", "list", "--address", address)
