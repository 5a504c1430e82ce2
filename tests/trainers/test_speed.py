"""What makes training fast changes nothing of it, and keeps the process from waiting for the device."""

import multiprocessing
import threading
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from data_shards import Batch
from tests.servers import free_port
from tests.trainers.test_loop import CPU, Reports, run, states, train_asked, with_training
from trainers import checkpoint, saving
from trainers.engines import StepOutcome
from trainers.engines.ddp import DDPEngine
from trainers.families import msdm
from trainers.flops import pass_flops
from trainers.hardware import peak_flops
from trainers.loop import train
from trainers.msdm.denoiser import denoiser_flops
from trainers.recipe import MSDMRecipe, Training, load_recipe
from trainers.run_folder import RunFolder
from trainers.saving import CheckpointWriter
from trainers.stage import Stage
from trainers.timing import Interval
from trainers.worker import train_rank

__all__ = ["run"]  # a fixture


def test_channels_last_computes_the_same(recipe: MSDMRecipe, run: RunFolder) -> None:
    weights = []
    for channels_last in (False, True):
        reports = Reports()
        changed = with_training(recipe, "denoiser", channels_last=channels_last)
        train_rank(changed, "denoiser", run, device=CPU, report=reports, resume_from=None)
        weights.append(reports.weights)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(recipe: MSDMRecipe, run: RunFolder) -> None:
    losses = []
    for is_compiled in (False, True):
        stage, _ = msdm.build(recipe, "denoiser", run, CPU)
        engine = DDPEngine(stage.model, with_training(recipe, "denoiser", compile=is_compiled).denoiser.training, CPU)
        [batch, *_] = next(msdm.open_stream(recipe, "denoiser", run, "train").batches())
        prepared = stage.prepare(batch, True)
        loss = stage.objective(engine.model, **prepared).mean()
        engine.backward(loss)
        outcome = engine.step(1e-3, loss, stop_requested=False).read()
        losses.append([outcome.loss, outcome.grad_norm])
        compiled = [module for module in engine.model.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == is_compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.lift_fresh)


class Waits(TorchDispatchMode):
    """Counts the questions after a tensor's value, and the tensors made of a process's own numbers: each would make it
    wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in WAITS
        return func(*args, **(kwargs or {}))


def test_no_step_asks_the_device(recipe: MSDMRecipe, run: RunFolder) -> None:
    stage, engine = msdm.build(recipe, "denoiser", run, CPU)
    batches = msdm.open_stream(recipe, "denoiser", run, "train").batches()

    def steps(number: int) -> None:
        for _ in range(number):
            loss = torch.zeros(())
            for micro_batch in next(batches):
                micro_loss = stage.objective(engine.model, **stage.prepare(micro_batch, True)).mean()
                engine.backward(micro_loss)
                loss += micro_loss.detach()
            engine.step(1e-3, loss, stop_requested=False)

    steps(2)  # what is made once is made by now
    with Waits() as waits:
        steps(2)
        assert waits.count == 0
        assert float(torch.ones(())) == 1
        torch.tensor([1.0])
    assert waits.count == 2


def count_exchanges(rank: int, port: int, counts: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    settings = Training(steps=3, global_batch_size=8, micro_batch_size=1, learning_rate=1e-3)
    stage = Stage(
        model=nn.Linear(3, 1),
        prepare=lambda batch, is_training: {"images": batch.inputs},
        objective=lambda model, images: model(images)[:, 0],
        preview=lambda model, which: torch.zeros(len(which), 1, 1, 3, dtype=torch.uint8),
        num_previews=1,
        flops_per_image=1.0,
    )
    engine = DDPEngine(stage.model, settings, CPU)
    assert isinstance(engine.model, DistributedDataParallel)
    exchanged = 0

    def noted(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        nonlocal exchanged
        exchanged += 1
        return default_hooks.allreduce_hook(group, bucket)

    engine.model.register_comm_hook(dist.group.WORLD, noted)
    batch = Batch(torch.ones(1, 3), ["a"], ["k"], [False], [0])

    class Stream:
        replaced = 0

        def batches(self, start_step: int) -> Iterator[list[Batch]]:
            return repeat([batch] * 4)

        def one_pass(self, *_: Any) -> Iterator[Batch]:
            return iter([batch])

    stream: Any = Stream()
    report: Any = lambda *_: None  # noqa: E731
    train(training=settings, stage=stage, engine=engine, stream=stream, validation=stream, seed=0, report=report)
    counts.put(exchanged)
    dist.destroy_process_group()


def test_ranks_exchange_gradients_once_a_step() -> None:
    """Not with each of the four micro-batches."""
    context = multiprocessing.get_context("spawn")
    counts, port = context.SimpleQueue(), free_port()
    ranks = [context.Process(target=count_exchanges, args=(rank, port, counts)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert [counts.get(), counts.get()] == [3, 3]


def test_training_goes_on_while_a_checkpoint_is_written(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written of the state as it was, not as it is by then."""
    straight, held_up = Reports(), Reports()
    recipe = with_training(recipe, "denoiser", checkpoint_every_steps=2, steps=3)
    train_rank(recipe, "denoiser", run, device=CPU, report=straight, resume_from=None)
    may_write, write = threading.Event(), checkpoint.write

    def write_late(folder: Path, state: Any) -> None:
        assert may_write.wait(60)
        write(folder, state)

    monkeypatch.setattr(checkpoint, "write", write_late)
    seen: list[int] = []

    def stop_requested() -> bool:
        seen.append(len(seen) + 1)
        if len(seen) == 3:
            may_write.set()
        return False

    train_asked(recipe, run, held_up, stop_requested=stop_requested)
    for step in (2, 3):
        then, now = states(straight.checkpoints[step]), states(held_up.checkpoints[step])
        assert all(torch.equal(value, now[name]) for name, value in then.items())


