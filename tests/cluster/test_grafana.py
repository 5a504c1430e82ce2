"""The Grafana dashboard shows what is exported, all of it, and nothing else; Prometheus's rules ask for no other.

No Grafana and no Prometheus is here to open them.
"""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainers.exporter import COUNTERS, GAUGES, PREFIX, RANK_GAUGES, RUN_GAUGES

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "medsynth.json"
RULES = DASHBOARD.with_name("alerts.yaml")
FUNCTIONS = ("time", "changes", "increase", "delta", "max_over_time", "avg_over_time")
COLUMNS = 24  # of Grafana's grid
OF_RANKS = {f"ray_{PREFIX}{name}" for name in RANK_GAUGES} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}
EXPORTED = {f"ray_{PREFIX}{name}" for name in [*GAUGES, *RUN_GAUGES]} | OF_RANKS


@pytest.fixture
def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


@pytest.fixture
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard["panels"]
    assert len(found) == 17
    return found


def test_each_metric_is_exported_and_each_exported_one_is_shown(panels: list[dict[str, Any]]) -> None:
    shown = set()
    for panel in panels:
        for target in panel["targets"]:
            match = re.fullmatch(
                r"(?:time\(\) - )?(max|sum) by \((run, stage|run, stage, rank)\) "
                r'\((\w+)\{run=~"\$run", stage=~"\$stage"\}\)',
                target["expr"],
            )
            assert match, target["expr"]
            function, labels, metric = match.groups()
            shown.add(metric)
            assert ("rank" in labels) == (metric in OF_RANKS)
            assert target["expr"].startswith("time") == metric.endswith("_timestamp_seconds")
            assert (function == "sum") == metric.endswith("_total")
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) == set(labels.split(", "))
    assert shown == EXPORTED


def test_panels_say_what_they_show_and_in_which_unit(panels: list[dict[str, Any]]) -> None:
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_panels_lie_side_by_side(panels: list[dict[str, Any]]) -> None:
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = Counter[tuple[int, int]]()
    for panel in panels:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= COLUMNS
        cells.update(product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
    assert set(cells.values()) == {1}
    assert len(cells) == COLUMNS * (1 + max(y for _, y in cells)), "there are gaps"


def test_it_can_be_imported_anywhere(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> None:
    """No source of data by its id elsewhere; runs and stages to choose from, by a metric that each run has."""
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "run", "stage"]
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("run", "stage"):
        query = variables[name]["query"]["query"]
        assert re.findall(r"ray_\w+", query) == [f"ray_{PREFIX}step"]
        assert query.endswith(f", {name})")
    users = [variables["run"], variables["stage"], *panels, *(target for p in panels for target in p["targets"])]
    assert {user["datasource"]["uid"] for user in users} == {"${datasource}"}
    assert "id" not in dashboard


# --- what every metric and every alert says ---


@pytest.mark.parametrize("name", [*GAUGES, *RANK_GAUGES, *RUN_GAUGES, *COUNTERS])
def test_a_help_text_is_a_sentence_that_stands_alone(name: str) -> None:
    texts: dict[str, str] = GAUGES | RANK_GAUGES | RUN_GAUGES
    texts.update({str(event): text for event, text in COUNTERS.items()})
    text = texts[name]
    assert re.fullmatch(r"[A-Z][^\n]{15,}\.", text)
    assert not re.search(r"\b([Tt]he same|their|[Aa]s above|[Dd]itto)\b", text), text


def test_each_alert_asks_for_what_is_exported() -> None:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    assert group.keys() == {"name", "rules"}
    asked = set()
    for rule in group["rules"]:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"Medsynth[A-Z]\w+", rule["alert"])
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= {"run", "stage", "rank"}
        metrics, expression = re.findall(r"ray_\w+", rule["expr"]), rule["expr"]
        assert metrics, rule["alert"]
        asked.update(metrics)
        # Nothing but known functions, labels, durations and numbers is left.
        rest = re.sub(r"ray_\w+|\[\d+m\]", "", expression)
        words = set(re.findall(r"[a-z_]+", rest))
        assert words <= {"max", "sum", "by", "run", "stage", "rank", "or", *FUNCTIONS}, words
        assert expression.count("(") == expression.count(")")
        # Only counters have a rate: an increase of a gauge would take each fall for a restart.
        assert all(name.endswith("_total") for name in re.findall(r"increase\((\w+)", expression))
    assert asked <= EXPORTED
    names = (
        "step",
        "skipped_steps",
        "data_wait_fraction",
        "storage_read_retries_total",
        "checkpoint_timestamp_seconds",
    )
    assert asked >= {f"ray_{PREFIX}{name}" for name in names}
