"""The engine for models larger than one device: DeepSpeed ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054).

Each rank holds a stretch of every weight, of its gradient, of Adam's moments and of the moving average; a layer is
whole only while it computes. So every rank must run the same forwards in the same order, always.

Beside deepspeed_config.py, the only module that imports DeepSpeed.
"""

import inspect
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import UserError
from data_shards import derive_seed
from trainers import sharded_checkpoint
from trainers.compiling import blocks_of, check_compiles, compile_forwards
from trainers.ema import ramped_decay
from trainers.engines import Arriving, Saving
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.engines.deepspeed_config import NO_KEYS, deepspeed_config
from trainers.engines.partitioned import shapes
from trainers.engines.ranks import Ranks
from trainers.recipe import Training
from trainers.saving import CheckpointWriter
from trainers.sharded_checkpoint import Kind, ShardedCheckpoint, State, stretch

# isort: split
import deepspeed  # only here: deepspeed_config has told it by now that there may be no accelerator
from deepspeed.utils import set_z3_leaf_module

logger = logging.getLogger(__name__)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch has deprecated: nothing that a user could mend.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


class Zero3Engine(Ranks):
    """AdamW under ZeRO-3; with precision bf16, weights are bf16 and what the optimizer holds is `optimizer_states`.

    The model may be cut already (`zero3_partitioned`) or whole; its initial weights are rounded to bf16 in either
    case. `ema_decay` 0 keeps no average: the weights are their own.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        device: torch.device,
        *,
        optimizer_states: Literal["fp32", "bf16"] = "fp32",
        deepspeed_keys: Mapping[str, Any] = NO_KEYS,
    ) -> None:
        _prepare_process()
        super().__init__(device)
        self._module = model.train()
        if training.compile:
            compile_forwards(model)
        gather_by_block(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: torch.optim.Optimizer
        if optimizer_states == "bf16":
            self._optimizer = Bf16AdamW(
                trained,
                learning_rate=training.learning_rate,
                betas=training.adam_betas,
                weight_decay=training.weight_decay,
                seed_of=lambda step: derive_seed("rounding", self.rank, step),
                compile_backend=_update_backend(device),
            )
        else:
            self._optimizer = torch.optim.AdamW(
                trained,
                lr=training.learning_rate,
                betas=training.adam_betas,
                weight_decay=training.weight_decay,
                fused=True,
            )
        self._deepspeed, self._zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=deepspeed_config(training, self.world_size, optimizer_states=optimizer_states, keys=deepspeed_keys),
        )
        self.model: nn.Module = self._deepspeed
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._writer = CheckpointWriter()
        self._ema_decay, self._ema_updates = training.ema_decay, 0
        self._average = {name: held.float().clone() for name, held in self._held()} if training.ema_decay else {}

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()  # the weights themselves are in the recipe's precision

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, loss: Tensor, *, stop_requested: bool) -> Arriving:
        # One small exchange carries the loss and the wish to stop. note: tolist is a CPU-GPU sync point
        shared = torch.stack([loss.detach().float(), loss.new_tensor(float(stop_requested)).float()])
        dist.all_reduce(shared)
        mean_loss, stop_votes = (shared / self.world_size).tolist()
        applied, grad_norm = False, math.nan
        if math.isfinite(mean_loss):
            self._zero.set_lr(learning_rate)
            self._deepspeed.step()  # does nothing, on all ranks, if the gradients' norm is not finite
            applied = self._deepspeed.was_step_applied()
            grad_norm = float(self._deepspeed.get_global_grad_norm())
        else:
            self._zero.zero_grad()  # the next backward writes over this step's gradients
        if applied:
            self._update_average()
        outcome = (mean_loss, grad_norm, float(applied), stop_votes)
        return Arriving(*map(torch.tensor, outcome))  # DeepSpeed has waited for the device already

    @contextmanager
    def averaged_model(self) -> Iterator[nn.Module]:
        present = {name: self._parameters[name].ds_tensor.data for name in self._average}
        self._point_weights_at(self._average)
        self._module.eval()
        try:
            with torch.no_grad():
                yield self._module
        finally:
            self._point_weights_at(present)
            self._module.train()

    def save(self, folder: Path, step: int) -> Saving:
        own = {name: parameter.ds_tensor for name, parameter in self._parameters.items()}  # frozen ones have no other
        tensors: dict[Kind, dict[str, Tensor]] = {"weights": own | dict(self._held())}
        if self._average:
            tensors["ema"] = self._average
        if self._optimizer_steps():
            tensors |= {moment: dict(self._held(moment)) for moment in MOMENTS}
        own_parts = {
            kind: {name: tensor[: self._length(name)] for name, tensor in parts.items()}
            for kind, parts in tensors.items()
        }
        state = State(step, self._optimizer_steps(), self._ema_updates, shapes(self._parameters))
        write = partial(sharded_checkpoint.save, rank=self.rank, world_size=self.world_size, state=state)
        return self._writer.save(folder, own_parts, write)

    def load(self, folder: Path) -> int:
        checkpoint = ShardedCheckpoint(folder).check_fits(shapes(self._parameters))
        state = checkpoint.state
        self._begin_moments(state.optimizer_steps)
        for name, parameter in self._parameters.items():
            self._read(checkpoint, "weights", name, parameter.ds_tensor)
        for name, held in self._held():
            self._read(checkpoint, "weights", name, held)
        for moment in MOMENTS if state.optimizer_steps else ():
            for name, held in self._held(moment):
                self._read(checkpoint, moment, name, held)
        for name, average in self._average.items():
            self._read(checkpoint, "ema" if checkpoint.has("ema", name) else "weights", name, average)
        self._ema_updates = state.ema_updates
        self._forget_whole_weights()
        return state.step

    # --- this rank's stretches ---

    def _held(self, moment: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """What the optimizer holds of each trained weight, the weight itself or a moment: views of flat buffers.

        DeepSpeed's safe_get_local_* give the same, but copy to the GPU what is offloaded from it.
        """
        names = {parameter: name for name, parameter in self._parameters.items()}
        for flat, parameters in zip(self._zero.fp32_partitioned_groups_flat, self._zero.fp16_groups, strict=True):
            held = flat.detach() if moment is None else self._optimizer.state[flat][moment]
            lengths = [parameter.partition_numel() for parameter in parameters]
            yield from zip((names[parameter] for parameter in parameters), held.split(lengths), strict=True)

    def _length(self, name: str) -> int:
        """Elements of the weight that are this rank's; its buffers may be longer by what pads the last ranks."""
        start, stop = stretch(self._parameters[name].ds_numel, self.rank, self.world_size)
        return stop - start

    def _read(self, checkpoint: ShardedCheckpoint, kind: Kind, name: str, target: Tensor) -> None:
        start, stop = stretch(checkpoint.numel(name), self.rank, self.world_size)
        target.data[: stop - start].copy_(checkpoint.read(kind, name, start, stop))

    def _optimizer_steps(self) -> int:
        return int(next((state["step"] for state in self._optimizer.state.values()), 0))

    def _begin_moments(self, steps: int) -> None:
        """Adam's state after `steps` steps, its moments still to be filled; none if there was no step."""
        self._optimizer.state.clear()
        for flat in self._zero.fp32_partitioned_groups_flat if steps else ():
            self._optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
            }

    # --- the moving average ---

    @torch.no_grad()
    def _update_average(self) -> None:
        self._ema_updates += 1
        decay = ramped_decay(self._ema_decay, self._ema_updates)
        for name, held in self._held() if self._average else ():
            self._average[name].lerp_(held.float(), 1 - decay)

    def _point_weights_at(self, stretches: Mapping[str, Tensor]) -> None:
        """Let the model gather its weights from other stretches than its own, which stay as they are."""
        for name, tensor in stretches.items():
            own = self._parameters[name].ds_tensor
            own.data = tensor.to(own.device, own.dtype)
        self._forget_whole_weights()

    def _forget_whole_weights(self) -> None:
        """Small weights are kept whole, and ZeRO++ keeps second copies, made when whole weights are let go."""
        self._zero.empty_partition_cache()
        self._zero.invalidate_secondary_tensor()


