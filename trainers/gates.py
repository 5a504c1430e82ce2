"""The gates of a promotion, from a file."""

from pydantic import ValidationError

from cluster.documents import read_yaml
from cluster.errors import UserError
from cluster.promotion import Gates


def load_gates(uri: str | None) -> Gates:
    """Gates from a YAML file or s3:// URI; the defaults, if None. Raises UserError that names the key at fault."""
    if uri is None:
        return Gates()
    document = read_yaml(uri)
    try:
        return Gates.model_validate({} if document is None else document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"{uri}: {key}: {problem['msg']}; recipes/gates/default.yaml has every key") from None
