"""What a recipe says in DeepSpeed's words, and the keys that contradict it."""

from typing import Any

import pytest

from cluster.errors import UserError
from trainers.engines.deepspeed_config import deepspeed_config
from trainers.recipe import Training

TRAINING = Training(
    steps=20, global_batch_size=8, micro_batch_size=2, learning_rate=1e-3, max_grad_norm=0.5, ema_decay=0.9
)


def test_the_recipe_in_deepspeeds_words() -> None:
    config = deepspeed_config(
        TRAINING.model_copy(update={"precision": "bf16"}),
        2,
        keys={"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True, "train_batch_size": "auto"},
    )
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"]
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert config["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"gradient_clipping": 1.0},
            "gradient_clipping 1.0 contradicts transformer.training.max_grad_norm 0.5",
        ),
        ({"train_batch_size": 16}, "train_batch_size 16 contradicts transformer.training.global_batch_size 8 ="),
        ({"train_micro_batch_size_per_gpu": 1}, "micro_batch_size 2 x 2 workers x 2"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps 1 contradicts"),
        ({"bf16": {"enabled": True}}, "bf16.enabled True contradicts transformer.training.precision fp32"),
        ({"fp16": {"enabled": True}}, "fp16.enabled True contradicts transformer.training.precision fp32"),
        ({"bf16": {"bf16_optimizer_states": True}}, "contradicts transformer.optimizer_states fp32"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage 2 contradicts transformer.engine zero3"),
        ({"zero_optimization": 3}, "zero_optimization is a block of keys, not 3"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: AdamW and its learning rate are set in transformer.training"),
        ({"gradient_cliping": 0.5}, "gradient_cliping is no key of DeepSpeed's: did you mean gradient_clipping?"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"zero_optimization": {"sub_group_size": "x"}}, "sub_group_size: .* not 'x'"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "offload_param.devise: .* not 'cpu'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device nvme: .* give cpu"),
    ],
)
def test_keys_that_contradict_or_are_unknown(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        deepspeed_config(TRAINING, 2, keys=keys)


def test_a_batch_that_cannot_be_dealt_out_evenly() -> None:
    config = deepspeed_config(TRAINING, 3)  # 8 samples are four micro-batches: two each, of which two do not count
    assert (config["gradient_accumulation_steps"], config["train_batch_size"]) == (2, 12)


def test_offloaded_states_cannot_be_bf16() -> None:
    keys = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    bf16 = TRAINING.model_copy(update={"precision": "bf16"})
    with pytest.raises(UserError, match=r"offload_optimizer needs transformer\.optimizer_states fp32"):
        deepspeed_config(bf16, 2, optimizer_states="bf16", keys=keys)
