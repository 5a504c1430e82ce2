"""The study's table: what is set against what, how it is written, and the plot."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.evaluations import evaluation_document
from cluster.tracking import Tracker
from tests.trainers.evaluations import extractor, made_evaluation, measure
from trainers.compare import (
    Row,
    Table,
    _rises,
    compare,
    open_evaluation,
    quality_cost_plot,
    render,
    to_latex,
    to_markdown,
)
from trainers.compare_cli import compare as compare_command
from trainers.fidelity.evaluation import Evaluation


def evaluation(name: str, **changes: Any) -> Evaluation:
    """A run with two figures."""
    known = {
        "measures": {
            "fid": measure(23.41, (21.93, 24.88)),
            "clip_score": measure(28.13, (27.95, 28.3), better="higher", extractor="clip", num_real=0),
        }
    }
    return made_evaluation(name, **(known | changes))


def changed(record: Any, **changes: Any) -> dict[str, Any]:
    """A part of an evaluation with some fields changed."""
    return dict(record.model_dump() | changes)


def flux(**changes: Any) -> Evaluation:
    """A larger model: further from real images than `evaluation`, nearer to its prompts but not beyond doubt."""
    base = made_evaluation()
    known: dict[str, Any] = {
        "model": changed(base.model, name="flux_50% & co", num_parameters=11_901_408_320, family="flux"),
        "generation": changed(
            base.generation, settings={"guidance_scale": 3.5, "true_cfg_scale": 2.0}, seconds_per_image=3.5
        ),
        "measures": {
            "fid": measure(30.0, (28.2, 31.9)),
            "clip_score": measure(28.21, (28.0, 28.4), better="higher", extractor="clip", num_real=0),
        },
        "training": {"gpu_hours": 412.0, "device": "NVIDIA H100"},
    }
    return made_evaluation().model_validate(base.model_dump() | known | changes)


def rows(table: Table) -> dict[str, Row]:
    return {row.label: row for group in table.groups.values() for row in group}


def marks(table: Table, label: str) -> list[str | None]:
    return [cell.mark for cell in rows(table)[label].cells]


def test_markdown_to_the_letter() -> None:
    table = compare([evaluation("msdm"), flux()], price_per_gpu_hour=2.5)
    assert to_markdown(table) == (
        r"""|  | msdm | flux\_50% &amp; co |
|:--|--:|--:|
| **Fidelity** |  |  |
| FID ↓ | **23.4** [21.9, 24.9] | 30.0 [28.2, 31.9] |
| **Alignment** |  |  |
| CLIP score ↑ | *28.13* [27.95, 28.30] | **28.21** [28.00, 28.40] |
| **Cost** |  |  |
| Parameters | 123,456,789 | 11,901,408,320 |
| GPU-hours ↓ | **12.5** | 412.0 |
| Energy, kWh ↓ | 9.10 | –<sup>a</sup> |
| Seconds an image ↓ | **0.420** | 3.500 |
| Cost at 2.5 a GPU-hour ↓ | **31.2** | 1,030.0 |
| **Drawn with** |  |  |
| guidance\_scale | 4.0 | 3.5 |
| num\_inference\_steps | 50 | – |
| resolution | 256 | 256 |
| batch\_size | 8 | 8 |
| device | NVIDIA H100 | NVIDIA H100 |
| true\_cfg\_scale | – | 2.0 |

Bold: the best of a row. Italic: its 95 % interval overlaps that of the best.

