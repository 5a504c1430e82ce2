"""What ranks tell each other, whatever engine trains on them."""

from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The ranks of the default process group; without one, a single rank that has nobody to ask."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def mean(self, total: float, count: int) -> float:
        sums = torch.tensor([total, float(count)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def any_rank(self, fact: bool) -> bool:
        if self.world_size == 1:
            return fact
        votes = torch.tensor(int(fact), device=self.device)
        dist.all_reduce(votes)
        return bool(votes)

    def gather(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.world_size
        dist.gather_object(value, gathered if self.rank == 0 else None)
        return [item for item in gathered if item is not None] if self.rank == 0 else []
