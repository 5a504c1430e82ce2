"""Sharded checkpoints: cut by any number of ranks, read whole or by stretches, and never half."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.errors import UserError
from trainers.sharded_checkpoint import Kind, ShardedCheckpoint, State, read_parameters, save, stretch

SHAPES = {"proj.weight": (7, 3), "proj.bias": (7,), "scale": (1,)}  # of 1 to 21 elements: padding, and empty stretches
KINDS: tuple[Kind, ...] = ("weights", "ema", "exp_avg", "exp_avg_sq")


def full_tensors() -> dict[Kind, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    dtypes = {"weights": torch.float32, "ema": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}
    return {
        kind: {name: torch.randn(shape, generator=generator).to(dtypes[kind]) for name, shape in SHAPES.items()}
        for kind in KINDS
    }


def cut(tensor: Tensor, rank: int, world_size: int) -> Tensor:
    start, stop = stretch(tensor.numel(), rank, world_size)
    return tensor.flatten()[start:stop]


def save_as(world_size: int, folder: Path, *, step: int = 5, kinds: tuple[Kind, ...] = KINDS) -> None:
    tensors = full_tensors()
    for rank in range(world_size):
        save(
            folder,
            rank=rank,
            world_size=world_size,
            state=State(step=step, optimizer_steps=4, ema_updates=3, shapes=SHAPES),
            tensors={k: {name: cut(t, rank, world_size) for name, t in tensors[k].items()} for k in kinds},
        )


@given(numel=st.integers(1, 200), world_size=st.integers(1, 20))
def test_stretches_cover_a_weight_once_as_torch_chunks_it(numel: int, world_size: int) -> None:
    chunks = torch.arange(numel).split(-(-numel // world_size))
    stretches = [list(range(*stretch(numel, rank, world_size))) for rank in range(world_size)]
    assert [s for s in stretches if s] == [chunk.tolist() for chunk in chunks]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_stretch_of_what_any_number_of_ranks_saved(world_size: int, tmp_path: Path) -> None:
    save_as(world_size, tmp_path)
    checkpoint = ShardedCheckpoint(tmp_path)
    assert checkpoint.state == State(step=5, optimizer_steps=4, ema_updates=3, shapes=SHAPES)
    for kind, tensors in full_tensors().items():
        for name, tensor in tensors.items():
            flat = tensor.flatten()
            for start in range(0, len(flat)):
                for stop in range(start + 1, len(flat) + 1):
                    part = checkpoint.read(kind, name, start, stop)
                    assert part.dtype == flat.dtype
                    assert torch.equal(part, flat[start:stop])
            assert len(checkpoint.read(kind, name, 1, 1)) == 0


@settings(max_examples=20, deadline=None)
@given(saved=st.integers(1, 6), read=st.integers(1, 6))
def test_ranks_of_another_number_read_the_same_weight(
    saved: int, read: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_as(saved, folder)
    checkpoint = ShardedCheckpoint(folder)
    for kind, tensors in full_tensors().items():
        for name, tensor in tensors.items():
            parts = [checkpoint.read(kind, name, *stretch(tensor.numel(), rank, read)) for rank in range(read)]
            assert torch.equal(torch.cat([part for part in parts if len(part)]), tensor.flatten())


def test_files_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    save_as(2, tmp_path)
    loaded = safetensors.torch.load_file(tmp_path / "rank-00001-of-00002.safetensors")
    assert len(loaded) == len(KINDS) * len(SHAPES)
    for kind, tensors in full_tensors().items():
        for name, tensor in tensors.items():
            assert loaded[f"{kind}/{name}"].dtype == tensor.dtype
            assert torch.equal(loaded[f"{kind}/{name}"], cut(tensor, 1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
    ]


def test_whole_parameters(tmp_path: Path) -> None:
    save_as(3, tmp_path)
    for which in ("ema", "weights"):
        parameters = dict(read_parameters(tmp_path, which))
        assert {name: tuple(value.shape) for name, value in parameters.items()} == SHAPES
        assert all(value.dtype == torch.float32 for value in parameters.values())
        assert all(torch.equal(parameters[name], value) for name, value in full_tensors()[which].items())


def test_without_an_average_the_weights_are_their_own(tmp_path: Path) -> None:
    save_as(2, tmp_path, kinds=("weights",))
    averages = dict(read_parameters(tmp_path, "ema"))
    assert len(averages) == len(SHAPES)
    assert all(torch.equal(averages[name], value) for name, value in full_tensors()["weights"].items())


# --- what is not whole ---


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no sharded checkpoint"):
        ShardedCheckpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save_as(3, tmp_path)
    (tmp_path / "rank-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"incomplete: rank-00002-of-00003\.safetensors is not there"):
        ShardedCheckpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    save_as(2, tmp_path)
    path = tmp_path / "rank-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"rank-00001-of-00002\.safetensors is truncated or damaged"):
        ShardedCheckpoint(tmp_path)


def test_files_of_two_checkpoints(tmp_path: Path) -> None:
    save_as(2, tmp_path)
    path = tmp_path / "rank-00001-of-00002.safetensors"
    newer = path.read_bytes()
    save_as(2, tmp_path, step=9)
    path.write_bytes(newer)
    with pytest.raises(UserError, match="of steps 9, 5"):
        ShardedCheckpoint(tmp_path)
    save_as(3, tmp_path)
    with pytest.raises(UserError, match=r"files of \[2, 3\] ranks"):
        ShardedCheckpoint(tmp_path)


def test_any_other_safetensors_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weights/scale": torch.zeros(1)}, tmp_path / "rank-00000-of-00001.safetensors")
    with pytest.raises(UserError, match="header does not say"):
        ShardedCheckpoint(tmp_path)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    save_as(2, tmp_path)
    checkpoint = ShardedCheckpoint(tmp_path)
    assert checkpoint.check_fits(SHAPES) is checkpoint
    other = {"proj.weight": (3, 7), "proj.bias": (7,), "gain": (1,)}
    with pytest.raises(
        UserError,
        match=r"another model: gain is missing, scale is not expected, proj.weight is \[7, 3\], not \[3, 7\]",
    ):
        checkpoint.check_fits(other)
