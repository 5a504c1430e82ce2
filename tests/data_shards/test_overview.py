"""What a set of shards is said to hold, what it is drawn as, and that it still is what was written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, Settings, overview, write_shards
from data_shards.cli import app
from data_shards.overview import CELL, MARGIN, _font, contact_sheet, look_into, wrapped
from data_shards.sources import roco_records
from tests.conftest import DATA


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("radiographs"))
    settings = Settings("x-rays", {"train": 0.6, "test": 0.4}, samples_per_shard=4)
    write_shards(roco_records(str(DATA / "radiology")), out, settings, source={"uri": "radiology"})
    return out


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "250", "TERM": "dumb"})


def test_words_and_pixels_are_those_of_the_samples(radiographs: str) -> None:
    manifest = Manifest.load(radiographs)
    assert len(manifest.split("train")) > 2
    seen = sum(look_into(radiographs, manifest, split).num_samples for split in ("train", "test"))
    assert seen == 23  # of so few shards, all
    records = list(roco_records(str(DATA / "radiology")))
    sizes = {Image.open(f"{record.folder}/{record.source_id}.jpg").size for record in records}
    looks = [look_into(radiographs, manifest, split) for split in ("train", "test")]
    assert {size for look in looks for size in look.sizes} == sizes
    assert sorted(n for look in looks for n in look.words) == sorted(len(r.captions[0].split()) for r in records)


def test_inspect_says_what_there_is(radiographs: str) -> None:
    said = command("inspect", radiographs).output
    manifest = Manifest.load(radiographs)
    for split in ("train", "test"):
        row = next(line for line in said.splitlines() if f" {split} " in line)
        assert f" {sum(s.num_samples for s in manifest.split(split))} " in row
        assert f" {manifest.groups[split]} " in row
    assert re.search(r"Words a caption: train \d+ to \d+, median \d+; test \d+ to \d+, median \d+", said)
    assert re.search(r"Pixels: train \d+ x \d+ to \d+ x \d+, median \d+ x \d+; test \d+ x \d+", said)
    assert "Looked into 23 of 23 samples" in said


def test_a_contact_sheet_shows_images_and_captions_of_each_split(radiographs: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "sheet.png"
    result = command("inspect", radiographs, "--contact-sheet", str(path))
    assert result.exit_code == 0, result.output
    sheet = Image.open(path).convert("RGB")
    assert sheet.width == MARGIN + 5 * (CELL + MARGIN)
    assert sheet.height > 2 * CELL
    first = path.read_bytes()
    contact_sheet(radiographs, Manifest.load(radiographs), path)
    assert path.read_bytes() == first
    # Each place of the first row holds a picture, and text below it.
    for column in range(5):
        x = MARGIN + column * (CELL + MARGIN)
        picture = sheet.crop((x, 64, x + CELL, 64 + CELL))
        text = sheet.crop((x, 64 + CELL, x + CELL, 64 + CELL + 60)).convert("L")
        assert len(picture.getcolors(2**24) or []) > 50
        assert np.asarray(text).min() < 80
        assert np.asarray(text).max() > 240


def test_what_the_middle_square_leaves_out_is_said_and_shown(tmp_path: Path) -> None:
    """By `write` as by `inspect`, in figures, and by the contact sheet, at a recipe's resolution too."""
    sizes = {"wide.png": (80, 40), "high.png": (40, 160), "square.png": (40, 40)}
    for name, (width, height) in sizes.items():
        pixels = np.zeros((height, width, 3), np.uint8)
        side = min(width, height)
        top, left = (height - side) // 2, (width - side) // 2
        pixels[top : top + side, left : left + side] = (200, 100, 50)
        Image.fromarray(pixels).save(tmp_path / name)
    deep = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40))
    deep.save(tmp_path / "deep.png")
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{name},a\n" for name in [*sizes, "deep.png"]))
    out = str(tmp_path / "out")
    written = command("write", str(tmp_path / "t.csv"), "--split", "train=1", "--out", out).output
    assert "1 images of more than 8 bits were stretched to their range" in written
    line = "Images are cropped to a square: 31.2% of the pixels are cut on average, at most 75.0%"
    assert line in written
    assert line in command("inspect", out).output
    sheets = []
    for resolution in (None, 16):
        contact_sheet(out, Manifest.load(out), tmp_path / "sheet.png", resolution)
        sheets.append(np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")))
        cells = [sheets[-1][64 : 64 + CELL, x : x + CELL] for x in range(MARGIN, 4 * (CELL + MARGIN), CELL + MARGIN)]
        assert sum(bool((cell[100:-100, 100:-100] == (200, 100, 50)).all()) for cell in cells) == 3
    assert not np.array_equal(sheets[0], sheets[1])  # by the resolution in its title, and the blur of the fourth


def test_square_images_lose_nothing_and_nothing_is_said() -> None:
    assert overview.say_cut([overview.Look(1, [1], [(8, 8), (9, 9)], [])]) is None


@pytest.mark.parametrize("lines", [1, 2, 5])
def test_text_never_leaves_its_cell(lines: int) -> None:
    font = _font("DejaVuSans")
    for text in ("", "short", "a chest radiograph " * 30, "x" * 500, "Röntgen 胸部 " + "y" * 80):
        shown = wrapped(text, font, CELL, lines)
        assert 1 <= len(shown) <= lines
        assert all(font.getlength(line) <= CELL for line in shown)
    assert wrapped("one two three", font, CELL, 1) == ["one two three"]
    assert wrapped("word " * 100, font, CELL, lines)[-1].endswith("…")


def test_an_undecodable_image_is_drawn_as_its_reason(
    radiographs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(overview, "encoded_image", lambda sample: b"nothing")
    contact_sheet(radiographs, Manifest.load(radiographs), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_precomputed_set_has_nothing_to_draw(precomputed: str, tmp_path: Path) -> None:
    assert command("inspect", precomputed).exit_code == 0
    with pytest.raises(UserError, match="with nothing to draw"):
        raise command("inspect", precomputed, "--contact-sheet", "x.png").exception or AssertionError


# --- verify ---


def test_a_sample_of_shards_is_checked_and_said_to_be_one(radiographs: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(radiographs, out)
    num_shards = len(Manifest.load(str(out)).shards)
    said = command("verify", str(out), "--sample", "2").output
    assert re.search(rf"^2 of {num_shards} shards, with \d+\.\d% of the bytes, are those of the manifest", said, re.M)
    assert f"All {num_shards} shards are" in command("verify", str(out), "--sample", "99").output
    # A damaged shard is found by the draws that it is in, and by the same ones again.
    damaged = next(out.glob("*-train-000001.tar"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    codes = [command("verify", str(out), "--sample", "2", "--seed", str(seed)).exit_code for seed in range(8)]
    assert set(codes) == {0, 1}
    assert codes == [command("verify", str(out), "--sample", "2", "--seed", str(seed)).exit_code for seed in range(8)]


def test_what_differs_is_said(radiographs: str, bucket: str, tmp_path: Path) -> None:
    """On S3, in chunks."""
    storage.upload_folder(Path(radiographs), f"{bucket}/set")
    assert command("verify", f"{bucket}/set").exit_code == 0
    names = [shard.name for shard in Manifest.load(radiographs).shards]
    shard = storage.read_bytes(f"{bucket}/set/{names[0]}")
    storage.write_bytes(f"{bucket}/set/{names[0]}", shard[:-1])
    storage.write_bytes(f"{bucket}/set/{names[1]}", storage.read_bytes(f"{bucket}/set/{names[1]}")[:-1] + b"x")
    storage.delete(f"{bucket}/set/{names[2]}")
    index = f"{names[3]}.index.json"
    storage.write_bytes(f"{bucket}/set/{index}", storage.read_bytes(f"{bucket}/set/{index}") + b" ")
    result = command("verify", f"{bucket}/set")
    assert result.exit_code == 1
    assert f"{names[0]}: {len(shard) - 1} bytes, the manifest says {len(shard)}" in result.output
    assert f"{names[1]}: SHA-256 " in result.output
    assert f"{names[2]}: missing" in result.output
    assert f"{index}: SHA-256 " in result.output
    assert f"4 of {len(names)} checked shards differ" in result.output


def test_a_file_comes_in_chunks_that_are_the_file(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "f").write_bytes(content)
    chunks = list(storage.iter_chunks(str(tmp_path / "f"), 1000))
    assert [len(chunk) for chunk in chunks] == [1000, 1000, 560]
    assert b"".join(chunks) == content
    (tmp_path / "empty").touch()
    assert list(storage.iter_chunks(str(tmp_path / "empty"))) == []