@contextmanager
def zero3_partitioned(
    training: Training,
    *,
    optimizer_states: Literal["fp32", "bf16"] = "fp32",
    deepspeed_keys: Mapping[str, Any] = NO_KEYS,
) -> Iterator[None]:
    """Models built under this context are cut over the ranks layer by layer: no rank ever holds all of one."""
    _prepare_process()
    config = deepspeed_config(training, dist.get_world_size(), optimizer_states=optimizer_states, keys=deepspeed_keys)
    with deepspeed.zero.Init(config_dict_or_path=config):
        yield


def _update_backend(device: torch.device) -> str | None:
    """What compiles the bf16 optimizer's update. On a GPU its many small kernels would take longer than the passes."""
    if device.type != "cuda":
        return None
    try:
        check_compiles(device)
    except UserError as error:
        logger.warning("The optimizer is not compiled, so a step takes longer: %s", error)
        return None
    return "inductor"


def gather_by_block(model: nn.Module) -> None:
    """Have DeepSpeed gather a block's weights at once, by hooks at its edges, and not layer by layer: a pass on a small
    batch would otherwise wait for the process that runs the hooks."""
    for block in blocks_of(model):
        set_z3_leaf_module(block, True)
        # Read once: a pass calls each block twice, and reading a signature takes longer than binding to it.
        block.register_forward_pre_hook(partial(_by_position, inspect.signature(block.forward)), with_kwargs=True)


def _by_position(
    signature: inspect.Signature, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Inputs by position: DeepSpeed's hooks see no others, and would let go of the weights before the backward pass."""
    call = signature.bind(*args, **kwargs)
    call.apply_defaults()
    return call.args, call.kwargs


def _prepare_process() -> None:
    """What DeepSpeed expects to find: a process group, and the number of this process's device in LOCAL_RANK."""
    is_cuda = deepspeed.accelerator.get_accelerator().device_name() == "cuda"
    if not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if is_cuda else "gloo", store=alone, rank=0, world_size=1)
    if is_cuda:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())  # chosen by whoever started this process
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        # On CPU, DeepSpeed would compile an exchange through shared memory that gloo does without: 90 s at first use.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed()
