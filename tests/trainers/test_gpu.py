"""What only a GPU can show. Needs neither Ray nor MLflow: `pytest -m gpu tests/trainers/test_gpu.py`."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.standins import write_text_encoder
from tests.trainers.test_checkpointing import loss_of, tiny_transformer
from tests.trainers.test_loop import run
from tests.trainers.test_pipeline import draw
from trainers.engines.bf16_adamw import Bf16AdamW
from trainers.families import msdm
from trainers.flux.checkpointing import set_activation_checkpointing
from trainers.msdm import MSDMPipeline
from trainers.recipe import MSDMRecipe, Training
from trainers.run_folder import RunFolder
from trainers.saving import CheckpointWriter, StagingBuffer

__all__ = ["run"]  # a fixture
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DEVICE = torch.device("cuda")


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("text-encoder"), hidden_size=32, num_hidden_layers=2)


def test_no_step_waits_for_the_gpu(recipe: MSDMRecipe, run: RunFolder) -> None:
    stage, engine = msdm.build(recipe, "denoiser", run, DEVICE)
    batches = msdm.open_stream(recipe, "denoiser", run, "train").batches()

    def step() -> None:
        loss = torch.zeros((), device=DEVICE)
        for micro_batch in next(batches):
            with engine.autocast():
                micro_loss = stage.objective(engine.model, **stage.prepare(micro_batch, True)).mean()
            engine.backward(micro_loss)
            loss += micro_loss.detach()
        engine.step(1e-3, loss, stop_requested=False)

    for _ in range(8):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bf16_draws_nearly_the_same(pipeline: MSDMPipeline) -> None:
    exact = draw(pipeline, ["a polyp"])
    pipeline.to("cuda")
    assert ((exact - draw(pipeline, ["a polyp"], precision="bf16").cpu()).abs() * 255).mean() < 2


def test_two_saves_on_end_are_both_written_beside_the_training(tmp_path: Path) -> None:
    """From one pinned buffer of the state's size, which torch's allocator of pinned memory knows nothing of."""
    state = {"weights": [torch.randn(3072, 3073, device=DEVICE) for _ in range(8)]}
    nbytes = sum(tensor.nbytes for tensor in state["weights"])
    writer, may_write, seen = CheckpointWriter(), threading.Event(), []

    def write(folder: Path, copy: Any) -> None:
        assert may_write.wait(60)
        seen.append([tensor.clone() for tensor in copy["weights"]])

    for _ in range(2):
        saving = writer.save(tmp_path, state, write)
        assert not saving.written.done()
        may_write.set()
        saving.written.result(60)
        may_write.clear()
        assert all(torch.equal(copy, tensor.cpu()) for copy, tensor in zip(seen[-1], state["weights"], strict=True))
        for tensor in state["weights"]:
            tensor += 1
    assert writer.staging_is_pinned
    assert nbytes <= writer.staged_bytes < 1.001 * nbytes


def test_memory_that_cannot_be_pinned_spoils_no_kernel() -> None:
    buffer = StagingBuffer(2**20, pinned=True)
    assert buffer.is_pinned
    assert not buffer._pin()  # it is pinned already, which CUDA refuses
    assert float((torch.ones(1000, device=DEVICE) * 2).sum()) == 2000
    (copy,) = buffer.copies_of([torch.arange(1000, device=DEVICE)])
    torch.cuda.synchronize()
    assert torch.equal(copy, torch.arange(1000))


def test_a_compiled_update_takes_the_eager_ones_step() -> None:
    start = torch.linspace(-2, 2, 2**20).bfloat16()
    weights = [nn.Parameter(start.to(DEVICE)) for _ in range(2)]
    for weight, backend in zip(weights, (None, "inductor"), strict=True):
        optimizer = Bf16AdamW([weight], learning_rate=1e-3, seed_of=lambda step: step, compile_backend=backend)
        weight.grad = torch.linspace(1, -1, 2**20).bfloat16().to(DEVICE)
        optimizer.step()
    assert (weights[0].cpu() != start).any()
    assert (weights[0] != weights[1]).float().mean() < 0.01


def losses(*, compiled: bool) -> list[float]:
    from trainers.engines.zero3 import Zero3Engine

    training = Training(
        steps=4, global_batch_size=2, micro_batch_size=2, learning_rate=1e-3, precision="bf16", compile=compiled
    )
    model = tiny_transformer().bfloat16().to(DEVICE)
    set_activation_checkpointing(model, "full")
    engine = Zero3Engine(model, training, DEVICE, optimizer_states="bf16")
    seen = []
    for _ in range(4):
        with engine.micro_batch(is_last=True):
            loss: Tensor = loss_of(engine.model, torch.bfloat16)
            engine.backward(loss)
        outcome = engine.step(1e-3, loss, stop_requested=False).read()
        assert outcome.applied
        seen.append(outcome.loss)
    return seen


def test_compiled_blocks_under_zero3_train_as_eager_ones() -> None:
    eager, compiled = losses(compiled=False), losses(compiled=True)
    assert eager[-1] < eager[0]
    assert compiled == pytest.approx(eager, rel=0.02)
