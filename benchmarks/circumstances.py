"""Where and when a benchmark was measured, as each result file says it.

Imports next to nothing: some benchmarks measure what an import takes, or a process without it.
"""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.provenance import git_commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "torchmetrics", "diffusers", "transformers", "accelerate"),
    *("deepspeed", "bitsandbytes", "torchao", "ray", "optuna", "mlflow"),
)


def circumstances(device: str = "cpu") -> dict[str, Any]:
    """Ask before measuring: how busy the machine is with other work is among them."""
    return {
        "date": date.today().isoformat(),
        "machine": _machine(device),
        "load_before": os.getloadavg()[0],
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": git_commit(),
    }


def _machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": "CPU",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        import torch

        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "device": gpu.name,
            "memory_gib": gpu.total_memory / 2**30,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
