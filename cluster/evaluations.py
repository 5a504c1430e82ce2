"""Evaluations in MLflow: runs of their own, below the run that trained the model."""

from cluster.errors import UserError

KIND, PARENT = "medsynth.kind", "mlflow.parentRunId"
EVALUATION, FOLDER = "evaluation", "evaluation"
"""The tag's value, and the artifacts' folder."""


def evaluation_document(name: str) -> str:
    """The document of an evaluation: of the run that it is, or else the latest one finished of a model.

    `name` is the id of an evaluation's or a training run, runs:/ID, or a registered model's models:/NAME/VERSION or
    models:/NAME@ALIAS. Raises UserError if there is no such run or model, or it was not evaluated.
    """
    from cluster.tracking import Tracker, connect_to_read, default_tracking_uri, explained

    tracking_uri = default_tracking_uri()
    client = connect_to_read(tracking_uri)
    run_id = _training_run(name)
    with explained(tracking_uri, name):
        if client.get_run(run_id).data.tags.get(KIND) != EVALUATION:
            found = client.search_runs(
                [experiment.experiment_id for experiment in client.search_experiments()],
                f"tags.`{KIND}` = '{EVALUATION}' and tags.`{PARENT}` = '{run_id}' and attributes.status = 'FINISHED'",
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if not found:
                raise UserError(f"{name} has no finished evaluation: medsynth evaluate makes one")
            run_id = found[0].info.run_id
        return Tracker(tracking_uri, run_id).read_text(f"{FOLDER}/evaluation.json")


def _training_run(name: str) -> str:
    if not name.startswith("models:/"):
        return name.removeprefix("runs:/").partition("/")[0]
    from cluster.registry import RegisteredModel

    _, version = RegisteredModel.of(name)
    if version.run_id is None:
        raise UserError(f"{name} was registered without a run, so no evaluation is known of it; name its folder")
    return version.run_id
