"""The ZeRO-3 engine against plain PyTorch: at any number of ranks, resumed, resharded, and through steps that fail.

Ranks are real processes with gloo between them. All that a number of ranks has to show is computed in one go, for
starting processes takes longer than these small models do.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cluster.errors import UserError
from data_shards import Batch, ShardStream
from tests.servers import free_port
from trainers import loop, randomness
from trainers.compiling import blocks_of, compile_forwards
from trainers.ema import EMA
from trainers.engines import StepOutcome
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.engines.partitioned import load_partitioned
from trainers.engines.zero3 import Zero3Engine, zero3_partitioned
from trainers.estimates import AVERAGE_STEP_BYTES, ZERO3_STEP_BYTES
from trainers.flux.checkpointing import CheckpointingMode, set_activation_checkpointing
from trainers.recipe import Training
from trainers.sharded_checkpoint import Kind, ShardedCheckpoint, read_parameters
from trainers.stage import Stage

pytestmark = pytest.mark.xdist_group("zero3")  # they share what ranks computed, so one process runs them all

CPU = torch.device("cpu")
GLOBAL_BATCH = 8
IMAGE_TOKENS, PROMPT_TOKENS, CHANNELS = 4, 3, 7
TRAINING = Training(
    steps=20,
    global_batch_size=GLOBAL_BATCH,
    micro_batch_size=2,
    learning_rate=1e-3,
    weight_decay=0.01,
    max_grad_norm=0.5,  # below what the gradients have, so clipping matters
    ema_decay=0.9,
)
ALL_GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # none is kept whole for being small
SECOND_COPIES = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}}
MANY_GROUPS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}}
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
Poison = Callable[[Tensor, Tensor], Tensor]  # (loss, the model's output) -> loss


def transformer() -> FluxTransformer2DModel:
    """A whole FLUX transformer of 77 thousand weights, one of 7 elements: ranks hold stretches of unequal lengths."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def inputs(step: int, samples: slice, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Of a step's global batch, these samples and what they should become."""
    generator = torch.Generator().manual_seed(step)

    def draw(*shape: int) -> Tensor:
        return torch.randn(GLOBAL_BATCH, *shape, generator=generator)[samples].to(dtype)

    batch = {
        "hidden_states": draw(IMAGE_TOKENS, CHANNELS),
        "encoder_hidden_states": draw(PROMPT_TOKENS, 32),
        "pooled_projections": draw(16),
        "timestep": draw().sigmoid(),
    }
    return with_constants(batch), draw(IMAGE_TOKENS, CHANNELS).float()