def test_a_checkpoint_that_cannot_be_written_ends_the_training(
    recipe: MSDMRecipe, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, state: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(OSError, match="no space left"):
        train_rank(recipe, "denoiser", run, device=CPU, report=lambda *_: None, resume_from=None)


def test_without_room_for_a_copy_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[str] = []

    def write(folder: Path, state: Any) -> None:
        writers.append(threading.current_thread().name)

    state = {"weights": {"w": torch.zeros(1000)}}
    CheckpointWriter().save(tmp_path, state, write).written.result(60)
    monkeypatch.setattr(saving, "available_memory", lambda: 4500.0)  # room for one copy and not for a quarter more
    assert CheckpointWriter().save(tmp_path, state, write).written.done()
    here = threading.current_thread().name
    assert [name == here for name in writers] == [False, True]


def test_all_saves_share_one_buffer_of_the_states_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FLUX's shapes, which single blocks rounded up to powers of two would take 1.5 times as much for."""
    shapes = [(3072, 64), (3072,), (9216, 3072), (1, 12289), ()]
    state = {"weights": {str(shape): torch.randn(shape, dtype=torch.bfloat16) for shape in shapes}, "step": 7}
    nbytes = sum(tensor.nbytes for tensor in state["weights"].values())  # type: ignore[attr-defined]
    written: list[dict[str, Any]] = []
    asked: list[None] = []

    def write(folder: Path, copy: Any) -> None:
        assert copy["step"] == 7
        saved = {name: tensor.clone() for name, tensor in copy["weights"].items()}
        written.append({"copies": saved, "at": [tensor.data_ptr() for tensor in copy["weights"].values()]})
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in copy["weights"].values())

    def available() -> float:
        """As much as the first copy takes; by the second, that is what it has taken."""
        asked.append(None)
        return 1.3 * nbytes if len(asked) == 1 else 0.0

    monkeypatch.setattr(saving, "available_memory", available)
    writer = CheckpointWriter()
    for _ in range(3):
        for tensor in state["weights"].values():  # type: ignore[attr-defined]
            tensor += 1
        writer.save(tmp_path, state, write).written.result(60)
        for name, value in state["weights"].items():  # type: ignore[attr-defined]
            assert torch.equal(written[-1]["copies"][name], value)
    assert len(asked) == 1
    assert written[0]["at"] == written[1]["at"] == written[2]["at"]
    assert nbytes <= writer.staged_bytes < nbytes + 64 * len(shapes)


