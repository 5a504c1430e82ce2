"""The Grafana dashboard shows what is exported, all of it, and nothing else. No Grafana is here to open it."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from trainers.exporter import COUNTERS, GAUGES, PREFIX, RANK_GAUGES

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "medsynth.json"
COLUMNS = 24  # of Grafana's grid
OF_RANKS = {f"ray_{PREFIX}{name}" for name in RANK_GAUGES} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}
EXPORTED = {f"ray_{PREFIX}{name}" for name in GAUGES} | OF_RANKS


@pytest.fixture
def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


@pytest.fixture
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = dashboard["panels"]
    assert len(found) == 14
    return found


def test_each_metric_is_exported_and_each_exported_one_is_shown(panels: list[dict[str, Any]]) -> None:
    shown = set()
    for panel in panels:
        for target in panel["targets"]:
            match = re.fullmatch(
                r'(max|sum) by \((run, stage|run, stage, rank)\) \((\w+)\{run=~"\$run", stage=~"\$stage"\}\)',
                target["expr"],
            )
            assert match, target["expr"]
            function, labels, metric = match.groups()
            shown.add(metric)
            assert ("rank" in labels) == (metric in OF_RANKS)
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
