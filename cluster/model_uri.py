"""How a registered model's version is named: models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS."""

import re
from typing import NamedTuple

from cluster.errors import UserError


class VersionName(NamedTuple):
    """A version by its number or `latest`, or else by an alias; the other one is empty."""

    model: str
    version: str
    alias: str


def parse_model_uri(uri: str) -> VersionName:
    """Raises UserError if `uri` is written in no such way."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+|latest)|@([\w.-]+))", uri)
    if match is None:
        raise UserError(f"{uri}: write models:/NAME/VERSION, models:/NAME/latest or models:/NAME@ALIAS")
    return VersionName(*match.groups(""))
