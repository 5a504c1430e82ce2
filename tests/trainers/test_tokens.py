"""What a text encoder does not read of a text is told, by each family's own tokenizer."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, T5TokenizerFast
from typer.testing import CliRunner

import medsynth
from tests.conftest import DATA
from trainers.generate import Model, generate, load_model
from trainers.msdm import MSDMPipeline
from trainers.tokens import num_tokens, unread_text

TEXT = "A chest X-ray: the left hemidiaphragm, and pneumocystis\n in both lungs."


@pytest.fixture(params=["msdm", "flux"])
def tokenizer(request: pytest.FixtureRequest, text_encoder_folder: Path) -> Any:
    if request.param == "msdm":
        return AutoTokenizer.from_pretrained(text_encoder_folder)
    return T5TokenizerFast.from_pretrained(DATA / "flux-tiny" / "tokenizer_2")


def test_each_length_leaves_the_words_that_it_has_no_tokens_for(tokenizer: Any) -> None:
    (count,) = num_tokens(tokenizer, [TEXT])
    assert num_tokens(tokenizer, []) == []
    assert num_tokens(tokenizer, ["", TEXT])[1] == count
    assert unread_text(tokenizer, TEXT, count) == unread_text(tokenizer, TEXT, count + 9) == ""
    # Whitespace at the end is nothing that could be cut.
    assert unread_text(tokenizer, TEXT + "  \n", count) == ""
    before = TEXT
    for length in range(3, count)[::-1]:
        unread = unread_text(tokenizer, TEXT, length)
        assert unread
        assert before.endswith(unread) or unread.endswith(before)
        read = TEXT[: len(TEXT) - len(unread)]
        # What is told to be read has no more tokens than are read, and the next word no longer fits.
        assert num_tokens(tokenizer, [read.rstrip()])[0] <= length
        assert num_tokens(tokenizer, [f"{read}{unread.split()[0]}"])[0] > length
        before = unread


def test_a_word_cut_in_two_is_not_read(text_encoder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    pieces = tokenizer.tokenize("pneumocystis")
    assert len(pieces) > 2
    assert unread_text(tokenizer, "signs of pneumocystis", 2 + 2 + 1) == "pneumocystis"
    assert unread_text(tokenizer, "pneumocystis", 4)  # nothing but its end is left


def test_generate_says_which_words_were_not_read(
    pipeline: MSDMPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    words = [f"word{number}" for number in range(200)]
    how: dict[str, Any] = {"num_images": 1, "batch_size": 1, "seed": 0, "device": "cpu"}
    settings = {"num_inference_steps": 1, "guidance_scale": 2.0}
    with caplog.at_level(logging.WARNING):
        generate(str(tmp_path / "model"), "a large polyp", tmp_path / "a", settings=settings, **how)
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        generate(str(tmp_path / "model"), " ".join(words), tmp_path / "b", settings=settings, **how)
    (said,) = caplog.messages
    assert said.startswith("the prompt is too long for the model, which does not read the words: word")
    assert said.endswith("word198 word199")
    assert "word0" not in said.split()


def test_a_flux_model_reads_as_many_tokens_as_its_t5(flux_folder: Path) -> None:
    model: Model = load_model(str(flux_folder), "cpu")
    tokenizer = model.pipeline.tokenizer_2
    most = model.drawing.defaults["max_sequence_length"]
    assert model.unread("a polyp") == ""
    text = "polyp " * most
    assert model.unread(text) == unread_text(tokenizer, text, most) != ""


def test_inspect_counts_tokens_for_a_recipe(shards: str, recipe_file: Path, text_encoder_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    result = CliRunner().invoke(medsynth.app, ["shards", "inspect", shards, "--recipe", str(recipe_file)])
    assert result.exit_code == 0, result.output
    assert "Tokens a caption: train " in result.output
    assert "captions are cut at " in result.output
    assert num_tokens(tokenizer, ["a"]) == [3]
