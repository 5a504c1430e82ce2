"""The engine for models that fit one device: a replica on each rank, gradients averaged over ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainers import checkpoint
from trainers.compiling import compile_blocks
from trainers.ema import EMA
from trainers.engines import Arriving, Saving
from trainers.engines.ranks import Ranks
from trainers.recipe import Training
from trainers.saving import CheckpointWriter


class DDPEngine(Ranks):
    """AdamW on replicas held equal by DistributedDataParallel; alone (no process group) it needs neither."""

    def __init__(self, model: nn.Module, training: Training, device: torch.device) -> None:
        super().__init__(device)
        self._training = training
        self._module = model.to(device).train()
        if training.channels_last:
            self._module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # undeclared, documented
        if training.compile:
            compile_blocks(self._module)
        self.model: nn.Module = self._module
        if self.world_size > 1:
            self.model = DistributedDataParallel(
                self._module,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        self._optimizer = torch.optim.AdamW(
            self._module.parameters(),
            lr=training.learning_rate,
            betas=training.adam_betas,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._ema = EMA(self._module, training.ema_decay)
        self._writer = CheckpointWriter()

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._training.precision == "bf16")

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        # Ranks exchange gradients in the backward pass, if they were to when the forward pass began: before the last
        # micro-batch that would be wasted.
        replicas = self.model if isinstance(self.model, DistributedDataParallel) else None
        return replicas.no_sync() if replicas and not is_last else nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float, loss: Tensor, *, stop_requested: bool) -> Arriving:
        grad_norm = nn.utils.clip_grad_norm_(self._module.parameters(), self._training.max_grad_norm)
        # One small exchange carries the loss and the wish to stop; gradients are equal on all ranks already.
        shared = torch.stack([loss.detach().float(), torch.full_like(loss, float(stop_requested)).float()])
        if self.world_size > 1:
            dist.all_reduce(shared)
        mean_loss, stop_votes = shared / self.world_size
        applied = torch.isfinite(mean_loss) & torch.isfinite(grad_norm)
        # The fused optimizer itself leaves all as it is where `found_inf` is 1: nobody waits for the device to say so.
        self._optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._ema.update(self._module, applied)
        self._optimizer.zero_grad(set_to_none=True)
        return Arriving(mean_loss, grad_norm, applied, stop_votes)

    @contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        self._ema.swap(self._module)
        self._module.eval()
        try:
            with torch.no_grad():
                yield self._module
        finally:
            self._ema.swap(self._module)
            self._module.train()

    def save(self, folder: Path, step: int) -> Saving | None:
        if self.rank != 0:  # replicas are equal: one rank writes for all
            return None
        state = checkpoint.state_of(step=step, model=self._module, ema=self._ema, optimizer=self._optimizer)
        return self._writer.save(folder, state, checkpoint.write)

    def load(self, folder: Path) -> int:
        return checkpoint.load(folder, model=self._module, ema=self._ema, optimizer=self._optimizer)