def with_constants(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    constants = {
        "guidance": torch.ones(len(batch["timestep"])),
        "img_ids": torch.zeros(IMAGE_TOKENS, 3),
        "txt_ids": torch.zeros(PROMPT_TOKENS, 3),
    }
    return batch | constants


def output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    result: Tensor = model(**batch, return_dict=False)[0]
    return result.float()


# --- the reference ---


def train_plainly(steps: list[int]) -> tuple[FluxTransformer2DModel, EMA, torch.optim.AdamW, list[tuple[float, float]]]:
    """What the engine must come to: plain PyTorch on whole batches, and each step's loss and gradient norm."""
    model = transformer()
    ema = EMA(model, TRAINING.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=TRAINING.adam_betas, weight_decay=TRAINING.weight_decay
    )
    seen = []
    for step in steps:
        batch, target = inputs(step, slice(None), torch.float32)
        loss = (output(model, batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        ema.update(model)
        seen.append((float(loss.detach()), float(norm)))
    return model, ema, optimizer, seen


def learning_rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


# --- what each rank does ---


def build(
    training: Training = TRAINING,
    *,
    is_cut: bool = True,
    checkpointing: CheckpointingMode = "none",
    **settings: Any,
) -> Zero3Engine:
    whole = transformer()
    with zero3_partitioned(training, **settings) if is_cut else nullcontext():
        model = transformer()
    if is_cut:
        load_partitioned(model, whole.named_parameters())
    set_activation_checkpointing(model, checkpointing)
    return Zero3Engine(model, training, CPU, **settings)


def take_step(engine: Zero3Engine, step: int, poison: Poison | None = None) -> StepOutcome:
    precision = next(engine.model.parameters()).dtype
    share = GLOBAL_BATCH // engine.world_size
    mine = range(engine.rank * share, (engine.rank + 1) * share, TRAINING.micro_batch_size)
    total = torch.zeros(())
    for start in mine:
        batch, target = inputs(step, slice(start, start + TRAINING.micro_batch_size), precision)
        with engine.micro_batch(is_last=start == mine[-1]):
            with engine.autocast():
                prediction = output(engine.model, batch)
            loss = (prediction - target).square().mean() / len(mine)
            if poison is not None and engine.rank == engine.world_size - 1:
                loss = poison(loss, prediction)
            engine.backward(loss)
        total += loss.detach()
    return engine.step(learning_rate(step), total, stop_requested=step == 3 and engine.rank == 0).read()


def train(
    out: Path, steps: range, *, save_at: tuple[int, ...] = (), resume_from: Path | None = None, **settings: Any
) -> list[StepOutcome]:
    """Train, and save into out/STEP after so many finished steps, always after the last."""
    engine = build(**settings)
    assert resume_from is None or engine.load(resume_from) == steps.start
    outcomes = []
    for step in steps:
        outcomes.append(take_step(engine, step))
        if step + 1 in save_at or step + 1 == steps.stop:
            engine.save(out / str(step + 1), step + 1).written.result(60)
    return outcomes


def train_compiled(out: Path, steps: range) -> tuple[list[StepOutcome], int]:
    """With compiled blocks, whose weights are gathered at their edges; and how many graphs that took."""
    torch._dynamo.reset()
    model = transformer()
    set_activation_checkpointing(model, "full")
    compile_forwards(model, backend="aot_eager")
    counters.clear()
    engine = Zero3Engine(model, TRAINING, CPU, deepspeed_keys=ALL_GATHERED)
    outcomes = [take_step(engine, step) for step in steps]
    engine.save(out, steps.stop).written.result(60)
    return outcomes, counters["stats"]["unique_graphs"]


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write. Views count nothing; copies and fills do not read what they write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in known]
        slots = zip(func._schema.arguments, args, strict=False)
        written = [value for slot, value in slots if slot.alias_info and slot.alias_info.is_write]
        if new or written:
            self.bytes += sum(tensor.nbytes for tensor in [*inputs, *new])
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(written) if isinstance(leaf, Tensor))
            if func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.zero_, torch.ops.aten.fill_):
                self.bytes -= args[0].nbytes
            if func.overloadpacket is torch.ops.aten._fused_adamw_:
                self.bytes -= sum(gradient.nbytes for gradient in args[1])  # written only where they are scaled
        return result


def step_traffic(states: Literal["fp32", "bf16"], ema_decay: float) -> float:
    """Bytes a parameter that the engine's step reads and writes after a backward pass; of the bf16 optimizer, what its
    one compiled kernel takes: weight, gradient and both moments read, all but the gradient written."""
    training = TRAINING.model_copy(update={"precision": "bf16", "ema_decay": ema_decay})
    engine = build(training=training, optimizer_states=states)
    take_step(engine, 0)
    batch, target = inputs(1, slice(0, 2), torch.bfloat16)
    with engine.micro_batch(is_last=True):
        loss = (output(engine.model, batch) - target).square().mean()
        engine.backward(loss)
    compiled = 0
    if isinstance(optimizer := engine._optimizer, Bf16AdamW):
        optimizer._update, compiled = (lambda *_: None), 4 * 2 + 3 * 2
    with Traffic() as traffic:
        engine.step(1e-3, loss.detach(), stop_requested=False)
    parameters: int = sum(parameter.ds_numel for parameter in named_parameters(engine).values())
    return float(compiled + traffic.bytes / parameters)


def traffic_of_a_step() -> dict[tuple[str, float], float]:
    kinds: list[tuple[Literal["fp32", "bf16"], float]] = [("bf16", 0.0), ("fp32", 0.0), ("fp32", 0.9)]
    return {(states, ema_decay): step_traffic(states, ema_decay) for states, ema_decay in kinds}


