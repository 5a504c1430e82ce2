"""The engine for models larger than one device: DeepSpeed ZeRO-3 (Rajbhandari et al. 2020, arXiv 1910.02054).

Each rank holds a stretch of every weight, of its gradient, of Adam's moments and of the moving average; a layer is
whole only while it computes. So every rank must run the same forwards in the same order, always.

The only module that imports DeepSpeed.
"""

import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from cluster.errors import UserError, nearest
from data_shards import derive_seed
from trainers import sharded_checkpoint
from trainers.ema import ramped_decay
from trainers.engines import StepOutcome
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.engines.ranks import Ranks
from trainers.recipe import Training
from trainers.sharded_checkpoint import Kind, ShardedCheckpoint, State, mismatches, stretch

# DeepSpeed looks for an accelerator while it is imported, and warns on the terminal that there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch has deprecated: nothing that a user could mend.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

NO_KEYS: Mapping[str, Any] = MappingProxyType({})
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
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer: torch.optim.Optimizer
        if optimizer_states == "bf16":
            self._optimizer = Bf16AdamW(
                trained,
                learning_rate=training.learning_rate,
                betas=training.adam_betas,
                weight_decay=training.weight_decay,
                seed_of=lambda step: derive_seed("rounding", self.rank, step),
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
        self._ema_decay, self._ema_updates = training.ema_decay, 0
        self._average = {name: held.float().clone() for name, held in self._held()} if training.ema_decay else {}

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()  # the weights themselves are in the recipe's precision

    def backward(self, loss: Tensor, *, is_last_micro_batch: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(is_last_micro_batch)
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, loss: Tensor, *, stop_requested: bool) -> StepOutcome:
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
        return StepOutcome(mean_loss, grad_norm, applied, stop_votes > 0)

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

    def save(self, folder: Path, step: int) -> bool:
        own = {name: parameter.ds_tensor for name, parameter in self._parameters.items()}  # frozen ones have no other
        tensors: dict[Kind, dict[str, Tensor]] = {"weights": own | dict(self._held())}
        if self._average:
            tensors["ema"] = self._average
        if self._optimizer_steps():
            tensors |= {moment: dict(self._held(moment)) for moment in MOMENTS}
        sharded_checkpoint.save(
            folder,
            rank=self.rank,
            world_size=self.world_size,
            state=State(step, self._optimizer_steps(), self._ema_updates, _shapes(self._parameters)),
            tensors={
                kind: {name: tensor[: self._length(name)] for name, tensor in parts.items()}
                for kind, parts in tensors.items()
            },
        )
        return True

    def load(self, folder: Path) -> int:
        checkpoint = ShardedCheckpoint(folder).check_fits(_shapes(self._parameters))
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


@torch.no_grad()
def load_partitioned(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill a model, cut over the ranks or whole, from whole tensors of which each is dropped before the next is read.

    Raises UserError naming weights that are missing, not expected, or of another shape.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    expected = _shapes(parameters)
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in named_tensors:
        found[name] = tuple(tensor.shape)
        if found[name] != expected.get(name):
            continue
        parameter = parameters[name]
        if hasattr(parameter, "ds_tensor"):
            start, stop = stretch(tensor.numel(), dist.get_rank(), dist.get_world_size())
            parameter.ds_tensor[: stop - start].copy_(tensor.flatten()[start:stop])
        else:
            parameter.copy_(tensor)
    if differing := mismatches(expected=expected, found=found):
        raise UserError(f"the weights do not fit the {type(model).__name__}: {differing}")


def _shapes(parameters: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}


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


# --- DeepSpeed's configuration ---


def deepspeed_config(
    training: Training,
    world_size: int,
    *,
    optimizer_states: Literal["fp32", "bf16"] = "fp32",
    keys: Mapping[str, Any] = NO_KEYS,
) -> dict[str, Any]:
    """What the recipe says, in DeepSpeed's words, together with further `keys` from `transformer.deepspeed`.

    Raises UserError for a key that DeepSpeed does not know or that contradicts what the recipe says elsewhere, and for
    a global batch that cannot be dealt out to the ranks.
    """
    has_bf16_states = optimizer_states == "bf16"
    accumulation, remainder = divmod(training.global_batch_size, training.micro_batch_size * world_size)
    if remainder:
        raise UserError(
            f"global_batch_size {training.global_batch_size} is not a multiple of micro_batch_size "
            f"{training.micro_batch_size} x {world_size} workers"
        )
    batches = (
        f"training.global_batch_size {training.global_batch_size} = "
        f"micro_batch_size {training.micro_batch_size} x {world_size} workers x {accumulation}"
    )
    fixed: dict[str, tuple[object, str]] = {  # by dotted key: its value, and what in the recipe decides it
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, batches),
        "train_batch_size": (training.global_batch_size, batches),
        "gradient_accumulation_steps": (accumulation, batches),
        "gradient_clipping": (training.max_grad_norm, f"training.max_grad_norm {training.max_grad_norm}"),
        "bf16.enabled": (training.precision == "bf16", f"training.precision {training.precision}"),
        "bf16.bf16_master_weights_and_grads": (has_bf16_states, f"optimizer_states {optimizer_states}"),
        "bf16.bf16_optimizer_states": (has_bf16_states, f"optimizer_states {optimizer_states}"),
        "fp16.enabled": (False, f"training.precision {training.precision}"),
        "torch_autocast.enabled": (False, f"training.precision {training.precision}"),
        "zero_optimization.stage": (3, "engine zero3"),
        "managed_gradient_accumulation": (True, "engine zero3"),
    }
    config: dict[str, Any] = {
        "data_types": {"grad_accum_dtype": optimizer_states if training.precision == "bf16" else "fp32"},
        "zero_allow_untested_optimizer": True,  # Bf16AdamW: elementwise like AdamW, so it may be cut as that may
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too, and compiles nothing
    }
    _merge(config, keys)
    for key, (value, source) in fixed.items():
        _fix(config, key, value, source)
    _check_supported(config, optimizer_states)
    _check_known(config)
    return config


def _merge(config: dict[str, Any], keys: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, Mapping):
            block = config.setdefault(key, {})
            _merge(block, value)
        else:
            config[key] = value


def _fix(config: dict[str, Any], key: str, value: object, source: str) -> None:
    """Set what the recipe decides. Raises UserError if it is set already, to anything but this or "auto"."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
        if not isinstance(config, dict):
            raise UserError(f"transformer.deepspeed.{parent} is a block of keys, not {config!r}")
    if last in config and config[last] not in (value, "auto"):
        raise UserError(
            f"transformer.deepspeed.{key} {config[last]} contradicts transformer.{source}; "
            "remove the former, or change the latter"
        )
    config[last] = value


def _check_supported(config: Mapping[str, Any], optimizer_states: str) -> None:
    for key in {"optimizer", "scheduler"} & config.keys():
        raise UserError(f"transformer.deepspeed.{key}: AdamW and its learning rate are set in transformer.training")
    zero = config["zero_optimization"]
    for block in ("offload_optimizer", "offload_param"):
        device = (zero.get(block) or {}).get("device")
        if device == "nvme":
            raise UserError(
                f"transformer.deepspeed.zero_optimization.{block}.device nvme: checkpoints do not reach what is on "
                "NVMe; give cpu"
            )
        if block == "offload_optimizer" and device == "cpu" and optimizer_states == "bf16":
            raise UserError(
                f"transformer.deepspeed.zero_optimization.{block} needs transformer.optimizer_states fp32, not bf16"
            )


def _check_known(config: Mapping[str, Any]) -> None:
    """Raise UserError unless DeepSpeed reads every key and takes every value. What it reads, it is asked itself."""
    fields = DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in config["zero_optimization"].keys() - names:
        raise _unknown(f"zero_optimization.{key}", (f"zero_optimization.{name}" for name in names))
    reading = _Reading(config)
    try:
        # Not DeepSpeedConfig(config): that would also ask the process group for the number of ranks.
        DeepSpeedConfig.__new__(DeepSpeedConfig)._initialize_params(reading)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"transformer.deepspeed, {key}: {problem['msg']}, not {problem['input']!r}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError) as error:
        raise UserError(f"transformer.deepspeed: {error}") from None
    for key in config.keys() - reading.asked_for:
        raise _unknown(key, reading.asked_for)


class _Reading(dict[str, Any]):
    """A dictionary that notes which keys it is asked for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked_for: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked_for.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked_for.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked_for.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def _unknown(key: str, known: Iterable[str]) -> UserError:
    guess = nearest(key, known)
    return UserError(
        f"transformer.deepspeed.{key} is no key of DeepSpeed's" + (f": did you mean {guess}?" if guess else "")
    )
