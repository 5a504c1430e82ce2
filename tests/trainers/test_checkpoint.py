from pathlib import Path

import pytest
import torch
from torch import nn

from cluster.errors import UserError
from trainers import checkpoint
from trainers.ema import EMA


def parts(width: int = 3) -> tuple[nn.Module, EMA, torch.optim.Optimizer]:
    model = nn.Linear(width, 2)
    ema = EMA(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(4, width)).square().sum().backward()
        optimizer.step()
        ema.update(model)
    return model, ema, optimizer


def test_all_states_come_back(tmp_path: Path) -> None:
    model, ema, optimizer = parts()
    checkpoint.write(tmp_path / "c", checkpoint.state_of(step=3, model=model, ema=ema, optimizer=optimizer))
    other, other_ema, other_optimizer = parts()
    assert checkpoint.load(tmp_path / "c", model=other, ema=other_ema, optimizer=other_optimizer) == 3
    assert torch.equal(other.state_dict()["weight"], model.state_dict()["weight"])
    assert torch.equal(other_ema.average["weight"], ema.average["weight"])
    assert other_ema.num_updates == ema.num_updates
    moments = [o.state_dict()["state"][0]["exp_avg_sq"] for o in (optimizer, other_optimizer)]
    assert torch.equal(*moments)


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    model, ema, optimizer = parts()
    checkpoint.write(tmp_path, checkpoint.state_of(step=3, model=model, ema=ema, optimizer=optimizer))
    (tmp_path / "state.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path, model=model, ema=ema, optimizer=optimizer)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    model, ema, optimizer = parts(width=3)
    checkpoint.write(tmp_path, checkpoint.state_of(step=3, model=model, ema=ema, optimizer=optimizer))
    other, other_ema, other_optimizer = parts(width=4)
    with pytest.raises(UserError, match="belongs to another model"):
        checkpoint.load(tmp_path, model=other, ema=other_ema, optimizer=other_optimizer)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a checkpoint ran')",))


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    model, ema, optimizer = parts()
    checkpoint.write(tmp_path, checkpoint.state_of(step=3, model=model, ema=ema, optimizer=optimizer))
    torch.save({"state": Evil()}, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer.pt is damaged, or of another kind: it holds more than tensors"):
        checkpoint.load(tmp_path, model=model, ema=ema, optimizer=optimizer)
