"""Names that people choose, checked before any work: of what becomes a folder, and of what MLflow keeps."""

from cluster.errors import UserError

MAX_BYTES = 200  # of the 255 that file systems take: sweeps append numbers, and temporary files their own
REGISTERED_LENGTH, EXPERIMENT_LENGTH = 250, 500  # in MLflow's database
NOT_IN_PATHS = "/\\"
NOT_REGISTERED = "/:\\'\"`@%?#"
"""MLflow refuses the first two; in models:/NAME@ALIAS, or in a search for the name, the others mean something else."""


def check_path_part(name: str, what: str) -> str:
    """The name itself. Raises UserError, which calls it `what`, unless it may name one folder below another."""
    if fault := _fault(name, NOT_IN_PATHS, MAX_BYTES):
        raise UserError(f"{what} {_shown(name)} cannot be the name of a folder: {fault}")
    return name


def registered_name_fault(name: str) -> str | None:
    """Why this cannot be the name of a registered model; None if it can."""
    return _fault(name, NOT_REGISTERED, REGISTERED_LENGTH)


def experiment_name_fault(name: str) -> str | None:
    """Why this cannot be the name of an MLflow experiment; None if it can."""
    return _fault(name, "", EXPERIMENT_LENGTH)


def _fault(name: str, excluded: str, max_bytes: int) -> str | None:
    if not name.strip():
        return "it is empty"
    if name != name.strip():
        return "it begins or ends with a blank"
    if name in (".", ".."):
        return "it stands for a folder that is there"
    if odd := [character for character in name if not character.isprintable()]:
        return f"it has the character {odd[0]!r}, which cannot be seen"
    if bad := [character for character in name if character in excluded]:
        return f"it has the character {bad[0]}; leave out each of {' '.join(excluded)}"
    if (length := len(name.encode())) > max_bytes:
        return f"it has {length} bytes, and may have {max_bytes}"
    return None


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}…"
