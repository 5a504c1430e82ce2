"""How much host memory loading FLUX's transformer takes when ZeRO-3 cuts it over ranks, file by file.

    python -m benchmarks.host_memory --ranks 2

Each rank should need its own part of the weights and, for a moment, one file: never the model. Runs on CPUs, on a
transformer of a few hundred megabytes with random weights, in processes with gloo between them.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

from benchmarks.circumstances import circumstances
from tests.servers import free_port
from trainers.engines.partitioned import load_partitioned
from trainers.engines.zero3 import zero3_partitioned
from trainers.flux.export import write_safetensors
from trainers.flux.load import transformer_config, transformer_weights
from trainers.recipe import Training

CONFIG = {
    "in_channels": 64,
    "num_layers": 6,
    "num_single_layers": 12,
    "attention_head_dim": 64,
    "num_attention_heads": 12,
    "joint_attention_dim": 768,
    "pooled_projection_dim": 256,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}
FILE_BYTES = 100_000_000
TRAINING = Training(steps=1, global_batch_size=12, micro_batch_size=1, learning_rate=1e-5)
MB = 1e6


@dataclass
class PeakMemory:
    """Watches this process's resident memory from when it is made until `stop`."""

    def __post_init__(self) -> None:
        self._process = psutil.Process()
        self.before = self.peak = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def stop(self) -> dict[str, float]:
        """Megabytes above where it began: at the peak, and now."""
        self._done.set()
        self._watcher.join()
        now = self._process.memory_info().rss
        return {"peak_MB": (self.peak - self.before) / MB, "after_MB": (now - self.before) / MB}


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**CONFIG)
    write_safetensors(iter(transformer.state_dict().items()), folder / "transformer", max_file_bytes=FILE_BYTES)
    transformer.save_config(folder / "transformer")


def load_on_rank(rank: int, ranks: int, port: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    with zero3_partitioned(TRAINING):  # once on something tiny, for what libraries allocate at first use
        FluxTransformer2DModel(**CONFIG | {"num_layers": 1, "num_single_layers": 0, "num_attention_heads": 1})
    dist.barrier()
    memory = PeakMemory()
    with zero3_partitioned(TRAINING):
        transformer = FluxTransformer2DModel.from_config(transformer_config(str(folder)))
    load_partitioned(transformer, transformer_weights(str(folder)))
    results.put({"rank": rank, **memory.stop()})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    here, context = circumstances(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        maker = context.Process(target=save_model, args=(folder,))
        maker.start()
        maker.join()
        sizes = [path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")]
        port, results = free_port(), context.Queue()
        ranks = [
            context.Process(target=load_on_rank, args=(rank, arguments.ranks, port, folder, results))
            for rank in range(arguments.ranks)
        ]
        for process in ranks:
            process.start()
        by_rank = sorted((results.get(timeout=300) for _ in ranks), key=lambda row: row["rank"])
        for process in ranks:
            process.join()
    figures = {
        **here,
        "model_MB": sum(sizes) / MB,
        "largest_file_MB": max(sizes) / MB,
        "part_of_a_rank_MB": sum(sizes) / arguments.ranks / MB,
        "ranks": by_rank,
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
