"""Pretrained weights by name: a hub id, a folder, an s3:// prefix, or package://NAME/FOLDER of an installed package.

A model in the diffusers layout is a folder of components (`vae`, `transformer`, ...), each a folder again.
"""

import hashlib
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from cluster import storage
from cluster.digests import file_digest
from cluster.documents import parsing, read_json
from cluster.errors import UserError

PACKAGE_SCHEME = "package://"
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")  # as diffusers and as transformers name a component's weights
PICKLED = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
OTHER_FRAMEWORKS = ("*.h5", "*.msgpack", "*.onnx")
DIGESTED = ("*.json", "*.safetensors", "*.txt", "*.model")  # configuration, weights and vocabularies
BLOCK_BYTES = 2**24


@contextmanager
def local_weights(pretrained: str, patterns: Sequence[str] | None = None) -> Iterator[Path]:
    """A local folder that holds those files of `pretrained` that match a pattern; `*` matches slashes too.

    Without patterns, all but pickled weights and those of other frameworks. A folder or package is taken as it is; a
    hub id is fetched into the hub's cache and kept (HF_HUB_OFFLINE, HF_TOKEN and HF_HOME say how); from s3:// it is
    a copy for as long as the block lasts. That a pattern matches nothing is no error. Raises UserError if there is no
    such model.
    """
    if pretrained.startswith(PACKAGE_SCHEME):
        yield _package_folder(pretrained)
    elif storage.is_remote(pretrained):
        with tempfile.TemporaryDirectory() as temporary:
            storage.download_folder(pretrained, Path(temporary), patterns or ("*",))
            yield Path(temporary)
    elif (folder := storage.local_path(pretrained)).is_dir():
        yield folder
    else:
        yield _from_hub(pretrained, patterns)


