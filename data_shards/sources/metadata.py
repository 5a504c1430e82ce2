"""Groups and licences from tables beside a data set, by the names of its images."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from cluster import storage
from cluster.errors import UserError
from data_shards.names import normal, without_ending
from data_shards.sample import Record
from data_shards.sources.table import check_columns, read_rows
from data_shards.sources.values import BadValueError, label, text

T = TypeVar("T")
NAME = "Filename"
GROUP = "group"
LICENCES = ("license", "licence")


def with_metadata(records: Iterator[Record], folder: str) -> Iterator[Record]:
    """Records with the `group` and `license` that FOLDER/metadata.csv gives for their file names, if it is there.

    Raises UserError if it cannot be read, names no files, or says two things of one.
    """
    uri = storage.join(folder, "metadata.csv")
    if not storage.exists(uri):
        yield from records
        return
    table = read_rows(uri)
    licence = next((name for name in LICENCES if name in table.columns), None)
    if GROUP not in table.columns and licence is None:
        yield from records
        return
    group = GROUP if GROUP in table.columns else None
    check_columns(tuple(filter(None, (NAME, group, licence))), table.columns, uri)
    known: dict[str, tuple[str, str]] = {}
    for row in table:
        try:
            if row.fault:
                raise BadValueError(row.fault)
            name = normal(text(row[NAME]), folder)
            said = label(row.get(GROUP)), text(row.get(licence or ""))
        except BadValueError as problem:
            raise UserError(f"{uri}, line {row.place}: {problem}") from None
        if name and known.setdefault(name, said) != said:
            raise UserError(f"{uri}, line {row.place}: it says another group or licence of '{name}' than a line before")
    found = list(records)
    stated = matched([record.source_id for record in found], known)
    for record in found:
        its_group, its_licence = stated.get(record.source_id, ("", ""))
        yield replace(record, group=its_group or record.group, licence=its_licence or record.licence)


def matched(names: Iterable[str], known: Mapping[str, T]) -> dict[str, T]:
    """What is known of each of `names`: by its path, else by its path without ending, else by the last part of it.

    The shorter ones are used only where they are those of one name, and of one that is known.
    """
    distinct = set(names)
    found = {name: known[name] for name in distinct if name in known}
    for shorter in (without_ending, _last_part):
        others: dict[str, list[str]] = {}
        for other in known:
            others.setdefault(shorter(other), []).append(other)
        shared = Counter(map(shorter, distinct))
        for name in distinct - found.keys():
            one, *more = others.get(shorter(name)) or ("", "")
            if not more and shared[shorter(name)] == 1 and _is_within(name, one):
                found[name] = known[one]
    return found


def _last_part(name: str) -> str:
    return without_ending(name).rpartition("/")[2]


def _is_within(name: str, other: str) -> bool:
    """Whether one is the other with folders before it."""
    short, long = sorted((without_ending(name), without_ending(other)), key=len)
    return f"/{long}".endswith(f"/{short}")