<sup>a</sup> Not known: no GPU told its power while it trained.
"""
    )


def test_latex_to_the_letter() -> None:
    other_data = changed(made_evaluation().reference, digest="e" * 64)
    table = compare([evaluation("msdm"), flux(), flux(reference=other_data)], price_per_gpu_hour=None)
    assert to_latex(table) == (
        r"""\begin{table}
  \centering
  \begin{tabular}{lrrr}
    \toprule
     & msdm & flux\_50\% \& co (1) & flux\_50\% \& co (2) \\
    \midrule
    \multicolumn{4}{l}{\emph{Fidelity}} \\
    FID $\downarrow$ & \textbf{23.4} {\footnotesize [21.9, 24.9]} & 30.0 {\footnotesize [28.2, 31.9]} """
        r"""& 30.0 {\footnotesize [28.2, 31.9]}\textsuperscript{a} \\
    \midrule
    \multicolumn{4}{l}{\emph{Alignment}} \\
    CLIP score $\uparrow$ & \textit{28.13} {\footnotesize [27.95, 28.30]} """
        r"""& \textbf{28.21} {\footnotesize [28.00, 28.40]} """
        r"""& 28.21 {\footnotesize [28.00, 28.40]}\textsuperscript{a} \\
    \midrule
    \multicolumn{4}{l}{\emph{Cost}} \\
    Parameters & 123,456,789 & 11,901,408,320 & 11,901,408,320 \\
    GPU-hours $\downarrow$ & \textbf{12.5} & 412.0 & 412.0 \\
    Energy, kWh $\downarrow$ & 9.10 & --\textsuperscript{b} & --\textsuperscript{b} \\
    Seconds an image $\downarrow$ & \textbf{0.420} & 3.500 & 3.500 \\
    \midrule
    \multicolumn{4}{l}{\emph{Drawn with}} \\
    guidance\_scale & 4.0 & 3.5 & 3.5 \\
    num\_inference\_steps & 50 & -- & -- \\
    resolution & 256 & 256 & 256 \\
    batch\_size & 8 & 8 & 8 \\
    device & NVIDIA H100 & NVIDIA H100 & NVIDIA H100 \\
    true\_cfg\_scale & -- & 2.0 & 2.0 \\
    \bottomrule
  \end{tabular}
  \caption{Bold: the best of a row. Italic: its 95 \% interval overlaps that of the best. """
        r"""\textsuperscript{a}\,Not comparable with msdm: other real images. """
        r"""\textsuperscript{b}\,Not known: no GPU told its power while it trained.}
