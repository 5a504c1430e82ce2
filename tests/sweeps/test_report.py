"""The pictures of a sweep: for what is finished, stopped, failed, conditional or alone."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from PIL import Image

from sweeps.report import importances_of, study_of, write_sweep_report
from sweeps.spec import State, SweepSpec, Trial

SPEC = SweepSpec.model_validate(
    {
        "name": "sweep-of-rates",
        "recipe": "recipes/msdm-demo.yaml",
        "space": {
            "denoiser.training.learning_rate": {"loguniform": [1e-5, 1e-2]},
            "denoiser.noise.prediction_type": {"choice": ["epsilon", "v_prediction"]},
            "denoiser.noise.min_snr_gamma": {
                "uniform": [1, 10],
                "when": {"denoiser.noise.prediction_type": "v_prediction"},
            },
            "denoiser.architecture.block_out_channels": {"choice": [[8, 16], [16, 32]]},
        },
        "objective": {"metric": "loss <i>"},
        "budget": {"trials": 16},
    }
)


def trials_of(count: int) -> list[Trial]:
    """Losses that depend on the learning rate above all; each fifth is stopped early, one failed, one runs."""
    rng = np.random.default_rng(0)
    trials = []
    for number in range(count):
        rate = float(10 ** rng.uniform(-5, -2))
        kind = "epsilon" if number % 2 else "v_prediction"
        params = {
            "denoiser.training.learning_rate": rate,
            "denoiser.noise.prediction_type": kind,
            "denoiser.architecture.block_out_channels": [8, 16] if number % 3 else [16, 32],
        }
        if kind == "v_prediction":
            params["denoiser.noise.min_snr_gamma"] = float(rng.uniform(1, 10))
        value = 0.1 + (math.log10(rate) + 3.3) ** 2 / 10 + 0.02 * (kind == "epsilon")
        steps = 300 if number % 5 == 4 else 900
        curve = {step: value + 30 / step for step in range(100, steps + 1, 100)}
        state: State = "stopped" if steps < 900 else "finished"
        trials.append(Trial(number, state, params, curve[steps], steps, steps / 10, f"run-{number}", curve))
    trials.append(replace(trials[0], number=count, state="failed", value=math.nan, steps=40, intermediate={}))
    trials.append(replace(trials[0], number=count + 1, state="running", value=None, steps=10, intermediate={}))
    return trials


def test_every_picture_is_there(tmp_path: Path) -> None:
    written = write_sweep_report(trials_of(16), SPEC, tmp_path / "report")
    names = ["history.png", "slice.png", "parallel-coordinates.png", "pareto.png", "importances.png", "sweep.html"]
    assert [path.name for path in written] == names
    for path in written[:-1]:
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20

    # The page holds what it needs, names things as text, and may not ask anyone for anything.
    page = written[-1].read_text()
    assert "<h1>Sweep sweep-of-rates</h1>" in page
    assert "loss &lt;i&gt; (less is better)" in page
    assert page.count('class="plotly-graph-div"') == 6
    assert "default-src 'none'" in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", page)
    assert page.count("plotly.js v") == 1


def figures_of(page: Path) -> dict[str, Any]:
    """Plotly's figures in the page, by heading: (traces, layout)."""
    text, found, decoder = page.read_text(), {}, json.JSONDecoder()
    for call in re.finditer(r'Plotly\.newPlot\(\s*"([\w-]+)",\s*', text):
        traces, end = decoder.raw_decode(text, call.end())
        layout, _ = decoder.raw_decode(text, text.index("{", end))
        found[call[1]] = traces, layout
    return found


def test_the_page_can_be_read(tmp_path: Path) -> None:
    """The worst trial's line is no paper, trials are whole, and keys have names that fit."""
    figures = figures_of(write_sweep_report(trials_of(3), SPEC, tmp_path)[-1])
    assert len(figures) == 6
    traces, layout = figures["Parallel-coordinates"]
    colours = [trace["line"]["color"] for trace in traces if trace["mode"] == "lines"]
    assert len(colours) == 3
    assert all(int(colour.removeprefix("rgb(").partition(",")[0]) < 160 for colour in colours), "none is paper"
    labels = ["block_out_channels", "min_snr_gamma", "prediction_type", "learning_rate"]
    assert layout["xaxis"]["ticktext"][1:] == labels
    _, layout = figures["Optimisation-history"]
    assert (layout["xaxis"]["range"], layout["xaxis"]["dtick"]) == ([-0.5, 3.5 - 1], 1)
    _, layout = figures["Pareto-front"]
    assert layout["xaxis"]["tickvals"] == [900]
    for traces, _ in figures.values():
        for trace in traces:
            bar = trace.get("marker", {}).get("colorbar")
            assert not bar or "Trial" not in bar["title"]["text"] or bar["dtick"] == 1


def test_one_importance_is_no_chart(tmp_path: Path) -> None:
    space = {key: SPEC.space[key] for key in ["denoiser.training.learning_rate"]}
    rate = "denoiser.training.learning_rate"
    trials = [replace(trial, params={rate: trial.params[rate]}) for trial in trials_of(6)]
    written = write_sweep_report(trials, SPEC.model_copy(update={"space": space}), tmp_path)
    assert "importances.png" not in [path.name for path in written]
    assert "Importances" not in written[-1].read_text().replace("plot_param_importances", "")


def test_the_study_knows_what_became_of_each_trial() -> None:
    study = study_of(trials_of(16), SPEC)
    assert [trial.state.name for trial in study.trials].count("PRUNED") == 3
    assert [trial.state.name for trial in study.trials][-1] == "FAIL"
    assert len(study.trials) == 17
    finished = [trial for trial in trials_of(16) if trial.state == "finished"]
    assert study.best_value == min(trial.value for trial in finished if trial.value is not None)
    assert study.trials[0].params["denoiser.architecture.block_out_channels"] == "[16, 32]"


def test_the_learning_rate_is_what_matters() -> None:
    importances = importances_of(study_of(trials_of(40), SPEC))
    assert next(iter(importances)) == "denoiser.training.learning_rate"
    assert importances["denoiser.training.learning_rate"] > 0.8
    assert "denoiser.noise.min_snr_gamma" not in importances  # not every trial has one


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_first_trial_is_enough(tmp_path: Path, mode: str) -> None:
    objective = SPEC.objective.model_copy(update={"mode": mode})
    spec = SPEC.model_copy(update={"objective": objective})
    one = write_sweep_report(trials_of(1), spec, tmp_path)
    assert "importances.png" not in [path.name for path in one]
    stopped = [replace(trial, state="stopped") for trial in trials_of(1)[:1]]
    assert len(write_sweep_report(stopped, spec, tmp_path)) == 5


def test_without_a_value_there_is_nothing_to_show(tmp_path: Path) -> None:
    assert write_sweep_report(trials_of(1)[1:], SPEC, tmp_path / "none") == []
    assert write_sweep_report([], SPEC, tmp_path / "none") == []


def test_values_outside_the_space_are_shown_too(tmp_path: Path) -> None:
    """Population-based training may leave it."""
    far = replace(trials_of(2)[0], number=9, params={**trials_of(2)[0].params, "denoiser.training.learning_rate": 0.1})
    trials = [*trials_of(2), far]
    distribution = study_of(trials, SPEC).trials[0].distributions["denoiser.training.learning_rate"]
    assert distribution == FloatDistribution(1e-5, 0.1, log=True)
    assert write_sweep_report(trials, SPEC, tmp_path)
