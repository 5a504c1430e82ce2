"""Files of weights: found wherever they are, read without running anything, and fitted or refused."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from torch import nn

from cluster import storage
from cluster.errors import UserError
from trainers.fidelity.state_dicts import load_into, read_state_dict

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("place", ["local", "s3", "hub"])
def test_weights_are_found_wherever_they_are(
    suffix: str, named: str, place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models--clinic--tiny" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save({"state_dict": STATE}, path)
    (folder / "README.md").write_text("weights")
    weights = str(folder)
    if place == "s3":
        weights = f"{request.getfixturevalue('bucket')}/weights"
        storage.upload_folder(folder, weights)
    elif place == "hub":
        (tmp_path / "models--clinic--tiny" / "refs").mkdir()
        (tmp_path / "models--clinic--tiny" / "refs" / "main").write_text("a" * 40)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        weights = "clinic/tiny"
    found = read_state_dict(f"{weights}/{path.name}" if named == "file" else weights)
    torch.testing.assert_close(found, STATE)


class Runs:
    """What a hostile file would hold: code that runs on unpickling."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, r"w.pth is not a state dict"),
        ([torch.ones(1)], r"w.pth is not a state dict"),
        ({"x": Runs()}, r"w.pth is damaged, or of another kind: it holds more than tensors"),
        (b"not a file of weights", r"w.pth is damaged"),
        (b"", r"w.pth is damaged"),
    ],
)
def test_files_of_another_kind_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        read_state_dict(str(path))
    assert not Path("ran").exists()


def test_a_damaged_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match=r"w.safetensors is damaged"):
        read_state_dict(str(tmp_path))


def test_a_folder_must_hold_one_file_or_name_it(tmp_path: Path) -> None:
    for name in ("ResNet50.pt", "DenseNet121.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match=r"not one file of weights but DenseNet121.pt, ResNet50.pt; name the file"):
        read_state_dict(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no file .*/other.pt"):
        read_state_dict(f"{tmp_path}/other.pt")


def test_only_weights_that_fit_are_loaded() -> None:
    layer = nn.Linear(3, 2)
    load_into(layer, STATE | {"classifier": torch.ones(1)}, unused=["classifier"])
    torch.testing.assert_close(layer.weight.data, STATE["weight"])
    with pytest.raises(UserError, match=r"lacks 1 tensors such as 'bias' and has unknown 1 tensors such as 'gain'"):
        load_into(layer, {"weight": STATE["weight"], "gain": torch.ones(2)})
    with pytest.raises(UserError, match=r"'bias' in the weights is \[3\], not \[2\]"):
        load_into(layer, STATE | {"bias": torch.ones(3)})
