"""The commands `medsynth shards write|inspect|verify`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from enum import StrEnum
from pathlib import PurePosixPath
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster import storage
from cluster.errors import UserError
from cluster.progress import progress_lines
from data_shards.manifest import Manifest, ShardEntry
from data_shards.sample import Record
from data_shards.sources import Columns, embedded_records, medvqa_records, roco_records, table_records
from data_shards.stream import read_samples
from data_shards.writer import DUPLICATES, QUARANTINE, Settings, digest_of, write_shards

app = typer.Typer(no_args_is_help=True)
console = Console(highlight=False)

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
            help="medvqa: prompt-gt.csv. roco: ID,Caption. table: file names. parquet: images within rows. "
            "datasets: what Hugging Face's save_to_disk wrote."
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
        bool, typer.Option(help="parquet, datasets: file names, such as train-00000.parquet, say the split.")
    ] = False,
    split: Annotated[list[str] | None, typer.Option(help="A split's share, NAME=SHARE; may be repeated.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    resize: Annotated[int | None, typer.Option(min=8, help="Reduce larger images to this shorter side.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split and of the order.")] = 0,
    max_quarantined: Annotated[float, typer.Option(min=0, max=1, help="Give up above this share of bad inputs.")] = 1.0,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads; with RAY_ADDRESS set, the cluster's CPUs.")] = 4,
    overwrite: Annotated[bool, typer.Option(help="Replace shards of other input.")] = False,
) -> None:
    """Turn images and captions into WebDataset shards with a manifest.

    medsynth shards write my-data/captions.csv --images my-data/images --group-column patient --out shards
    """
    splits = _splits(split or (() if split_column or split_by_file else DEFAULT_SPLITS))
    columns = Columns(image_column, caption_column, group_column, licence_column, split_column, id_column)
    settings = Settings(
        name=name or PurePosixPath(storage.absolute(source)).stem,
        splits=splits,
        samples_per_shard=samples_per_shard,
        seed=seed,
        resize=resize,
        max_quarantined=max_quarantined,
    )
    with ExitStack() as unpacked, progress_lines(console) as on_progress:
        records: Iterator[Record]
        if format is Format.MEDVQA:
            records = medvqa_records(source)
        elif format is Format.ROCO:
            records = roco_records(source)
        elif format is Format.TABLE:
            records = table_records(source, images or str(PurePosixPath(source).parent), columns)
        else:
            rows = embedded_records(source, out, columns, images=images, split_by_file=split_by_file)
            records = unpacked.enter_context(rows)
        manifest = write_shards(
            records,
            out,
            settings,
            source={"format": format.value, "uri": source},
            overwrite=overwrite,
            num_workers=num_workers,
            on_progress=on_progress,
        )
    total = sum(shard.num_samples for shard in manifest.shards)
    console.print(f"{total} samples in {len(manifest.shards)} shards at {out}, digest {manifest.digest[:12]}")
    if manifest.quarantined:
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest.quarantined.items())
        console.print(
            f"Left out: {sum(manifest.quarantined.values())} inputs ({reasons}); each is named in "
            f"{storage.join(out, QUARANTINE)}",
            soft_wrap=True,
        )
    if manifest.near_duplicates:
        pairs = ", ".join(f"{pair} {count}" for pair, count in manifest.near_duplicates.items())
        console.print(
            f"Near-duplicates across splits: {pairs}. So many samples of the first look the same as one of the second, "
            f"as {storage.join(out, DUPLICATES)} names them: a model would be judged on what it was trained on. Give "
            "--group-column a column that joins them, or leave them out.",
            soft_wrap=True,
        )


@app.command()
def inspect(shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the shards.")]) -> None:
    """Show what is in a set of shards.

    medsynth shards inspect demo/shards
    """
    manifest = Manifest.load(shards)
    table = Table(title=f"{manifest.name}, digest {manifest.digest[:12]}", title_justify="left")
    for column in ("split", "samples", "shards", "MB", "groups", "captions an image", "words a caption"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in manifest.splits:
        entries = manifest.split(split)
        samples = sum(shard.num_samples for shard in entries)
        words = [len(c.split()) for sample in read_samples(shards, entries[0]) for c in sample.captions]
        table.add_row(
            split,
            str(samples),
            str(len(entries)),
            f"{sum(shard.num_bytes for shard in entries) / 1e6:.1f}",
            str(manifest.groups[split]),
            f"{manifest.captions[split] / samples:.1f}",
            f"{min(words)} to {max(words)}, median {median(words):g}",
        )
    console.print(table)
    for title, counts in (
        ("Licences", manifest.licences),
        ("Left out", manifest.quarantined),
        ("Converted", manifest.conversions),
    ):
        if counts:
            console.print(f"{title}: " + ", ".join(f"{what} ({count})" for what, count in counts.items()))
    console.print(f"Split {manifest.split_rule}. Words are counted in the first shard of each split.")


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the shards.")],
    num_workers: Annotated[int, typer.Option(min=1, help="Threads.")] = 4,
) -> None:
    """Compare every shard's size and SHA-256 with the manifest; exit with 1 if one differs.

    medsynth shards verify s3://bucket/shards
    """
    manifest = Manifest.load(shards)

    def fault(shard: ShardEntry) -> str | None:
        uri = storage.join(shards, shard.name)
        try:
            found = digest_of(uri)
        except storage.NotFoundError:
            return f"{shard.name}: missing"
        return None if found == shard.sha256 else f"{shard.name}: SHA-256 {found}, the manifest says {shard.sha256}"

    faults: list[str] = []
    with progress_lines(console) as on_progress, ThreadPoolExecutor(num_workers) as pool:
        for done, found in enumerate(pool.map(fault, manifest.shards), start=1):
            on_progress("verifying", done, len(manifest.shards))
            faults += [found] if found else []
    for line in faults:
        console.print(f"[red]✗[/] {line}", soft_wrap=True)
    if faults:
        console.print(f"{len(faults)} of {len(manifest.shards)} shards differ from the manifest")
        raise typer.Exit(1)
    console.print(f"All {len(manifest.shards)} shards are those of the manifest, digest {manifest.digest[:12]}")


def _splits(options: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for option in options:
        name, _, share = option.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UserError(f"--split {option}: write it as NAME=SHARE, for example train=0.8") from None
        if not name.isidentifier() or not 0 < shares[name] < float("inf"):
            raise UserError(f"--split {option}: a name and a share above 0 are needed, for example train=0.8")
    return shares