def hooked_modules() -> tuple[list[str], list[str]]:
    """The modules that DeepSpeed's hooks gather weights for, and those at whose edges they should."""
    engine = build(deepspeed_keys=ALL_GATHERED)
    model = engine.model.module
    assert isinstance(model, nn.Module)
    take_step(engine, 0)
    hooked = [name for name, module in model.named_modules() if hasattr(module, "ds_grads_remaining")]
    return hooked, [name for name, module in model.named_modules() if module in set(blocks_of(model))]


def nan_loss(loss: Tensor, prediction: Tensor) -> Tensor:
    return loss * torch.nan


def infinite_loss(loss: Tensor, prediction: Tensor) -> Tensor:
    return loss + torch.inf  # whose gradients are finite


def nan_gradient(loss: Tensor, prediction: Tensor) -> Tensor:
    return loss + (prediction.sum() * 0).sqrt()  # whose value is finite


POISONS: tuple[Poison, ...] = (nan_loss, nan_gradient, infinite_loss)  # the last leaves gradients that are good


def train_through_poisons(out: Path) -> list[StepOutcome]:
    """Steps 0 and 1, all poisons, step 5; saved before, between and after."""
    engine = build()
    for step in (0, 1):
        take_step(engine, step)
    engine.save(out / "before", 2).written.result(60)
    outcomes = [take_step(engine, 2 + number, poison) for number, poison in enumerate(POISONS)]
    engine.save(out / "poisoned", 2).written.result(60)
    outcomes.append(take_step(engine, 5))
    engine.save(out / "after", 6).written.result(60)
    return outcomes


def look_at_average(out: Path, **settings: Any) -> dict[str, Any]:
    """The model's weights and outputs as they are, averaged, and again as they are."""
    engine = build(**settings)
    for step in range(3):
        take_step(engine, step)
    engine.save(out, 3).written.result(60)
    batch, _ = inputs(9, slice(0, 2), torch.float32)
    seen: dict[str, Any] = {"present": gathered(engine)}
    with torch.no_grad():
        seen["present output"] = output(engine.model, batch)
    with engine.averaged_model() as model:
        assert not model.training
        seen["averaged"] = gathered(engine)
        seen["averaged output"] = output(model, batch)
        assert not seen["averaged output"].requires_grad
    assert engine.model.training
    seen["restored"] = gathered(engine)
    with torch.no_grad():
        seen["restored output"] = output(engine.model, batch)
    take_step(engine, 3)  # and training goes on
    return seen


def named_parameters(engine: Zero3Engine) -> dict[str, Any]:
    return dict(engine.model.module.named_parameters())  # type: ignore[union-attr]


def gathered(engine: Zero3Engine) -> dict[str, Tensor]:
    parameters = named_parameters(engine)
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def compare_with_local_api(out: Path) -> float:
    """The sum of differences between the saved stretches and DeepSpeed's own documented view of them."""
    engine = build()
    take_step(engine, 0)
    engine.save(out, 1).written.result(60)
    dist.barrier()
    checkpoint, difference = ShardedCheckpoint(out), 0.0
    for name, parameter in named_parameters(engine).items():
        local: dict[Kind, Tensor] = {
            "weights": safe_get_local_fp32_param(parameter),
            "exp_avg": safe_get_local_optimizer_state(parameter, "exp_avg"),
            "exp_avg_sq": safe_get_local_optimizer_state(parameter, "exp_avg_sq"),
        }
        start = parameter.partition_numel() * engine.rank
        for kind, tensor in local.items():
            saved = checkpoint.read(kind, name, start, start + len(tensor))
            difference += float((tensor[: len(saved)] - saved).abs().sum())
    return difference


def validate_and_preview(shards: str) -> tuple[dict[str, float], Tensor]:
    """The loop's validation of splits that ranks share unequally, or get nothing of, and its preview."""
    engine = build(deepspeed_keys=ALL_GATHERED)
    stage = Stage(engine.model, prepare_drawn, losses_of, partial(drawn_by, num_tokens=IMAGE_TOKENS), 3, 1.0)
    losses, singly = {}, TRAINING.model_copy(update={"micro_batch_size": 1})
    for split in ("validation", "test"):
        stream = ShardStream(
            shards,
            split=split,
            resolution=16,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=2,
            seed=0,
            rank=engine.rank,
            world_size=engine.world_size,
        )
        losses[split] = loop.validation_loss(stage, engine, stream, singly)
    return losses, loop.preview(stage, engine)


