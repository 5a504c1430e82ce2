"""What the recipe says, in the words of DeepSpeed's configuration; and what a recipe may add in those words."""

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import ValidationError

from cluster.errors import UserError, nearest
from trainers.recipe import Training

# DeepSpeed looks for an accelerator while it is imported, and warns on the terminal that there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

NO_KEYS: Mapping[str, Any] = MappingProxyType({})


def deepspeed_config(
    training: Training,
    world_size: int,
    *,
    optimizer_states: Literal["fp32", "bf16"] = "fp32",
    keys: Mapping[str, Any] = NO_KEYS,
) -> dict[str, Any]:
    """What the recipe says, in DeepSpeed's words, together with further `keys` from `transformer.deepspeed`.

    Where the global batch cannot be dealt out to the ranks evenly, DeepSpeed is told of the larger one that could: some
    ranks repeat micro-batches then, which do not count.

    Raises UserError for a key that DeepSpeed does not know or that contradicts what the recipe says elsewhere.
    """
    has_bf16_states = optimizer_states == "bf16"
    per_pass = training.micro_batch_size * world_size
    accumulation = -(-training.global_batch_size // per_pass)
    batches = (
        f"training.global_batch_size {training.global_batch_size} "
        f"{'=' if per_pass * accumulation == training.global_batch_size else '<'} "
        f"micro_batch_size {training.micro_batch_size} x {world_size} workers x {accumulation}"
    )
    fixed: dict[str, tuple[object, str]] = {  # by dotted key: its value, and what in the recipe decides it
        "train_micro_batch_size_per_gpu": (training.micro_batch_size, batches),
        "train_batch_size": (per_pass * accumulation, batches),
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
