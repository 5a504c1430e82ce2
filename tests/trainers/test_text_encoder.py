"""What is wrong with a text encoder is told before a training starts, by the same check that loading it makes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import UserError
from trainers.msdm.text_encoder import check_text_encoder, load_text_encoder
from trainers.recipe import TextEncoder


@pytest.fixture
def folder(text_encoder_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_encoder_folder, tmp_path / "encoder"))


def test_a_sound_one_passes_without_its_weights_being_read(folder: Path) -> None:
    settings = TextEncoder(pretrained=str(folder), max_tokens=16)
    check_text_encoder(settings)
    (folder / "model.safetensors").write_bytes(b"cut off")
    check_text_encoder(settings)


@pytest.mark.parametrize("look", [check_text_encoder, load_text_encoder])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer*", "it has no vocabulary: needed is tokenizer.json, or vocab.txt"),
        ("config.json", "text_encoder.pretrained: cannot load"),
        ("model.safetensors", "text_encoder.pretrained: .*(has no weights|no file named)"),
    ],
)
def test_a_missing_part_is_named(
    look: Callable[[TextEncoder], object], missing: str, message: str, folder: Path
) -> None:
    found = list(folder.glob(missing))
    assert found
    for path in found:
        path.unlink()
    with pytest.raises(UserError, match=message):
        look(TextEncoder(pretrained=str(folder), max_tokens=16))


@pytest.mark.parametrize("look", [check_text_encoder, load_text_encoder])
def test_more_tokens_than_it_reads_are_refused(look: Callable[[TextEncoder], object], folder: Path) -> None:
    with pytest.raises(UserError, match=r"text_encoder.max_tokens 129: .* reads 128"):
        look(TextEncoder(pretrained=str(folder), max_tokens=129))