def prepare_drawn(batch: Batch, is_training: bool) -> Mapping[str, Tensor | None]:
    return {
        "hidden_states": randomness.normal(batch.seeds, "image", (IMAGE_TOKENS, CHANNELS)),
        "encoder_hidden_states": randomness.normal(batch.seeds, "prompt", (PROMPT_TOKENS, 32)),
        "pooled_projections": randomness.normal(batch.seeds, "pooled", (16,)),
        "timestep": randomness.uniform(batch.seeds, "timestep"),
    }


def losses_of(model: nn.Module, **batch: Tensor) -> Tensor:
    return output(model, with_constants(batch)).square().mean(dim=(1, 2))


def drawn_by(model: nn.Module, which: Any, num_tokens: int) -> Tensor:
    """Pictures of as many pixels as there are tokens."""
    batch, _ = inputs(7, slice(0, GLOBAL_BATCH), torch.float32)
    assert list(which)
    pixels = output(model, {k: v[list(which)] if len(v) == GLOBAL_BATCH else v for k, v in batch.items()})
    return (pixels.sigmoid() * 255).to(torch.uint8)[:, :num_tokens, :3].unsqueeze(1)


# --- ranks ---


def run_calls(rank: int, world_size: int, port: int, calls: list[Callable[[], Any]], out: Path) -> None:
    torch.set_num_threads(1)
    if world_size > 1:  # alone, the engine makes do without
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
    torch.save([call() for call in calls], out / f"{rank}.pt")
    dist.destroy_process_group()


