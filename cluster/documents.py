"""YAML and JSON from outside: what it holds, or one clear error, whatever its bytes are.

Limits are far above what any document here needs, and far below what a machine cannot take.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from cluster import storage
from cluster.errors import UserError

T = TypeVar("T")
MAX_YAML_BYTES = 2**18  # a recipe has 4 KiB; PyYAML reads some 100 KiB a second
MAX_YAML_VALUES = 20_000  # with each alias counted as often as it is used: a few lines of them can mean billions
MAX_YAML_DEPTH = 32  # blocks within blocks; a recipe has four
MAX_JSON_BYTES = 2**26  # reports that wait for MLflow during a long outage take a few MiB


@contextmanager
def parsing(what: str) -> Iterator[None]:
    """Raises UserError, which names `what`, for whatever a parser of bytes from outside trips over.

    Parsers promise no more than that they fail: PyYAML, Pillow and tarfile raise IndexError, struct.error and others.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        reason = f"it lacks {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"{what} is damaged, or of another kind: {reason}") from None


def read_yaml(uri: str) -> Any:
    """Raises UserError if nothing is there, or what parse_yaml raises."""
    return parse_yaml(read_small(uri, MAX_YAML_BYTES), uri)


def parse_yaml(text: str | bytes, name: str) -> Any:
    """Raises UserError, which names `name`, if this is not YAML or more of it than MAX_YAML_… allow."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            _extent(root, {})
            return None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except RecursionError:
        reason = "its blocks are too deep to be read"
    except Exception as error:  # PyYAML's own for values such as `!!int x` or 2024-13-45
        reason = f"a value in it cannot be read ({repr(error)[:200]})"
    raise UserError(f"{name} is not YAML: {reason}")


def read_json(uri: str) -> Any:
    """Raises UserError if nothing is there, if it is not JSON, or if it has more than MAX_JSON_BYTES."""
    data = read_small(uri, MAX_JSON_BYTES)
    with parsing(uri):
        return json.loads(data)


def read_json_as(kind: type[T], uri: str, remedy: str) -> T:
    """The JSON at `uri` as a `kind`: a dataclass, or lists and mappings of such.

    Raises NotFoundError if nothing is there; UserError, which ends in the remedy, if it is anything else.
    """
    try:
        document = read_json(uri)
        with parsing(uri):
            return TypeAdapter(kind).validate_python(document)
    except storage.StorageError:
        raise
    except UserError as error:
        reason = str(error)
        if isinstance(error.__context__, ValidationError):
            problem = error.__context__.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            reason = f"{uri} is damaged, or of another kind: {where + ': ' if where else ''}{problem['msg']}"
        raise UserError(f"{reason}; {remedy}") from None


def read_text(uri: str, remedy: str) -> str:
    """The text at `uri`, of one line. Raises UserError, which ends in the remedy, if it is anything else."""
    data = storage.read_bytes(uri)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text:
        raise UserError(f"{uri} is damaged, or of another kind: it is not a line of text; {remedy}")
    return text


def read_small(uri: str, max_bytes: int) -> bytes:
    """All that is at `uri`. Raises UserError if that is more than `max_bytes`, of which none is read then."""
    found = storage.size(uri)
    if found > max_bytes:
        raise UserError(f"{uri} has {found} bytes; of such a file no more than {max_bytes} are read: is it another?")
    return storage.read_bytes(uri)


def _extent(node: yaml.Node | None, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """(values, depth) of what `node` stands for, each alias in it written out. Raises YAMLError if that is too much."""
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    values, depth = 1, 0
    for child in children:
        if child not in known:
            known[child] = (MAX_YAML_VALUES, 0)  # until it is known: too much, if it is within itself
            known[child] = _extent(child, known)
        values, depth = values + known[child][0], max(depth, known[child][1])
        if values > MAX_YAML_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_YAML_VALUES} values, each alias written out")
    if depth == MAX_YAML_DEPTH:
        raise yaml.YAMLError(f"its blocks are more than {MAX_YAML_DEPTH} deep")
    return values, depth + 1
