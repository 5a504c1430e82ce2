"""ROCOv2: captions with `ID,Caption` and folders of images named ID.jpg, as published or gathered by hand.

As published there are train_captions.csv, valid_captions.csv and test_captions.csv, and the images lie where their
archives unpack to: train/, train_images/ or train_images/train/. Then the splits are those of the data set. Else one
*captions.csv, with images in images/ or beside it.

If there is a metadata.csv with a `group` or `license` column for each `Filename`, or the license_information.csv of
the publication, it is used.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster import storage
from cluster.errors import UserError
from data_shards.sample import Record
from data_shards.sources.metadata import matched, with_metadata
from data_shards.sources.table import Columns, Table, read_rows, table_records

COLUMNS = Columns(image="ID", caption="Caption")
SPLITS = {"train": "train", "valid": "validation", "test": "test"}
IMAGE_FOLDERS = ("{0}_images/{0}", "{0}_images", "{0}", "images")
LICENCES = "license_information.csv"
LICENCE = re.compile(r"CC0|CC[ -]BY(?:-NC)?(?:-SA|-ND)?(?:[ -]\d\.\d)?", re.IGNORECASE)


def roco_records(folder: str) -> Iterator[Record]:
    """Records of a ROCOv2 folder. Raises UserError if its captions or the images of a split are not there."""
    names = storage.list_files(folder)
    tables = [name for name in names if "/" not in name and name.lower().endswith("captions.csv")]
    parts = [part for part in SPLITS if f"{part}_captions.csv" in tables]
    if len(tables) == 1:
        images = _images(names, *parts) or ""
        records = table_records(storage.join(folder, tables[0]), storage.join(folder, images), COLUMNS)
    elif tables and len(tables) == len(parts):
        records = _published(folder, names, parts)
    else:
        found = ", ".join(tables) or "none"
        raise UserError(
            f"{folder} is not in the ROCOv2 format: expected train_captions.csv, valid_captions.csv and "
            f"test_captions.csv, or one *captions.csv, found {found}"
        )
    return with_metadata(_with_licences(records, folder, names), folder)


def _published(folder: str, names: Sequence[str], parts: Sequence[str]) -> Iterator[Record]:
    for part in parts:
        images = _images(names, part)
        if images is None:
            raise UserError(
                f"{folder} has {part}_captions.csv but none of its images: unpack {part}_images.zip to {part}_images/"
            )
        for record in table_records(
            storage.join(folder, f"{part}_captions.csv"), storage.join(folder, images), COLUMNS
        ):
            yield replace(record, split=SPLITS[part])


def _images(names: Sequence[str], part: str = "") -> str | None:
    """The innermost folder of images; None if there is none."""
    candidates = [pattern.format(part) for pattern in IMAGE_FOLDERS]
    return next((c for c in candidates if any(name.startswith(f"{c}/") for name in names)), None)


def _with_licences(records: Iterator[Record], folder: str, names: Sequence[str]) -> Iterator[Record]:
    """Records with the licence that LICENCES states for their ID, in a column of that name or among attributions.

    A row that cannot be read, or that contradicts another one, states none.
    """
    rows = read_rows(storage.join(folder, LICENCES)) if LICENCES in names else Table()
    columns = {name.strip().lower(): name for name in rows.columns}
    stated = next((name for word in ("licen", "attribution") for name in columns if word in name), None)
    known: dict[str, str | None] = {}
    if stated and "id" in columns:
        for row in rows:
            if not row.fault and (found := LICENCE.search(str(row[columns[stated]]))):
                name, licence = str(row[columns["id"]]).strip(), found[0].upper().replace("CC-BY", "CC BY")
                known[name] = licence if known.get(name, licence) == licence else None
    found_records = list(records)
    licences = matched([record.source_id for record in found_records], known)
    for record in found_records:
        yield replace(record, licence=licences.get(record.source_id) or record.licence)
