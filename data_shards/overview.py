"""What is in a set of shards, seen from a few of them: how long captions are, how large images, what they look like."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from data_shards.decode import FORMATS, ImageError, square
from data_shards.manifest import Manifest, ShardEntry
from data_shards.reader import Encoded, ShardReader, encoded_image
from data_shards.sample import derive_seed

SHARDS_LOOKED_INTO = 4  # of each split
SAMPLES_A_SHARD = 250

COLUMNS, ROWS = 5, 3  # of a contact sheet
CELL, MARGIN, LINE, CAPTION_LINES = 300, 24, 20, 5
PLAIN, BOLD = "DejaVuSans", "DejaVuSans-Bold"
INK, FAINT, PAPER, FRAME = "#1b1f24", "#6a737d", "white", "#f0f2f4"


@dataclass(frozen=True)
class Reader:
    """How a model reads samples."""

    resolution: int
    max_tokens: int
    num_tokens: Callable[[Sequence[str]], list[int]]
    """Of each caption as a whole."""


@dataclass(frozen=True)
class Look:
    """What some samples of a split are like."""

    num_samples: int
    words: list[int]
    """In each caption, sorted."""
    sizes: list[tuple[int, int]]
    """(width, height) of each image, sorted by area; empty for a precomputed set."""
    tokens: list[int]
    """In each caption, sorted; empty without a reader."""

    @property
    def cuts(self) -> list[float]:
        """Share of each image's pixels outside of its middle square."""
        return [1 - min(size) / max(size) for size in self.sizes]


def look_into(shards: str, manifest: Manifest, split: str, reader: Reader | None = None) -> Look:
    """Read the first samples of shards spread over a split; of images only the headers are decoded."""
    entries, shard_reader = manifest.split(split), ShardReader(shards)
    step = max(1, len(entries) // SHARDS_LOOKED_INTO)
    looked_into = entries[::step][:SHARDS_LOOKED_INTO]
    samples = [sample for shard in looked_into for sample in shard_reader.read(shard, 0, SAMPLES_A_SHARD)]
    captions = [caption for sample in samples for caption in sample.captions]
    words = sorted(len(caption.split()) for caption in captions)
    tokens = sorted(reader.num_tokens(captions)) if reader else []
    sizes = [] if manifest.precomputed else sorted(map(_size, samples), key=lambda size: size[0] * size[1])
    return Look(len(samples), words, sizes, tokens)


def _size(sample: Encoded) -> tuple[int, int]:
    return Image.open(io.BytesIO(encoded_image(sample)), formats=FORMATS).size


def say_cut(looks: Iterable[Look]) -> str | None:
    """What is cut off of images that are not square, in words; None if there is nothing to say."""
    cuts = [cut for look in looks for cut in look.cuts]
    if not any(cuts):
        return None
    mean, most = sum(cuts) / len(cuts), max(cuts)
    return f"Images are cropped to a square: {mean:.1%} of the pixels are cut on average, at most {most:.1%}"


def say_tokens(looks: Mapping[str, Look], reader: Reader) -> str:
    """How long captions are for a text encoder, and how many of them it does not read to their end."""
    tokens = [count for look in looks.values() for count in look.tokens]
    num_cut = sum(count > reader.max_tokens for count in tokens)
    lengths = "; ".join(f"{split} {spread(look.tokens)}" for split, look in looks.items())
    return f"Tokens a caption: {lengths}. {num_cut} of {len(tokens)} captions are cut at {reader.max_tokens} tokens"


# --- contact sheet ---


def contact_sheet(shards: str, manifest: Manifest, path: Path, resolution: int | None = None) -> None:
    """Draw what a model sees of some samples of each split, with their captions, the same ones each time, as a PNG.

    That is the middle square of each image, at a resolution if one is given, else at that of the sheet.
    """
    splits = manifest.splits[:ROWS]
    rows: list[tuple[str, list[Encoded]]] = []
    for split in splits:
        samples = list(_some(shards, manifest, split, COLUMNS * (ROWS // len(splits))))
        rows += [(split, samples[start : start + COLUMNS]) for start in range(0, len(samples), COLUMNS)]
    texts = [[_caption_lines(sample) for sample in samples] for _, samples in rows]
    heights = [CELL + (1 + max(map(len, captions))) * LINE + MARGIN for captions in texts]
    top = MARGIN + 2 * LINE
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (CELL + MARGIN), top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    total = sum(shard.num_samples for shard in manifest.shards)
    seen = "middle squares, as a model sees them" + (f" at {resolution} x {resolution}" if resolution else "")
    title = f"{manifest.name}: {total} samples, digest {manifest.digest[:12]}; {seen}"
    pen.text((MARGIN, MARGIN), title, INK, _font(BOLD, 18))
    for (split, samples), captions, y in zip(rows, texts, accumulate(heights, initial=top), strict=False):
        for column, (sample, lines) in enumerate(zip(samples, captions, strict=True)):
            x = MARGIN + column * (CELL + MARGIN)
            sheet.paste(_thumbnail(sample, resolution or CELL), (x, y))
            (name,) = wrapped(f"{split} · {sample.key}", _font(BOLD), CELL, 1)
            for number, (line, ink, font) in enumerate([(name, FAINT, BOLD), *((line, INK, PLAIN) for line in lines)]):
                pen.text((x, y + CELL + 6 + number * LINE), line, ink, _font(font))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")


def _caption_lines(sample: Encoded) -> list[str]:
    """Captions, each on lines of its own, as far as there is room."""
    lines: list[str] = []
    for caption in sample.captions:
        if len(lines) < CAPTION_LINES:
            lines += wrapped(caption, _font(PLAIN), CELL, CAPTION_LINES - len(lines))
    return lines


def _some(shards: str, manifest: Manifest, split: str, count: int) -> Iterator[Encoded]:
    """Samples drawn at random, by the digest of the set; one read each."""
    places: list[tuple[ShardEntry, int]] = []
    entries = manifest.split(split)
    draw = Random(derive_seed("contact sheet", manifest.digest, split))
    for number in sorted(draw.sample(range(total := sum(e.num_samples for e in entries)), min(count, total))):
        for shard in entries:
            if number < shard.num_samples:
                places.append((shard, number))
                break
            number -= shard.num_samples
    reader = ShardReader(shards)
    for shard, number in places:
        yield from reader.read(shard, number, number + 1)


def _thumbnail(sample: Encoded, resolution: int) -> Image.Image:
    """What a model sees of an image, or why it sees nothing."""
    try:
        seen = Image.fromarray(square(encoded_image(sample), resolution))
        return seen.resize((CELL, CELL), Image.Resampling.LANCZOS)
    except ImageError as error:
        frame = Image.new("RGB", (CELL, CELL), FRAME)
        ImageDraw.Draw(frame).text((8, 8), str(error)[:40], INK, _font(PLAIN))
        return frame


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """The lines of a text that fit; if not all of it does, the last ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:max_lines]
    shown[-1] += "…" if len(lines) > max_lines else ""
    return [_cut(line, font, width) for line in shown]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


@cache
def _font(name: str, size: int = 14) -> ImageFont.FreeTypeFont:
    """One that matplotlib brings along: it has accents, Greek and Cyrillic."""
    import matplotlib  # takes a moment, which only this needs

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def spread(values: Sequence[int] | Sequence[str]) -> str:
    """Smallest, largest and median, in words."""
    if values[0] == values[-1]:
        return str(values[0])
    return f"{values[0]} to {values[-1]}, median {values[len(values) // 2]}"
