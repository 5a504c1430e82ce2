"""FID between two sets of features: seconds and memory, ours beside the usual ways, on the same files.

    python -m benchmarks.fidelity                        # 50,000 x 2048 twice, 2 cores; a JSON file in results/
    python -m benchmarks.fidelity --num 5000 --dim 256   # rehearse it

Features are drawn once and written to disk (800 MB); each method reads them from there, in a process of its own, so
that what it takes includes reading. `ours` streams batches into merged statistics. `scipy` is the published way: all
features at once, numpy.cov, sqrtm of the product of the covariances. `torchmetrics` gets the same features through an
extractor that changes nothing.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.circumstances import RESULTS, circumstances

BATCH = 1000


def write_features(path: Path, num: int, dim: int, seed: int, shift: float) -> None:
    """Float32 rows, correlated and with falling variances, as an extractor's are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((dim, dim)) * np.arange(1, dim + 1)[:, None] ** -0.7
    with path.open("wb") as file:
        for start in range(0, num, BATCH):
            rows = rng.standard_normal((min(BATCH, num - start), dim)) @ mixing + shift
            file.write(rows.astype(np.float32).tobytes())


def batches(path: Path, dim: int) -> Iterator[NDArray[np.float32]]:
    """Read, not memory-mapped: pages of a mapped file would count as memory taken."""
    with path.open("rb") as file:
        while chunk := file.read(BATCH * dim * 4):
            yield np.frombuffer(chunk, np.float32).reshape(-1, dim)


def ours(generated: Path, real: Path, dim: int) -> float:
    from trainers.fidelity.frechet import frechet_distance
    from trainers.fidelity.statistics import GaussianStatistics

    a, b = (GaussianStatistics.from_batches(batches(path, dim)) for path in (generated, real))
    return frechet_distance(a, b)


def scipy_sqrtm(generated: Path, real: Path, dim: int) -> float:
    import scipy.linalg

    x, y = (np.fromfile(path, np.float32).reshape(-1, dim) for path in (generated, real))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64)
    return float(gap @ gap + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real)


def torchmetrics_fid(generated: Path, real: Path, dim: int) -> float:
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = torch.nn.Identity()
    extractor.num_features = dim  # type: ignore[assignment]
    metric = FrechetInceptionDistance(feature=extractor)
    for path, is_real in ((generated, False), (real, True)):
        for batch in batches(path, dim):
            metric.update(torch.from_numpy(batch.copy()), real=is_real)
    return float(metric.compute())


METHODS = {"ours": ours, "scipy": scipy_sqrtm, "torchmetrics": torchmetrics_fid}


def memory_mb(field: str) -> float:
    """Of this process: VmRSS now, or VmHWM, the most so far."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024 / 1e6


def measure(method: str, generated: Path, real: Path, dim: int, results: Any) -> None:
    tiny = generated.with_name("tiny")
    write_features(tiny, 8, 4, seed=0, shift=0)
    METHODS[method](tiny, tiny, 4)  # once on something tiny, for what libraries load at first use
    before, cpu, started = memory_mb("VmRSS"), time.process_time(), time.perf_counter()
    value = METHODS[method](generated, real, dim)
    results.put(
        {
            "method": method,
            "fid": value,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_MB": memory_mb("VmHWM") - before,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=50_000, help="feature vectors in each of the two sets")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, help="default: results/DATE-fidelity-cpu.json")
    arguments = parser.parse_args()
    for library in ("OMP", "OPENBLAS", "MKL"):  # read when the measured processes load them
        os.environ[f"{library}_NUM_THREADS"] = str(arguments.cores)
    context = multiprocessing.get_context("spawn")
    here, rows = circumstances(), []
    with tempfile.TemporaryDirectory() as temporary:
        generated, real = Path(temporary) / "generated", Path(temporary) / "real"
        write_features(generated, arguments.num, arguments.dim, seed=1, shift=0.02)
        write_features(real, arguments.num, arguments.dim, seed=2, shift=0)
        for method in arguments.methods.split(","):
            results = context.Queue()
            load = os.getloadavg()[0]
            process = context.Process(target=measure, args=(method, generated, real, arguments.dim, results))
            process.start()
            row = results.get(timeout=3600) | {"load_before": load}
            process.join()
            rows.append(row)
            print(json.dumps(row), flush=True)
    figures = {
        **here,
        "arguments": {name: getattr(arguments, name) for name in ("num", "dim", "cores")},
        "rows": rows,
    }
    out = arguments.out or RESULTS / f"{here['date']}-fidelity-cpu.json"
    out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
