"""The recipe: one YAML file is one experiment, complete and readable alone.

Nothing is looked up anywhere else: a recipe together with the shards it names repeats a run. `family` says which
model is trained and so which keys there are; a recipe without it is MSDM's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster import storage
from cluster.documents import parse_yaml, read_yaml
from cluster.errors import UserError, did_you_mean, nearest
from trainers.recipe.blocks import EXTRACTOR, PLACE, WEIGHTS, Block, Cluster, Data, Fidelity, Tracking, Training
from trainers.recipe.flux import FlowNoise, FluxRecipe, FluxSampling, FluxTransformer, LoRA
from trainers.recipe.msdm import (
    DenoiserStage,
    MSDMRecipe,
    MSDMSampling,
    Noise,
    TextEncoder,
    UNetArchitecture,
    VAEArchitecture,
    VAEStage,
)

__all__ = [
    "Block",
    "Cluster",
    "Data",
    "DenoiserStage",
    "Fidelity",
    "FlowNoise",
    "FluxRecipe",
    "FluxSampling",
    "FluxTransformer",
    "LoRA",
    "MSDMRecipe",
    "MSDMSampling",
    "Noise",
    "Recipe",
    "TextEncoder",
    "Tracking",
    "Training",
    "UNetArchitecture",
    "VAEArchitecture",
    "VAEStage",
    "apply_override",
    "at_absolute_paths",
    "dump_recipe",
    "explain",
    "load_recipe",
    "parse_override",
    "read_document",
]

B = TypeVar("B", bound=Block)
Recipe = MSDMRecipe | FluxRecipe
SOURCE = Path(__file__).parents[2]
SHIPPED = ("recipes", "sweeps/specs")
"""Folders of the source code, which an installed package does not bring."""
FAMILIES: dict[str, type[MSDMRecipe] | type[FluxRecipe]] = {"msdm": MSDMRecipe, "flux": FluxRecipe}


def load_recipe(uri: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file or s3:// URI and apply `a.b=value` overrides, values being YAML.

    Raises UserError that names the key at fault, what is allowed, and the nearest key.
    """
    document = read_document(uri, "recipe", "'name' and 'data'")
    for override in overrides:
        apply_override(document, override)
    family = document.get("family", "msdm")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"{uri}: family: '{family}' is unknown, there are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].model_validate(document)
    except ValidationError as error:
        raise UserError(f"{uri}: " + "; ".join(explain(error, FAMILIES[family]))) from None


def read_document(uri: str, kind: str, such_as: str) -> dict[str, Any]:
    """The YAML mapping in a file or s3:// URI. Raises UserError if there is none, which calls it a `kind`."""
    try:
        document = read_yaml(uri)
    except storage.NotFoundError as error:
        raise storage.NotFoundError(f"{error}{_where_it_may_be(uri)}") from None
    if not isinstance(document, dict):
        raise UserError(f"{uri} holds no {kind}: expected keys such as {such_as} at its top level")
    return document


def _where_it_may_be(uri: str) -> str:
    """What to add where no file is at `uri`: the shipped file of that name, or of the nearest name."""
    if storage.is_remote(uri):
        return ""
    shipped = {path.stem: path for folder in SHIPPED for path in sorted((SOURCE / folder).glob("*.yaml"))}
    if not shipped:
        return f"; {' and '.join(SHIPPED)} are folders of the source code: name a file in your clone of it by its path"
    name = Path(uri).stem
    if guess := name if name in shipped else nearest(name, shipped):
        return f"; did you mean {shipped[guess]}?"
    return f"; those that are shipped lie in {' and '.join(str(SOURCE / folder) for folder in SHIPPED)}"


def at_absolute_paths(block: B) -> B:
    """The block with every local path in it made absolute: workers have working folders of their own."""
    changed: dict[str, Any] = {}
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(value, Block):
            changed[name] = at_absolute_paths(value)
        elif value is None:
            continue
        elif PLACE in field.metadata or (WEIGHTS in field.metadata and Path(value).is_dir()):
            changed[name] = storage.absolute(value)
        elif EXTRACTOR in field.metadata:
            kind, colon, weights = value.partition(":")
            changed[name] = f"{kind}{colon}{storage.absolute_if_there(weights)}"
    return block.model_copy(update=changed)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def apply_override(document: dict[str, Any], override: str) -> None:
    """Change a key of a document of nested blocks as `a.b=value` says. Raises UserError if that cannot be read."""
    path, value = parse_override(override)
    *parents, last = path.split(".")
    block = document
    for parent in parents:
        block = block.setdefault(parent, {})
        if not isinstance(block, dict):
            raise UserError(f"--set {override}: '{parent}' is a value, not a block of keys")
    block[last] = value


def parse_override(override: str) -> tuple[str, Any]:
    """Dotted key and value of `a.b=value`, the value being YAML. Raises UserError if that cannot be read."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: write it as key=value, for example data.resolution=64")
    return path, parse_yaml(text, f"--set {override}: the value")


def explain(error: ValidationError, document: type[BaseModel]) -> Iterator[str]:
    """One sentence for each problem, with the dotted key first."""
    for problem in error.errors():
        *parents, last = [str(part) for part in problem["loc"]] or [""]
        key = ".".join([*parents, last])
        if problem["type"] == "extra_forbidden":
            allowed = _keys_at(parents, document)
            hint = did_you_mean(last, allowed)
            yield f"unknown key '{key}': {hint}allowed here: {', '.join(allowed)}"
        elif problem["type"] == "missing":
            yield f"missing key '{key}'"
        elif problem["type"] == "union_tag_not_found":
            yield f"missing key '{key}.{problem['ctx']['discriminator'].strip(chr(39))}'"
        elif problem["type"] == "value_error":
            yield (f"{key}: " if key else "") + str(problem["ctx"]["error"])
        else:
            yield f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _keys_at(path: Sequence[str], block: type[BaseModel]) -> list[str]:
    """The keys allowed in the block at `path` below `block`."""
    for name, following in zip(path, [*path[1:], ""], strict=False):
        if name not in block.model_fields:  # a key of a mapping of blocks, or the kind of one
            continue
        blocks = list(_blocks_in(block.model_fields[name].annotation))
        of_kind = (b for b in blocks if "kind" in b.model_fields and b.model_fields["kind"].default == following)
        block = next(of_kind, blocks[0])
    return list(block.model_fields)


def _blocks_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _blocks_in(inner)