\end{table}
"""
    )


def test_hostile_names_are_escaped() -> None:
    table = compare([evaluation("a|b\n<i>*x*"), evaluation("\\input{x} ^~#$ ∞")], price_per_gpu_hour=None)
    first = to_markdown(table).splitlines()[0]
    assert first == r"|  | a\|b &lt;i&gt;\*x\* | \\input{x} ^\~#$ ∞ |"
    assert (
        r"a|b <i>*x* & \textbackslash{}input\{x\} \textasciicircum{}\textasciitilde{}\#\$ $\infty$ \\"
        in to_latex(table).splitlines()[4]
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reference": {"digest": "e" * 64}}, "real images"),
        ({"reference": {"splits": ("validation",)}}, "real images"),
        (
            {"extractors": {"inception": extractor("inception", 7).model_copy(update={"digest": "other"})}},
            "feature extractor",
        ),
        ({"measures": {"fid": measure(20, (19, 21), num_generated=900)}}, "number of images"),
        ({"measures": {"fid": measure(20, (19, 21), num_real=9)}}, "number of images"),
        ({"generation": {"resolution": 1024}}, "resolution"),
        ({"generation": None}, "resolution"),
    ],
)
def test_what_cannot_be_compared_is_marked_and_never_best(changes: dict[str, Any], reason: str) -> None:
    usual = {"measures": {"fid": measure(25.0, (24.0, 26.0))}}
    others = usual | {"measures": {"fid": measure(20.0, (19.0, 21.0))}}
    if "reference" in changes:
        changes = {"reference": changed(made_evaluation().reference, **changes["reference"])}
    if changes.get("generation"):
        changes = {"generation": changed(made_evaluation().generation, **changes["generation"])}
    # Two of three agree: the first run is the odd one.
    odd = evaluation("odd", **(others | changes))
    table = compare([odd, evaluation("a", **usual), evaluation("b", **usual)], price_per_gpu_hour=None)
    assert marks(table, "FID") == ["not comparable", "best", "best"]
    assert table.notes[0] == f"Not comparable with a: other {reason}."
    assert rows(table)["FID"].cells[0].note == "a"


def test_two_runs_that_cannot_be_compared_have_no_best() -> None:
    other = changed(made_evaluation().reference, digest="e" * 64)
    table = compare([evaluation("a"), evaluation("b", reference=other)], price_per_gpu_hour=None)
    assert marks(table, "FID") == [None, "not comparable"]
    assert marks(table, "GPU-hours") == ["best", "best"]


def test_hours_and_money_of_other_devices_are_not_compared_but_energy_is() -> None:
    a100 = {"gpu_hours": 3.0, "device": "A100", "energy_kwh": 0.2}
    table = compare([evaluation("a"), evaluation("b", training=a100)], price_per_gpu_hour=1)
    assert marks(table, "GPU-hours") == marks(table, "Cost at 1 a GPU-hour") == [None, "not comparable"]
    assert marks(table, "Energy, kWh") == [None, "best"]
    assert table.notes == ("Not comparable with a: other device.",)


def test_hours_are_those_of_the_devices_that_it_was_trained_on() -> None:
    cpu = {"gpu_hours": 3.0, "device": "CPU process"}
    mixed = compare([evaluation("a"), evaluation("b", training=cpu)], price_per_gpu_hour=1)
    assert marks(mixed, "Device-hours") == [None, "not comparable"]
    assert rows(mixed)["Cost at 1 a GPU-hour"].cells[1].text == "–", "a CPU costs no GPU's price"
    both = compare([evaluation("a", training=cpu), evaluation("b", training=cpu)], price_per_gpu_hour=None)
    assert "CPU-hours" in rows(both)
    assert "GPU-hours" not in to_markdown(both)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resolution": 1024}, "resolution"),
        ({"batch_size": 1}, "batch size"),
        ({"device": "cpu"}, "device"),
        ({"compiled": True}, "compilation"),
    ],
)
def test_seconds_are_compared_only_where_images_were_drawn_alike(change: dict[str, Any], reason: str) -> None:
    slower = changed(made_evaluation().generation, seconds_per_image=0.9)
    odd = changed(made_evaluation().generation, seconds_per_image=0.1, **change)
    runs = [evaluation("a"), evaluation("b", generation=slower), evaluation("c", generation=odd)]
    table = compare(runs, price_per_gpu_hour=None)
    assert marks(table, "Seconds an image") == ["best", None, "not comparable"]
    assert f"Not comparable with a: other {reason}." in table.notes


def test_ties_and_overlaps() -> None:
    def run(name: str, value: float, interval: tuple[float, float] | None) -> Evaluation:
        return evaluation(name, measures={"fid": measure(value, interval)})

    table = compare(
        [
            run("a", 10, (9, 11)),
            run("b", 10, None),
            run("c", 11.5, (11, 12)),
            run("d", 12, (11.01, 13)),
            run("e", 12, None),
        ],
        price_per_gpu_hour=None,
    )
    assert marks(table, "FID") == ["best", "best", "as good", None, None]
    assert marks(table, "Parameters") == [None] * 5


def test_missing_figures_are_dashes() -> None:
    folder = evaluation(
        "folder", generation=None, training={}, measures={}, model={"uri": "x", "name": "folder", "digest": "f"}
    )
    table = compare([evaluation("a"), folder], price_per_gpu_hour=4)
    for label in (
        "FID",
        "CLIP score",
        "Parameters",
        "GPU-hours",
        "Energy, kWh",
        "Seconds an image",
        "Cost at 4 a GPU-hour",
    ):
        assert rows(table)[label].cells[1].text == "–", label
        assert rows(table)[label].cells[0].text != "–", label
        assert marks(table, label) == [None, None], label
        assert rows(table)[label].cells[1].note, f"{label} has its reason"
    assert "Not known: its training run is not known here." in table.notes
    assert rows(table)["guidance_scale"].cells[1].text == "–"


def test_a_figure_that_could_not_be_taken_has_the_reason_of_its_evaluation() -> None:
    less = {name: found for name, found in made_evaluation().measures.items() if name != "fid"}
    table = compare(
        [evaluation("a"), evaluation("b", measures=less, missing={"fid": "the moon"})], price_per_gpu_hour=None
    )
    assert rows(table)["FID"].cells[1].text == "–"
    assert "Not known: the moon." in table.notes


def test_figures_of_other_features_are_other_rows() -> None:
    vgg = evaluation("b", measures={"fid_random_vgg": measure(3.0, extractor="random_vgg")})
    table = compare([evaluation("a"), vgg], price_per_gpu_hour=None)
    assert [row.label for row in table.groups["Fidelity"]] == ["FID", "FID (random_vgg)"]


def test_what_is_no_comparison_is_refused() -> None:
    with pytest.raises(UserError, match="needs two evaluations or more"):
        compare([evaluation("a")], price_per_gpu_hour=None)
    with pytest.raises(UserError, match="evaluations 1 and 3 are the same, of a"):
        compare([evaluation("a"), evaluation("b"), evaluation("a")], price_per_gpu_hour=None)


def test_the_terminal_shows_notes_and_no_markup_of_names() -> None:
    other = changed(made_evaluation().reference, digest="e" * 64)
    table = compare([evaluation("[red]a"), evaluation("b", reference=other)], price_per_gpu_hour=None)
    out = io.StringIO()
    render(table, Console(file=out, width=120))
    shown = out.getvalue()
    assert "[red]a" in shown
    assert "23.4 [21.9, 24.9] (a)" in shown
    assert "(a) Not comparable with [red]a: other real images." in shown


# --- the plot ---


def test_the_plot_is_a_picture_with_the_runs_in_it() -> None:
    runs = [evaluation("msdm"), flux()]
    png = quality_cost_plot(runs, price_per_gpu_hour=None)
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.size == (1440, 920)
    inked = np.asarray(picture.convert("L")) < 200
    assert 0.005 < inked.mean() < 0.2
    assert png == quality_cost_plot(runs, price_per_gpu_hour=None, measure="fid", against="hours")
    assert png != quality_cost_plot(runs, price_per_gpu_hour=None, measure="clip_score", against="seconds")


def test_labels_of_near_points_lie_on_no_other() -> None:
    places = [(0.0, 10.0), (20.0, 12.0), (10.0, 11.0), (0.0, 100.0), (400.0, 11.0)]
    rises = _rises(places)
    heights = [y + rise for (_, y), rise in zip(places, rises, strict=True)]
    assert heights == [10, 36, 23, 100, 11]


def test_what_cannot_be_plotted_is_explained() -> None:
    runs = [evaluation("msdm"), flux()]
    with pytest.raises(UserError, match="no measure 'fod' to plot: did you mean 'fid'"):
        quality_cost_plot(runs, price_per_gpu_hour=None, measure="fod")
    with pytest.raises(
        UserError, match=r"no cost 'cost' to plot: .*there are hours, energy, seconds; cost needs a price"
    ):
        quality_cost_plot(runs, price_per_gpu_hour=None, against="cost")
    with pytest.raises(UserError, match="nothing to plot of fid and energy: fewer than two runs"):
        quality_cost_plot(runs, price_per_gpu_hour=None, measure="fid", against="energy")
    other = changed(made_evaluation().reference, digest="e" * 64)
    with pytest.raises(UserError, match="nothing to plot: fewer than two runs"):
        quality_cost_plot([evaluation("a"), evaluation("b", reference=other)], price_per_gpu_hour=None)


# --- where evaluations are found ---


def test_evaluations_are_found_by_run_and_by_model(tracking_uri: str, tmp_path: Path) -> None:
    training = Tracker.start(experiment="training", run_name="t", tags={})
    unevaluated = Tracker.start(experiment="training", run_name="u", tags={})
    tags = {"medsynth.kind": "evaluation", "mlflow.parentRunId": training.run_id}

    def evaluate(name: str, status: Any) -> Tracker:
        tracker = Tracker.start(experiment="evaluations", run_name=name, tags=tags)
        tracker.log_text(evaluation(name).model_dump_json(), "evaluation/evaluation.json")
        if status:
            tracker.finish(status)
        return tracker

    first = evaluate("first", "FINISHED")
    evaluate("second", "FINISHED")
    evaluate("failed", "FAILED")
    evaluate("running", None)
    client = training.client
    client.create_registered_model("tiny")
    for tracker in (training, unevaluated):
        client.create_model_version("tiny", f"runs:/{tracker.run_id}/model", run_id=tracker.run_id)
    client.create_model_version("tiny", str(tmp_path))
    client.set_registered_model_alias("tiny", "champion", "1")

    assert open_evaluation(first.run_id).model.name == "first"
    for name in (training.run_id, f"runs:/{training.run_id}", "models:/tiny/1", "models:/tiny@champion"):
        assert open_evaluation(name).model.name == "second", name
    for wrong, said in {
        "models:/tiny/2": "models:/tiny/2 has no finished evaluation: medsynth evaluate makes one",
        "models:/tiny/latest": "was registered without a run",
        "models:/tiny/9": "has no version 9: there are 1, 2, 3",
        "models:/tiny@chump": "chump",
        "0" * 32: "not found",
    }.items():
        with pytest.raises(UserError, match=said):
            evaluation_document(wrong)


def test_a_damaged_document_is_named(tracking_uri: str) -> None:
    tracker = Tracker.start(experiment="e", run_name="r", tags={"medsynth.kind": "evaluation"})
    tracker.log_text(json.dumps({"created": 3}), "evaluation/evaluation.json")
    with pytest.raises(UserError, match=f"{tracker.run_id} is damaged or of another version: created"):
        open_evaluation(tracker.run_id)


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path) -> None:
    evaluation("msdm").save("one")
    flux().save("two")
    app = typer.Typer()
    app.command()(compare_command)
    options = ["--price", "2.5", "--markdown", "t.md", "--latex", "t.tex", "--plot", "plots/p.png"]
    done = CliRunner().invoke(app, ["one", "two", *options])
    assert done.exit_code == 0, done.output
    table = compare([evaluation("msdm"), flux()], price_per_gpu_hour=2.5)
    assert Path("t.md").read_text() == to_markdown(table)
    assert Path("t.tex").read_text() == to_latex(table)
    assert Image.open("plots/p.png").size == (1440, 920)
    assert "Cost at 2.5 a GPU-hour" in done.output

    missing = CliRunner().invoke(app, ["one", "three"])
    assert isinstance(missing.exception, UserError)
    assert "no evaluation at three" in str(missing.exception)