def test_a_larger_state_takes_a_larger_buffer(tmp_path: Path) -> None:
    """As the first save after a start has no moments yet."""
    writer, seen = CheckpointWriter(), []

    def write(folder: Path, copy: Any) -> None:
        seen.append([tensor.clone() for tensor in copy])

    state = [torch.arange(5.0)]
    for _ in range(2):
        writer.save(tmp_path, state, write).written.result(60)
        state.append(torch.arange(1000))
    writer.save(tmp_path, state, write).written.result(60)
    assert [len(copies) for copies in seen] == [1, 2, 3]
    assert all(torch.equal(copy, tensor) for copies in seen for copy, tensor in zip(copies, state, strict=False))
    assert writer.staged_bytes == 64 + 2 * 8000


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "CGROUP", tmp_path)
    assert saving.available_memory() > 2**20
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\nfile 1500000\ninactive_file 1400000\nactive_file 100000\n")
    assert saving.available_memory() == 1.9e6  # what was read some time ago is given up when it is wanted
    (tmp_path / "memory.max").write_text("max\n")
    assert saving.available_memory() > 2**22


# --- figures ---


def test_flops_are_those_of_the_products() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))

    def objective(model: nn.Module, *, images: Tensor) -> Tensor:
        losses: Tensor = model(images).square().sum(1)
        return losses

    convolution, linear = 2 * 3 * 8 * 9 * 16 * 16, 2 * 8 * 16 * 16 * 5
    # Backwards each layer has two products, for its weights and for its input; the image needs no gradient.
    expected = 2 * convolution + 3 * linear
    assert pass_flops(build, objective, images=torch.zeros(1, 3, 16, 16)) == expected


def test_the_studys_denoiser_takes_the_published_order_of_flops() -> None:
    """Of its 306 M weights the convolutions' count once for each of the 4 to 1024 places they are applied at."""
    recipe = load_recipe(str(Path(__file__).parents[2] / "recipes/msdm-medvqa-gi.yaml"))
    assert isinstance(recipe, MSDMRecipe)
    assert 1e11 < denoiser_flops(recipe, embedding_dim=768) < 1e12


def test_an_interval_tells_what_its_time_went_into(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainers.timing.time.perf_counter", lambda: now[0])
    interval = Interval(CPU)
    for loss, applied in ((2.0, True), (9.0, False)):
        for activity, seconds in (("data", 1), ("forward", 2), ("backward", 3), ("forward", 2), ("optimizer", 2)):
            with interval.time(activity):  # type: ignore[arg-type]
                now[0] += seconds
        with interval.time("stall"):
            now[0] += 5
        interval.add(StepOutcome(loss, 0.5, applied, False))
    assert interval.metrics(40) == {
        "loss": 2.0,
        "grad_norm": 0.5,
        "images_per_second": 4.0,
        "data_wait_fraction": 0.1,
        "skipped_steps": 1.0,
        "data_seconds": 1.0,
        "forward_seconds": 4.0,
        "backward_seconds": 3.0,
        "optimizer_seconds": 2.0,
        "stall_seconds": 5.0,
    }


def test_the_rate_is_reported_with_every_log(recipe: MSDMRecipe, run: RunFolder) -> None:
    reports = Reports()
    train_rank(recipe, "denoiser", run, device=CPU, report=reports, resume_from=None)
    stage, _ = msdm.build(recipe, "denoiser", run, CPU)
    for step, metrics in reports.metrics.items():
        if "loss" in metrics:
            rate = metrics["images_per_second"] * stage.flops_per_image
            assert metrics["teraflops_per_second"] == pytest.approx(rate / 1e12), step
            assert 0 < metrics["mfu"] < 1.5


def test_a_cpus_peak_is_measured() -> None:
    assert 1e9 < peak_flops(CPU, torch.float32) < 1e14
