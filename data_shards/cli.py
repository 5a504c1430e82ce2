"""The commands `medsynth shards write|inspect|verify`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path, PurePosixPath
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster import storage
from cluster.errors import UserError
from cluster.progress import progress_lines
from cluster.terminal import ask, console, plain
from data_shards.names import split_name

if TYPE_CHECKING:
    from data_shards.overview import Reader
    from data_shards.sample import Record

app = typer.Typer(no_args_is_help=True)

reader_of_recipe: "Callable[[str], Reader] | None" = None
"""Given by the front door, for recipes belong to a layer above this one."""

DEFAULT_SPLITS = ("train=0.8", "validation=0.1", "test=0.1")


class Format(StrEnum):
    """Kinds of data sets that are understood."""

    MEDVQA = "medvqa"
    ROCO = "roco"
    TABLE = "table"
    PARQUET = "parquet"
    DATASETS = "datasets"


@app.command()
def write(
    source: Annotated[str, typer.Argument(help="The data set's folder; for --format table, the table itself.")],
    out: Annotated[str, typer.Option(help="Folder or s3:// prefix for the shards.")],
    format: Annotated[
        Format,
        typer.Option(
            metavar="KIND",
            help="medvqa: prompt-gt.csv. roco: ID,Caption. table: file names. parquet: images within rows. "
            "datasets: what Hugging Face's save_to_disk wrote.",
        ),
    ] = Format.TABLE,
    name: Annotated[str | None, typer.Option(help="Name of the set. Default: the source's.")] = None,
    images: Annotated[str | None, typer.Option(help="Folder of the images. Default: beside the table.")] = None,
    image_column: Annotated[str, typer.Option(help="Column of file names, or of images within rows.")] = "image",
    caption_column: Annotated[str, typer.Option(help="Column of captions.")] = "caption",
    id_column: Annotated[
        str | None, typer.Option(help="parquet, datasets: column that names an image. Default: each row is one.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column of patients or videos, which never cross splits.")
    ] = None,
    licence_column: Annotated[str | None, typer.Option(help="Column of licences.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Column of splits, if they are given.")] = None,
    split_by_file: Annotated[
        bool,
        typer.Option(
            "--split-by-file", help="parquet, datasets: file names, such as train-00000.parquet, say the split."
        ),
    ] = False,
    split: Annotated[list[str] | None, typer.Option(help="A split's share, NAME=SHARE; may be repeated.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    resize: Annotated[int | None, typer.Option(min=8, help="Reduce larger images to this shorter side.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the order.")] = 0,
    max_quarantined: Annotated[float, typer.Option(min=0, max=1, help="Give up above this share of bad inputs.")] = 1.0,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads; with RAY_ADDRESS set, the cluster's CPUs.")] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards of other input.")] = False,
) -> None:
    """Turn images and captions into WebDataset shards with a manifest.

    medsynth shards write my-data/captions.csv --images my-data/images --group-column patient --out shards
    """
    ask(source, out)
    from data_shards.sources import Columns, embedded_records, medvqa_records, roco_records, table_records

    if (id_column or split_by_file) and format not in (Format.PARQUET, Format.DATASETS):
        option = "--id-column" if id_column else "--split-by-file"
        raise UserError(f"{option} is for images within rows: it goes with --format parquet or datasets")
    splits = _splits(split or (() if split_column or split_by_file else DEFAULT_SPLITS))
    columns = Columns(image_column, caption_column, group_column, licence_column, split_column, id_column)
    with ExitStack() as unpacked, progress_lines(console) as on_progress:
        records: Iterator[Record]
        if format is Format.MEDVQA:
            records = medvqa_records(source)
        elif format is Format.ROCO:
            records = roco_records(source)
        elif format is Format.TABLE:
            records = table_records(source, images or source.rpartition("/")[0] or ".", columns)
        else:
            rows = embedded_records(source, out, columns, images=images, split_by_file=split_by_file)
            records = unpacked.enter_context(rows)
        # It takes a second or two to import, and a table that cannot be read should not have to wait for it.
        from data_shards.writer import DUPLICATES, QUARANTINE, Settings, write_shards

        manifest = write_shards(
            records,
            out,
            Settings(
                name=name or PurePosixPath(storage.absolute(source)).stem,
                splits=splits,
                samples_per_shard=samples_per_shard,
                seed=seed,
                resize=resize,
                max_quarantined=max_quarantined,
            ),
            source={"format": format.value, "uri": source},
            overwrite=overwrite,
            num_workers=num_workers,
            on_progress=on_progress,
        )
    total = sum(shard.num_samples for shard in manifest.shards)
    console.print(
        f"{total} samples in {len(manifest.shards)} shards at {plain(out)}, digest {manifest.digest[:12]}",
        soft_wrap=True,
    )
    from data_shards import overview
    from data_shards.decode import STRETCHED

    if stretched := sum(manifest.conversions.get(kind, 0) for kind in STRETCHED):
        console.print(f"{stretched} images of more than 8 bits were stretched to their range")
    if cut := overview.say_cut(overview.look_into(out, manifest, split) for split in manifest.splits):
        console.print(cut, soft_wrap=True)
    if manifest.quarantined:
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.quarantined.items())
        console.print(
            f"Left out: {sum(manifest.quarantined.values())} inputs ({plain(reasons)}); each is named in "
            f"{plain(storage.join(out, QUARANTINE))}",
            soft_wrap=True,
        )
    if manifest.near_duplicates:
        pairs = ", ".join(f"{pair} {count}" for pair, count in manifest.near_duplicates.items())
        console.print(
            f"Near-duplicates across splits: {plain(pairs)}. So many samples of the first look the same as one of the "
            f"second, as {plain(storage.join(out, DUPLICATES))} names them: a model would be judged on what it was "
            "trained on. Give --group-column a column that joins them, or leave them out.",
            soft_wrap=True,
        )


@app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the shards.")],
    contact_sheet: Annotated[
        Path | None, typer.Option(help="Also draw some samples of each split with their captions, as this PNG file.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Also say how this recipe's text encoder and resolution read them.")
    ] = None,
) -> None:
    """Show what is in a set of shards.

    medsynth shards inspect demo/shards --contact-sheet samples.png
    """
    from data_shards.manifest import Manifest

    ask(shards)
    manifest = Manifest.load(shards)
    if contact_sheet and manifest.precomputed:
        raise UserError(f"{shards} is a precomputed set, with nothing to draw: inspect the shards it was made of")
    from data_shards import overview  # and all that decodes pictures: to see that no shards are there, it is not needed

    if recipe:
        ask(recipe)
    reader = _reader(recipe) if recipe else None
    table = Table(title=f"{plain(manifest.name)}, digest {manifest.digest[:12]}", title_justify="left")
    table.add_column("split", no_wrap=True)
    for column in ("samples", "shards", "MB", "groups", "captions an image"):
        table.add_column(column, justify="right")
    looks = {split: overview.look_into(shards, manifest, split, reader) for split in manifest.splits}
    for split in manifest.splits:
        entries = manifest.split(split)
        samples = sum(shard.num_samples for shard in entries)
        table.add_row(
            plain(split),
            str(samples),
            str(len(entries)),
            f"{sum(shard.num_bytes for shard in entries) / 1e6:.1f}",
            str(manifest.groups.get(split, "not stated")),
            f"{manifest.captions.get(split, 0) / samples:.1f}",
        )
    console.print(table)
    words = [f"{split} {overview.spread(look.words)}" for split, look in looks.items()]
    console.print(f"Words a caption: {plain('; '.join(words))}", soft_wrap=True)
    if reader:
        console.print(plain(overview.say_tokens(looks, reader)), soft_wrap=True)
    if not manifest.precomputed:
        sizes = {split: [f"{width} x {height}" for width, height in look.sizes] for split, look in looks.items()}
        pixels = "; ".join(f"{split} {overview.spread(found)}" for split, found in sizes.items())
        console.print(f"Pixels: {plain(pixels)}", soft_wrap=True)
        if cut := overview.say_cut(looks.values()):
            console.print(cut, soft_wrap=True)
    for title, counts in (
        ("Licences", manifest.licences),
        ("Left out", manifest.quarantined),
        ("Converted", manifest.conversions),
        ("Near-duplicates across splits", manifest.near_duplicates),
    ):
        if counts:
            console.print(
                f"{title}: " + ", ".join(f"{plain(what)} ({count})" for what, count in counts.items()), soft_wrap=True
            )
    total = sum(shard.num_samples for shard in manifest.shards)
    seen = sum(look.num_samples for look in looks.values())
    console.print(f"Split {plain(manifest.split_rule)}. Looked into {seen} of {total} samples.", soft_wrap=True)
    if contact_sheet:
        overview.contact_sheet(shards, manifest, contact_sheet, reader.resolution if reader else None)
        console.print(f"Samples drawn: {plain(contact_sheet)}", soft_wrap=True)


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the shards.")],
    sample: Annotated[int | None, typer.Option(min=1, help="Check so many shards, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw: another one draws others.")] = 0,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads; with RAY_ADDRESS set, the cluster's CPUs.")] = 4,
) -> None:
    """Compare shards' size and SHA-256 with the manifest; exit with 1 if one differs.

    medsynth shards verify s3://bucket/shards --sample 100
    """
    from data_shards.manifest import Manifest
    from data_shards.parallel import mapping
    from data_shards.sample import derive_seed
    from data_shards.verification import Claim, find_fault

    ask(shards)
    manifest = Manifest.load(shards)
    drawn = list(manifest.shards)
    if sample is not None and sample < len(drawn):
        drawn = Random(derive_seed("verify", seed)).sample(drawn, sample)
    claims = [Claim(storage.absolute(shards), shard) for shard in drawn]
    faults: list[str] = []
    with progress_lines(console) as on_progress, mapping(num_workers) as apply:
        for done, fault in enumerate(apply(find_fault, claims), start=1):
            on_progress("verifying", done, len(claims))
            faults += [fault] if fault else []
    for line in faults:
        console.print(f"[red]✗[/] {plain(line)}", soft_wrap=True)
    num_bytes, all_bytes = (sum(s.num_bytes for s in some) for some in (drawn, manifest.shards))
    which = f"All {len(drawn)} shards"
    if len(drawn) < len(manifest.shards):
        which = f"{len(drawn)} of {len(manifest.shards)} shards, with {num_bytes / all_bytes:.1%} of the bytes,"
    if faults:
        console.print(f"{len(faults)} of {len(drawn)} checked shards differ from the manifest")
        raise typer.Exit(1)
    console.print(f"{which} are those of the manifest, digest {manifest.digest[:12]}")


def _reader(recipe: str) -> "Reader":
    if reader_of_recipe is None:
        raise UserError("--recipe: recipes are read by the command medsynth alone")
    return reader_of_recipe(recipe)


def _splits(options: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for option in options:
        written, _, share = option.partition("=")
        name = split_name(written)
        if name in shares:
            raise UserError(f"--split {option}: split '{name}' has a share already")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UserError(f"--split {option}: write it as NAME=SHARE, for example train=0.8") from None
        if not 0 < shares[name] < float("inf"):
            raise UserError(f"--split {option}: a share above 0 is needed, for example train=0.8")
    return shares