def on_ranks(world_size: int, out: Path, *calls: Callable[[], Any]) -> list[list[Any]]:
    """The results of each call on each rank."""
    out.mkdir(parents=True)
    port = free_port()
    # A fork server imports once for all ranks, before it has threads or a process group.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ranks = [
        context.Process(target=run_calls, args=(rank, world_size, port, list(calls), out), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert [process.exitcode for process in ranks] == [0] * world_size
    by_rank = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
    return [list(results) for results in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # where the fork server finds this module
        patch.setenv("DS_ACCELERATOR", "cpu")  # also where there is a GPU
        yield tmp_path_factory.mktemp("zero3")


@pytest.fixture(scope="module")
def two(folder: Path, shards: str) -> dict[str, list[Any]]:
    """All that two ranks do."""
    bf16 = TRAINING.model_copy(update={"precision": "bf16"})
    none = TRAINING.model_copy(update={"ema_decay": 0.0})
    at = folder / "two"
    calls: dict[str, Callable[[], Any]] = {
        "straight": partial(train, at / "straight", range(20), save_at=(10,)),
        "resumed, built whole": partial(
            train, at / "resumed", range(10, 20), resume_from=at / "straight" / "10", is_cut=False
        ),
        "recomputed": partial(train, at / "recomputed", range(6), checkpointing="full", deepspeed_keys=ALL_GATHERED),
        "gathered by block": partial(train, at / "gathered by block", range(6), deepspeed_keys=ALL_GATHERED),
        "hooked": hooked_modules,
        "partly recomputed": partial(
            train, at / "partly recomputed", range(6), checkpointing="selective", deepspeed_keys=MANY_GROUPS
        ),
        "offloaded": partial(train, at / "offloaded", range(6), save_at=(3,), deepspeed_keys=OFFLOADED),
        "offloaded, resumed": partial(
            train, at / "offloaded-resumed", range(3, 6), resume_from=at / "offloaded" / "3", deepspeed_keys=OFFLOADED
        ),
        "bf16": partial(train, at / "bf16", range(12), save_at=(6,), training=bf16),
        "bf16, resumed": partial(
            train, at / "bf16-resumed", range(6, 12), resume_from=at / "bf16" / "6", training=bf16
        ),
        "bf16 states": partial(train, at / "states", range(12), save_at=(6,), training=bf16, optimizer_states="bf16"),
        "bf16 states, resumed": partial(
            train,
            at / "states-resumed",
            range(6, 12),
            resume_from=at / "states" / "6",
            training=bf16,
            optimizer_states="bf16",
        ),
        "no average": partial(train, at / "none", range(4), training=none),
        "poisoned": partial(train_through_poisons, at / "poisoned"),
        "average": partial(look_at_average, at / "average"),
        "average, second copies": partial(look_at_average, at / "average-copies", deepspeed_keys=SECOND_COPIES),
        "average, offloaded": partial(look_at_average, at / "average-offloaded", deepspeed_keys=OFFLOADED),
        "local": partial(compare_with_local_api, at / "local"),
        "validated": partial(validate_and_preview, shards),
    }
    return dict(zip(calls, on_ranks(2, at, *calls.values()), strict=True))


@pytest.fixture(scope="module")
def one(folder: Path, shards: str, two: Any) -> dict[str, list[Any]]:
    """All that one rank does: the same run, and five steps from the tenth of two ranks' on."""
    at = folder / "one"
    calls: dict[str, Callable[[], Any]] = {
        "straight": partial(train, at / "straight", range(20)),
        "resharded": partial(train, at / "resharded", range(10, 15), resume_from=folder / "two" / "straight" / "10"),
        "average": partial(look_at_average, at / "average"),
        "validated": partial(validate_and_preview, shards),
        "compiled": partial(train_compiled, at / "compiled", range(6)),
        "traffic": traffic_of_a_step,
    }
    return dict(zip(calls, on_ranks(1, at, *calls.values()), strict=True))


@pytest.fixture(scope="module")
def four(folder: Path, shards: str, one: Any) -> dict[str, list[Any]]:
    """All that four ranks do: the last five steps, from where one rank stopped."""
    at = folder / "four"
    calls: dict[str, Callable[[], Any]] = {
        "resharded": partial(train, at / "resharded", range(15, 20), resume_from=folder / "one" / "resharded" / "15"),
        "validated": partial(validate_and_preview, shards),
    }
    return dict(zip(calls, on_ranks(4, at, *calls.values()), strict=True))


@pytest.fixture(scope="module")
def plain() -> Any:
    return train_plainly(list(range(20)))


# --- comparisons ---


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, whole."""
    saved = ShardedCheckpoint(checkpoint)
    kinds: tuple[Kind, ...] = ("weights", "ema", "exp_avg", "exp_avg_sq")
    return {
        f"{kind}/{name}": saved.read(kind, name, 0, saved.numel(name)).view(shape)
        for kind in kinds
        for name, shape in saved.state.shapes.items()
        if saved.has(kind, name)
    }


def expected(reference: Any) -> dict[str, Tensor]:
    model, ema, optimizer, _ = reference
    parameters = dict(model.named_parameters())
    return {
        **{f"weights/{name}": parameter.detach() for name, parameter in parameters.items()},
        **{f"ema/{name}": ema.average[name] for name in parameters},
        **{
            f"{moment}/{name}": optimizer.state[parameter][moment]
            for moment in ("exp_avg", "exp_avg_sq")
            for name, parameter in parameters.items()
        },
    }


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    assert len(found) > 50
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=tolerance, atol=tolerance, msg=name)


def assert_identical(found: Path, wanted: Path) -> None:
    left, right = tensors(found), tensors(wanted)
    assert left.keys() == right.keys()
    assert len(left) > 50
    assert all(left[name].dtype == right[name].dtype for name in left)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert ShardedCheckpoint(found).state == ShardedCheckpoint(wanted).state


def losses_and_norms(outcomes: list[StepOutcome]) -> list[float]:
    assert all(outcome.applied for outcome in outcomes)
    return [value for outcome in outcomes for value in (outcome.loss, outcome.grad_norm)]


def assert_like_plain(by_rank: list[list[StepOutcome]], plain: Any, steps: slice, tolerance: float = 1e-5) -> None:
    reference = [value for seen in plain[3][steps] for value in seen]
    for outcomes in by_rank:
        assert losses_and_norms(outcomes) == pytest.approx(reference, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_any_number_of_ranks_is_plain_pytorch(
    ranks: str, plain: Any, folder: Path, request: pytest.FixtureRequest
) -> None:
    by_rank = request.getfixturevalue(ranks)["straight"]  # with accumulation: 4 micro-batches on one rank, 2 on two
    assert_like_plain(by_rank, plain, slice(None))
    assert_same(tensors(folder / ranks / "straight" / "20"), expected(plain), tolerance=1e-5)
    assert [outcome.stop_requested for outcome in by_rank[-1]] == [step == 3 for step in range(20)]
    weights = dict(read_parameters(folder / ranks / "straight" / "20", "weights"))
    averages = dict(read_parameters(folder / ranks / "straight" / "20", "ema"))
    assert weights.keys() == averages.keys() == dict(plain[0].named_parameters()).keys()
    assert any(not torch.equal(weights[name], averages[name]) for name in weights)


@pytest.mark.slow
def test_resumed_is_bitwise_never_stopped(two: Any, folder: Path) -> None:
    at = folder / "two"
    assert_identical(at / "resumed" / "20", at / "straight" / "20")
    assert_identical(at / "bf16-resumed" / "12", at / "bf16" / "12")
    assert_identical(at / "states-resumed" / "12", at / "states" / "12")
    assert_identical(at / "offloaded-resumed" / "6", at / "offloaded" / "6")
    assert two["resumed, built whole"][0] == two["straight"][0][10:]
    assert two["bf16, resumed"][0] == two["bf16"][0][6:]
    assert two["bf16 states, resumed"][0] == two["bf16 states"][0][6:]


@pytest.mark.slow
def test_from_two_ranks_to_one_to_four(four: Any, one: Any, plain: Any, folder: Path) -> None:
    assert_like_plain(one["resharded"], plain, slice(10, 15))
    assert_like_plain(four["resharded"], plain, slice(15, 20))
    assert_same(tensors(folder / "four" / "resharded" / "20"), expected(plain), tolerance=1e-5)
    state = ShardedCheckpoint(folder / "four" / "resharded" / "20").state
    assert (state.step, state.optimizer_steps, state.ema_updates) == (20, 20, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recomputed", "partly recomputed", "offloaded", "gathered by block"])
def test_what_saves_memory_changes_nothing(two: Any, name: str, folder: Path) -> None:
    reference = train_plainly(list(range(6)))
    assert_like_plain(two[name], reference, slice(None))
    assert_same(tensors(folder / "two" / name / "6"), expected(reference), tolerance=1e-5)


@pytest.mark.slow
def test_hooks_sit_at_the_edges_of_blocks(two: Any) -> None:
    """Of a double and a single block: DeepSpeed hooks neither their layers nor those layers' own layers."""
    for hooked, blocks in two["hooked"]:
        assert blocks == ["transformer_blocks.0", "single_transformer_blocks.0"]
        assert set(blocks) < set(hooked)
        assert not [name for name in hooked if name.startswith(tuple(f"{block}." for block in blocks))]


@pytest.mark.slow
def test_compiled_blocks_train_the_same(one: Any, folder: Path) -> None:
    ((outcomes, graphs),) = one["compiled"]
    reference = train_plainly(list(range(6)))
    assert graphs == 2  # one for each kind of block: no hook breaks them
    assert_like_plain([outcomes], reference, slice(None))
    assert_same(tensors(folder / "one" / "compiled"), expected(reference), tolerance=1e-5)


@pytest.mark.slow
def test_a_step_moves_the_bytes_that_the_planner_counts(one: Any) -> None:
    (found,) = one["traffic"]
    assert found["bf16", 0.0] == pytest.approx(ZERO3_STEP_BYTES["bf16"], rel=0.02)
    assert found["fp32", 0.0] == pytest.approx(ZERO3_STEP_BYTES["fp32"], rel=0.02)
    assert found["fp32", 0.9] == pytest.approx(ZERO3_STEP_BYTES["fp32"] + AVERAGE_STEP_BYTES, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "states"), [("bf16", torch.float32), ("states", torch.bfloat16)])
def test_bf16(two: Any, plain: Any, folder: Path, name: str, states: torch.dtype) -> None:
    """bf16 has 8 significant bits: losses stay within 1 % of float32, norms within 5 %."""
    outcomes = two["bf16" if name == "bf16" else "bf16 states"][0]
    for outcome, (loss, norm) in zip(outcomes, plain[3][:12], strict=True):
        assert outcome.applied
        assert outcome.loss == pytest.approx(loss, rel=0.01)
        assert outcome.grad_norm == pytest.approx(norm, rel=0.05)
    found = tensors(folder / "two" / name / "12")
    assert {tensor.dtype for key, tensor in found.items() if key.startswith("ema/")} == {torch.float32}
    assert {tensor.dtype for key, tensor in found.items() if not key.startswith("ema/")} == {states}


@pytest.mark.slow
def test_without_an_average_the_weights_are_their_own(two: Any, folder: Path) -> None:
    checkpoint = folder / "two" / "none" / "4"
    assert not any(name.startswith("ema/") for name in tensors(checkpoint))
    weights, averages = (dict(read_parameters(checkpoint, which)) for which in ("weights", "ema"))
    assert all(torch.equal(averages[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_what_is_not_finite_on_one_rank_changes_nothing_on_any(two: Any, folder: Path) -> None:
    for outcomes in two["poisoned"]:
        assert [outcome.applied for outcome in outcomes] == [False, False, False, True]
    at = folder / "two" / "poisoned"
    assert_identical(at / "poisoned", at / "before")
    # Nor does it leave anything behind: the next step is what it would have been.
    assert_same(tensors(at / "after"), expected(train_plainly([0, 1, 5])), tolerance=1e-5)
    state = ShardedCheckpoint(at / "after").state
    assert (state.step, state.optimizer_steps, state.ema_updates) == (6, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "name", "at"),
    [
        ("one", "average", "average"),
        ("two", "average", "average"),
        ("two", "average, second copies", "average-copies"),
        ("two", "average, offloaded", "average-offloaded"),
    ],
)
def test_the_averaged_model(ranks: str, name: str, at: str, folder: Path, request: pytest.FixtureRequest) -> None:
    by_rank = request.getfixturevalue(ranks)[name]
    averages = dict(read_parameters(folder / ranks / at, "ema"))
    weights = dict(read_parameters(folder / ranks / at, "weights"))
    model = transformer().eval()
    model.load_state_dict(averages)
    batch, _ = inputs(9, slice(0, 2), torch.float32)
    with torch.no_grad():
        wanted = output(model, batch)
    for seen in by_rank:
        assert seen["present"].keys() == averages.keys()
        for key in averages:
            assert torch.equal(seen["averaged"][key], averages[key])
            assert torch.equal(seen["present"][key], weights[key])
            assert torch.equal(seen["restored"][key], weights[key])
        torch.testing.assert_close(seen["averaged output"], wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(seen["averaged output"], seen["present output"], rtol=1e-3)
        assert torch.equal(seen["restored output"], seen["present output"])


@pytest.mark.slow
def test_stretches_are_those_of_deepspeeds_own_api(two: Any) -> None:
    assert two["local"] == [0.0, 0.0]


@pytest.mark.slow
def test_validation_and_previews_of_unequal_shares(one: Any, two: Any, four: Any) -> None:
    ((losses, pixels),) = one["validated"]
    assert losses.keys() == {"validation", "test"}
    assert pixels.shape == (3, 1, IMAGE_TOKENS, 3)
    for by_rank in (two["validated"], four["validated"]):
        for found, _ in by_rank:
            assert found == pytest.approx(losses, rel=1e-5)
        assert (by_rank[0][1].int() - pixels.int()).abs().max() <= 1
        assert all(len(drawn) == 0 for _, drawn in by_rank[1:])


# --- loading ---


def test_weights_that_do_not_fit_are_named() -> None:
    model = nn.Linear(3, 2)
    load_partitioned(model, [("weight", torch.ones(2, 3)), ("bias", torch.ones(2))])
    assert torch.equal(model.weight, torch.ones(2, 3))
    with pytest.raises(UserError, match=r"Linear: bias is missing, gain is not expected, weight is \[3, 2\]"):
        load_partitioned(model, [("weight", torch.ones(3, 2)), ("gain", torch.ones(2))])