def file_names(pretrained: str, patterns: Sequence[str]) -> list[str]:
    """Files of `pretrained` that match a pattern; those of a hub id are fetched, those below s3:// are not."""
    names = _listed(pretrained, patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def component_config(pretrained: str, component: str) -> dict[str, Any]:
    """A component's config.json. Raises UserError if it has none."""
    with local_weights(pretrained, [f"{component}/config.json"]) as folder:
        uri = str(folder / component / "config.json")
        try:
            config = read_json(uri)
        except storage.StorageError:
            raise UserError(
                f"'{pretrained}' has no {component}/config.json: is it a model in the diffusers layout?"
            ) from None
    if not isinstance(config, dict):
        raise UserError(f"{component}/config.json of '{pretrained}' holds no settings: fetch it again")
    return config


def weight_files(pretrained: str, component: str) -> Iterator[Path]:
    """A component's safetensors files in the order of their index, each local until the next is asked for.

    From s3:// one is on disk at a time, so a model may be larger than the disk. Raises UserError if there are none;
    pickled weights are not read, for reading a pickle runs what is in it.
    """
    for name in _weight_names(pretrained, component):
        with local_weights(pretrained, [f"{component}/{name}"]) as folder:
            path = folder / component / name
            if not path.is_file():
                raise UserError(f"'{pretrained}' lacks {component}/{name}, which its index names: fetch it again")
            yield path


def component_digest(pretrained: str, component: str = "", patterns: Sequence[str] = DIGESTED) -> str:
    """SHA-256 over the names and contents of a component's configuration, vocabulary and weights.

    Without a component, of those of a model that has none and lies in its folder itself. Read in blocks, from where
    they are: neither memory nor disk ever holds a whole file. Large local files that stay as they are, are read once
    (cluster/digests.py); what is remote, each time.
    """
    if storage.is_remote(pretrained):
        return _digest_below(storage.join(pretrained, component) if component else pretrained, pretrained, patterns)
    prefix = f"{component}/" if component else ""
    with local_weights(pretrained, [f"{prefix}{pattern}" for pattern in patterns]) as folder:
        return _digest_below(str(folder / component), pretrained, patterns)


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all configuration, vocabulary and weights of a model's folder."""
    return _digest_below(str(folder), str(folder), DIGESTED)


def num_parameters(folder: Path) -> int:
    """Numbers in all safetensors files below a model's folder, counted from their headers."""
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _weight_names(pretrained: str, component: str) -> list[str]:
    with local_weights(pretrained, [f"{component}/*.index.json"]) as folder:
        for stem in WEIGHT_STEMS:
            index = folder / component / f"{stem}.safetensors.index.json"
            if index.is_file():
                document = read_json(str(index))
                with parsing(f"{index.name} of '{pretrained}'"):
                    names = list(dict.fromkeys(map(str, document["weight_map"].values())))
                for name in names:
                    if PurePosixPath(name).name != name:
                        raise UserError(f"{index.name} of '{pretrained}' names '{name}', which is outside its folder")
                return names
    names = [name for name in _names(pretrained, component) if name.endswith(".safetensors")]
    for stem in WEIGHT_STEMS:
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
    pickled = [n for n in _names(pretrained, component) if any(fnmatchcase(n, pattern) for pattern in PICKLED)]
    remedy = (
        f"only pickled ones ({pickled[0]}), which are never read: convert them to safetensors"
        if pickled
        else "is it a model in the diffusers layout?"
    )
    raise UserError(f"'{pretrained}' has no weights for its {component}: {remedy}")


def _names(pretrained: str, component: str) -> list[str]:
    """Files of a component; of one on the hub, only its safetensors."""
    return _listed(pretrained, [f"{component}/*.safetensors"], component)


def _listed(pretrained: str, fetched: Sequence[str], component: str = "") -> list[str]:
    """All files of a model or of its component; of one on the hub, those that match a pattern are fetched first."""
    if storage.is_remote(pretrained):
        return storage.list_files(storage.join(pretrained, component))
    with local_weights(pretrained, fetched) as folder:
        return storage.list_files(str(folder / component))


def _digest_below(uri: str, pretrained: str, patterns: Sequence[str]) -> str:
    names = [name for name in storage.list_files(uri) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        component = PurePosixPath(uri).name
        raise UserError(f"'{pretrained}' has no {component}: is it a model in the diffusers layout?")
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _file_digest(storage.join(uri, name)), names))
    return hashlib.sha256(json.dumps([names, digests]).encode()).hexdigest()


def _file_digest(uri: str) -> str:
    if not storage.is_remote(uri):
        try:
            return file_digest(storage.local_path(uri))
        except OSError as error:
            raise UserError(f"cannot read {uri}: {error.strerror}") from None
    digest = hashlib.sha256()
    total = storage.size(uri)
    for start in range(0, total, BLOCK_BYTES):
        digest.update(storage.read_bytes(uri, start, min(BLOCK_BYTES, total - start)))
    return digest.hexdigest()


def _package_folder(pretrained: str) -> Path:
    package, _, folder = pretrained.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package '{package}' is not installed; try pip install {package}")
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise UserError(f"the package '{package}' has no folder '{folder}'")
    return path


def _from_hub(pretrained: str, patterns: Sequence[str] | None) -> Path:
    try:
        return Path(
            snapshot_download(
                pretrained,
                allow_patterns=None if patterns is None else list(patterns),
                ignore_patterns=[*PICKLED, *OTHER_FRAMEWORKS] if patterns is None else None,
            )
        )
    except HFValidationError:
        reason = "there is no such folder"
    except GatedRepoError:
        reason = "the hub gives it to those who accepted its terms: accept them there, and set HF_TOKEN"
    except LocalEntryNotFoundError:
        reason = "there is no such folder, and the hub cannot be reached (HF_HUB_OFFLINE=1 forbids it)"
    except (HfHubHTTPError, OSError) as error:
        reason = f"there is no such folder, and the hub says: {_first_line(error)}"
    raise UserError(f"cannot load '{pretrained}': {reason}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
