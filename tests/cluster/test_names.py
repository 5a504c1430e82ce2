"""What may be the name of a run's folder, and what MLflow takes, judged before any work."""

import pytest
from mlflow import MlflowClient, MlflowException

from cluster.errors import UserError
from cluster.names import check_path_part, experiment_name_fault, registered_name_fault


@pytest.mark.parametrize("name", ["first", "rün", "10 % more", "it's [new]", "a.b", "-x", ".x", "x" * 200])
def test_any_name_that_a_folder_can_have_is_taken(name: str) -> None:
    assert check_path_part(name, "the run's name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        ".",
        "..",
        "../../x",
        "a/b",
        "a\\b",
        " a",
        "a\n",
        "a\nb",
        "a\x1b[31m",
        "\x00",
        "a\u200bb",
        "x" * 201,
        "ü" * 150,
    ],
)
def test_a_name_that_no_folder_should_have_is_refused_in_one_printable_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^the run's name '.*'?…? cannot be the name of a folder: it ") as caught:
        check_path_part(name, "the run's name")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_what_mlflow_refuses_as_the_name_of_a_model_is_refused_before(tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    for name in ("team/polyp", "a:b", "", " ", ".", ".."):
        assert registered_name_fault(name)
        with pytest.raises(MlflowException):
            client.create_registered_model(name)
    for name in (
        "Crohn's",
        'a"b',
        "a@b",
        "50%",
        "a?b",
        "a#b",
        "a\nb",
        "x" * 251,
    ):  # it would take them, and not find them again
        assert registered_name_fault(name)
    for name in ("msdm-medvqa-gi", "Polypen für rün", "a.b_c-1"):
        assert registered_name_fault(name) is None
        client.create_registered_model(name)
        assert [model.name for model in client.search_registered_models(f"name = '{name}'")] == [name]


def test_what_mlflow_refuses_as_the_name_of_an_experiment_is_refused_before(tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    for name in ("", "x" * 501):
        assert experiment_name_fault(name)
        with pytest.raises(MlflowException):
            client.create_experiment(name)
    for name in ("team/polyp", "Crohn's: 50 %", "x" * 500):
        assert experiment_name_fault(name) is None
        client.create_experiment(name)
