"""What each benchmark's result file says of where it was measured."""

import json
import re
import subprocess
import sys

import torch

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from cluster.provenance import git_commit


def test_a_result_says_where_when_and_of_what_it_is() -> None:
    found = json.loads(json.dumps(circumstances()))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert found["machine"]["cores"] > 0
    assert found["load_before"] >= 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["git_commit"] == git_commit()
    assert RESULTS.is_dir()


def test_asking_loads_nothing_that_a_benchmark_may_want_to_measure() -> None:
    code = (
        "import sys; from benchmarks.circumstances import circumstances; circumstances();"
        "print({'torch', 'numpy', 'ray', 'optuna'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
