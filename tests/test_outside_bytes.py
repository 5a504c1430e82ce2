"""Whatever bytes come from outside: a parser gives a result, or one error of ours that says so, and soon.

Each parser is given what it is made for, damaged anywhere and everywhere, and bytes that are nothing at all. What is
small on disk and vast in memory is built by hand below.
"""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from torch import nn

from cluster import storage
from cluster.documents import parse_yaml, read_json
from cluster.errors import UserError
from cluster.weights import component_config, weight_files
from data_shards import Manifest, PromptStore
from data_shards.decode import ImageError, decode
from data_shards.manifest import SampleEntry, ShardEntry, ShardIndex, read_index
from data_shards.prompts import write_prompts
from data_shards.reader import Encoded, ShardReader
from data_shards.sources.embedded import embedded_records, row_files
from data_shards.sources.table import Columns, read_rows, records_of
from data_shards.writer import write_tar
from sweeps.spec import load_spec
from trainers import checkpoint, sharded_checkpoint
from trainers.ema import EMA
from trainers.fidelity.state_dicts import read_file
from trainers.gates import load_gates
from trainers.generate import drawing_of
from trainers.recipe import load_recipe
from trainers.sharded_checkpoint import ShardedCheckpoint, State

ROOT = Path(__file__).parents[1]
EXAMPLES = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Parser:
    """What reads a file named `name`, of which `seeds` are good ones."""

    name: str
    seeds: Callable[[], list[bytes]]
    parse: Callable[[Path], Any]


def image(mode: str, kind: str, **settings: Any) -> bytes:
    data = io.BytesIO()
    Image.effect_noise((24, 16), 60).convert(mode).save(data, kind, **settings)
    return data.getvalue()


def images() -> list[bytes]:
    turned = Image.Exif()
    turned[0x0112] = 6
    return [
        image("RGB", "JPEG", exif=turned),
        image("CMYK", "JPEG"),
        image("RGBA", "PNG"),
        image("P", "PNG"),
        image("LAB", "TIFF"),
        image("F", "TIFF"),
        image("RGB", "TIFF", compression="tiff_lzw"),
        image("P", "GIF"),
        image("RGB", "WEBP"),
        image("RGB", "JPEG2000"),
        image("1", "PPM"),
        image("L", "BMP"),
    ]


def shard() -> bytes:
    about = json.dumps({"captions": ["a polyp"]}).encode()
    with TemporaryDirectory() as folder:
        samples: list[dict[str, str | bytes]] = [
            {"__key__": f"k{i}", "png": image("L", "PNG"), "json": about} for i in range(2)
        ]
        write_tar(samples, folder, name="s.tar", split="train", made_of="")
        return (Path(folder) / "s.tar").read_bytes()


def described(folder: Path, data: bytes, *keys: str) -> ShardEntry:
    """What index and manifest say of these bytes, if whoever wrote them wrote those too: one sample, or several."""
    ends = [len(data) * number // len(keys) for number in range(len(keys) + 1)]
    parts = zip(keys, ends, ends[1:], strict=False)
    samples = tuple(
        SampleEntry(key, start, stop - start, zlib.crc32(data[start:stop]))
        for key, start, stop in parts
        if stop > start
    )
    index = ShardIndex(made_of="", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=samples)
    return index.save(str(folder), name="s.tar", split="train")


def parse_shard(path: Path) -> Any:
    data = path.read_bytes()
    return ShardReader(str(path.parent)).read(described(path.parent, data, "k0", "k1")) if data else None


def shard_index() -> bytes:
    with TemporaryDirectory() as folder:
        described(Path(folder), shard(), "k0", "k1")
        return (Path(folder) / "s.tar.index.json").read_bytes()


def parse_shard_index(path: Path) -> Any:
    """As whoever wrote it described it in the manifest."""
    described_by = {"index_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": len(shard())}
    entry = ShardEntry(name="s.tar", split="train", num_samples=2, sha256="0" * 64, **described_by)  # type: ignore[arg-type]
    return read_index(str(path.parent), entry)


def manifest() -> bytes:
    with TemporaryDirectory() as folder:
        entry = described(Path(folder), shard(), "k")
    document = {
        **{"name": "s", "source": {}, "split_rule": "", "groups": {}, "captions": {}, "licences": {}},
        **{"quarantined": {}, "conversions": {}, "shards": [entry.model_dump()]},
    }
    return json.dumps(document).encode()


def prompts(folder: Path) -> None:
    file = write_prompts(
        str(folder), "prompts-000000.safetensors", ["a"], {"x": torch.ones(1, 2, 3), "y": torch.ones(1, 4)}
    )
    (folder / "prompts.json").write_text(json.dumps({"files": [json.loads(file.model_dump_json())]}))


def prompts_index() -> bytes:
    with TemporaryDirectory() as folder:
        prompts(Path(folder))
        return (Path(folder) / "prompts.json").read_bytes()


def parse_prompts_index(path: Path) -> Any:
    document = path.read_bytes()
    prompts(path.parent)
    path.write_bytes(document)
    return PromptStore(str(path.parent), 0).get(["a"])


def moments(data: bytes) -> Any:
    from data_shards.stream import _moments

    return _moments(Encoded(0, "k", {"moments.npy": data}, ["a"]), False)


def npy(*shape: int) -> bytes:
    data = io.BytesIO()
    np.save(data, np.ones(shape, np.float32))
    return data.getvalue()


def parquet() -> bytes:
    data = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a", "b"], "caption": ["x", None]}), data)
    return data.getvalue()


def dicoms() -> list[bytes]:
    """Grey and colours, plain and compressed: pydicom's own."""
    names = ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "SC_rgb_small_odd_jpeg.dcm")
    return [Path(str(get_testdata_file(name, download=False))).read_bytes() for name in names]


def rows_of_images() -> pyarrow.Table:
    rows = [{"image": {"bytes": image("L", "PNG"), "path": "a.png"}, "caption": caption} for caption in ("x", None)]
    return pyarrow.Table.from_pylist(rows)


def parquet_of_images() -> bytes:
    data = io.BytesIO()
    pyarrow.parquet.write_table(rows_of_images(), data)
    return data.getvalue()


def arrow_of_images() -> bytes:
    data = io.BytesIO()
    table = rows_of_images()
    with pyarrow.ipc.new_stream(data, table.schema) as stream:
        stream.write_table(table)
    return data.getvalue()


def parse_rows(source: Path) -> Any:
    with embedded_records(str(source), str(source.parent / "out"), Columns()) as records:
        return [storage.read_bytes(r.folder, *r.part) for r in records if r.part]


def parse_saved_rows(path: Path) -> Any:
    (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    return parse_rows(path.parent)


def trained() -> tuple[nn.Module, EMA, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, EMA(model, 0.5), optimizer


def saved(folder: Path) -> None:
    model, ema, optimizer = trained()
    checkpoint.write(folder, checkpoint.state_of(step=1, model=model, ema=ema, optimizer=optimizer))


def file_of_checkpoint(name: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        with TemporaryDirectory() as folder:
            saved(Path(folder))
            return [(Path(folder) / name).read_bytes()]

    return seeds


def parse_checkpoint(path: Path) -> Any:
    data = path.read_bytes()
    saved(path.parent)
    path.write_bytes(data)
    model, ema, optimizer = trained()
    return checkpoint.load(path.parent, model=model, ema=ema, optimizer=optimizer)


def rank_file() -> bytes:
    with TemporaryDirectory() as folder:
        state = State(step=1, optimizer_steps=1, ema_updates=1, shapes={"w": (2, 3)})
        tensors = {"weights": {"w": torch.ones(6)}, "ema": {"w": torch.ones(6)}}
        sharded_checkpoint.save(Path(folder), tensors, rank=0, world_size=1, state=state)  # type: ignore[arg-type]
        return next(Path(folder).iterdir()).read_bytes()


def parse_rank_file(path: Path) -> Any:
    return list(sharded_checkpoint.read_parameters(path.parent, "ema"))


def state_dict() -> bytes:
    data = io.BytesIO()
    torch.save({"w": torch.ones(2)}, data)
    return data.getvalue()


def inside(folder: str, parse: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """With the file in that folder of `path`'s."""

    def parse_moved(path: Path) -> Any:
        target = path.parent / folder / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        return parse(path.parent)

    return parse_moved


def model_folder(path: Path) -> Any:
    for name, document in {
        "unet/config.json": {"sample_size": 8},
        "vae/config.json": {"block_out_channels": [8, 8]},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    }.items():
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text(json.dumps(document))
    return drawing_of(path.parent, name="m")


def texts(*documents: str | dict[str, Any] | list[Any]) -> Callable[[], list[bytes]]:
    return lambda: [(d if isinstance(d, str) else json.dumps(d)).encode() for d in documents]


def files(*names: str) -> Callable[[], list[bytes]]:
    return lambda: [(ROOT / name).read_bytes() for name in names]


PARSERS = {
    "recipe": Parser(
        "recipe.yaml",
        files("recipes/msdm-demo.yaml", "recipes/flux-full-8gpu.yaml"),
        lambda path: load_recipe(str(path)),
    ),
    "sweep": Parser("sweep.yaml", files("sweeps/specs/msdm-learning-rate.yaml"), lambda path: load_spec(str(path))),
    "gates": Parser("gates.yaml", files("recipes/gates/default.yaml"), lambda path: load_gates(str(path))),
    "document": Parser("run.json", texts({"run_id": "a", "tracking_uri": "b"}), lambda path: read_json(str(path))),
    "manifest": Parser("manifest.json", lambda: [manifest()], lambda path: Manifest.load(str(path.parent))),
    "index of a shard": Parser("s.tar.index.json", lambda: [shard_index()], parse_shard_index),
    "prompts": Parser("prompts.json", lambda: [prompts_index()], parse_prompts_index),
    "shard": Parser("s.tar", lambda: [shard()], parse_shard),
    "image": Parser("image", images, lambda path: decode(path.read_bytes(), 16)),
    "dicom": Parser("image.dcm", dicoms, lambda path: decode(path.read_bytes(), 16)),
    "parquet of images": Parser("train.parquet", lambda: [parquet_of_images()], parse_rows),
    "arrow": Parser("data-00000-of-00001.arrow", lambda: [arrow_of_images()], parse_saved_rows),
    "saved data set": Parser(
        "state.json",
        texts({"_data_files": [{"filename": "data.arrow"}], "_split": "train"}),
        lambda path: row_files(str(path.parent)),
    ),
    "moments": Parser("moments.npy", lambda: [npy(4, 2, 2)], lambda path: moments(path.read_bytes())),
    "csv": Parser(
        "t.csv",
        texts("image,caption\na,x\n", 'image;caption\n"a";"x\ny"\n'),
        lambda path: list(records_of(read_rows(str(path)), "", Columns())),
    ),
    "jsonl": Parser(
        "t.jsonl",
        texts('{"image": "a", "caption": "x"}\n{"image": 3}\n'),
        lambda path: list(records_of(read_rows(str(path)), "", Columns())),
    ),
    "parquet": Parser(
        "t.parquet",
        lambda: [parquet()],
        lambda path: list(records_of(read_rows(str(path)), "", Columns())),
    ),
    "weights": Parser("model.safetensors", file_of_checkpoint("model.safetensors"), parse_checkpoint),
    "average": Parser("ema.safetensors", file_of_checkpoint("ema.safetensors"), parse_checkpoint),
    "optimizer": Parser("optimizer.pt", file_of_checkpoint("optimizer.pt"), parse_checkpoint),
    "state": Parser("state.json", file_of_checkpoint("state.json"), parse_checkpoint),
    "rank": Parser("rank-00000-of-00001.safetensors", lambda: [rank_file()], parse_rank_file),
    "state dict": Parser("w.pth", lambda: [state_dict()], read_file),
    "component": Parser(
        "config.json", texts({"_class_name": "A"}), inside("vae", lambda folder: component_config(str(folder), "vae"))
    ),
    "index of weights": Parser(
        "model.safetensors.index.json",
        texts({"weight_map": {"a": "b.safetensors"}}),
        inside("vae", lambda folder: list(weight_files(str(folder), "vae"))),
    ),
    "index of a model": Parser(
        "model_index.json",
        texts(
            {"_class_name": "MSDMPipeline", "default_guidance_scale": 1.0, "default_num_inference_steps": 2},
            {"_class_name": "FluxPipeline"},
        ),
        model_folder,
    ),
}


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A good document with some stretches replaced, removed or repeated."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + draw(st.sampled_from([0, 1, 8, 1000])))))
        replacement = draw(st.binary(max_size=9) | st.sampled_from([b"null", b"[]", b"{}", b"-1", b"1e999", b"9" * 40]))
        data[start:stop] = replacement if draw(st.booleans()) else replacement * draw(st.integers(0, 3))
    return bytes(data)


@pytest.mark.parametrize("kind", PARSERS)
def test_any_bytes_give_a_result_or_our_own_error(kind: str) -> None:
    parser = PARSERS[kind]
    good = parser.seeds()
    with TemporaryDirectory() as folder:  # that a good one is read, or the rest would show nothing
        path = Path(folder) / parser.name
        path.write_bytes(good[0])
        if kind != "index of weights":  # whose weights are not there
            parser.parse(path)

    @EXAMPLES
    @given(damaged(good) | st.binary(max_size=300))
    def holds(data: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / parser.name
            path.write_bytes(data)
            with suppress(UserError, ImageError):
                parser.parse(path)

    holds()


# --- small on disk, vast in memory ---

LETTERS = list(zip("abcdefgh", "bcdefghi", strict=True))
LAUGHS = "a: &a [x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in LETTERS)
MERGES = "a: &a {k: v}\n" + "".join(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in LETTERS)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (LAUGHS, "more than 20000 values"),
        (MERGES, "more than 20000 values"),
        ("a: &a [*a]", "more than 20000 values"),
        ("[" * 50_000, "too deep"),
        ("[" * 40 + "]" * 40, "more than 32 deep"),
        ("a: !!int x", "a value in it cannot be read"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_yaml_that_would_fill_the_memory_or_the_stack(document: str, said: str) -> None:
    with pytest.raises(UserError, match=f"r.yaml is not YAML: .*{said}"):
        parse_yaml(document, "r.yaml")


def test_aliases_that_stay_small_are_read() -> None:
    assert parse_yaml("a: &a {k: [1]}\nb: *a\nc: {<<: *a}", "r")["c"] == {"k": [1]}


def test_a_document_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    for name, read in (("r.yaml", load_recipe), ("run.json", read_json), ("t.csv", read_rows)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**42)  # takes no space on the disk
        with pytest.raises(UserError, match=rf"{name} has 4398046511104 bytes; of such a file no more than"):
            read(str(tmp_path / name))


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"run.json is damaged"):
        read_json(str(tmp_path / "run.json"))


def header(name: str, **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Headers as they are told, whatever they claim."""
    parts = [info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512) for info, data in members]
    return b"".join(parts)


def sparse_bomb() -> bytes:
    """A megabyte of header fields says that a tebibyte of zeros follows."""
    data = bytearray(tar((header("k.png", type=tarfile.GNUTYPE_SPARSE, size=0), b"")))
    data[386:398] = b"%011o\0" % 0  # where its one stretch begins
    data[398:410] = b"%011o\0" % 0
    data[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


TARS = {
    "claims more than there is": (tar((header("k.png", size=2**40), b"x")), "claims 1099511627776 bytes"),
    "claims less than nothing": (tar((header("k.png", size=-512), b"")), "is damaged|claims -512 bytes"),
    "sparse": (sparse_bomb(), "is no plain file"),
    "symbolic link": (tar((header("k.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")), "is no plain file"),
    "hard link": (tar((header("k.png", type=tarfile.LNKTYPE, linkname="../secret"), b"")), "is no plain file"),
    "device": (tar((header("k.png", type=tarfile.CHRTYPE), b"")), "is no plain file"),
    "compressed": (gzip.compress(bytes(2**20)), "is damaged"),
    "outside": (
        tar((header("../k.json", size=18), b'{"captions":["x"]}')),
        "holds other samples than the manifest says",
    ),
    "no captions": (tar((header("k.json", size=15), b'{"captions":[]}')), "has no captions"),
    "headers in headers": (
        tar(*[(header("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=1), b"x")] * 3000),
        "is damaged",
    ),
}


@pytest.mark.parametrize("kind", TARS)
def test_hostile_tars_are_refused(kind: str, tmp_path: Path) -> None:
    """Their manifest is of the same hand, so their checksums are right."""
    data, said = TARS[kind]
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(UserError, match=rf"s.tar.*({said})"):
        ShardReader(str(tmp_path)).read(described(tmp_path, data, "k"))


@pytest.mark.parametrize("name", ["../s.tar", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_names_no_file_outside_its_folder(name: str, tmp_path: Path) -> None:
    document = json.loads(manifest())
    document["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"manifest.json is damaged or of another version: shards.0.name"):
        Manifest.load(str(tmp_path))


def test_a_digest_names_no_file_outside_the_cache(tmp_path: Path) -> None:
    """Blocks of a shard, and of prompt embeddings, are kept under it."""
    document = json.loads(manifest())
    document["shards"][0]["sha256"] = "../../over-there"
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"manifest.json is damaged or of another version: shards.0.sha256"):
        Manifest.load(str(tmp_path))
    prompts(tmp_path)
    document = json.loads((tmp_path / "prompts.json").read_text())
    document["files"][0]["sha256"] = "../../over-there"
    (tmp_path / "prompts.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"prompts.json is damaged or of another version"):
        PromptStore(str(tmp_path), 0)


@pytest.mark.parametrize(
    "about",
    [
        rb'{"captions": ["\ud800"]}',  # halves of a character: Python's own parser takes them
        rb'{"captions": ["\udc00\ud800"]}',
        b'{"captions": ["\xed\xa0\x80"]}',
        b'{"captions": ["\xff"]}',
        b'{"captions": "a polyp"}',
        b'{"captions": [1]}',
        b'{"captions": []}',
        b'{"captions": ["a"]} {}',
        b"[]",
        b"",
    ],
)
def test_a_samples_captions_are_texts_or_its_shard_is_refused(about: bytes, tmp_path: Path) -> None:
    sample: dict[str, str | bytes] = {"__key__": "k", "png": image("L", "PNG"), "json": about}
    entry = write_tar([sample], str(tmp_path), name="s.tar", split="train", made_of="")
    with pytest.raises(UserError, match=r"s\.tar, though its bytes .* is damaged, or of another kind: .+"):
        ShardReader(str(tmp_path)).read(entry)


def test_a_shard_shorter_than_its_manifest_says(tmp_path: Path) -> None:
    """No memory is taken for what is not there."""
    (tmp_path / "s.tar").write_bytes(b"x")
    index = ShardIndex(made_of="", num_bytes=2**50, sha256="0" * 64, samples=(SampleEntry("k", 0, 2**50, 0),))
    entry = index.save(str(tmp_path), name="s.tar", split="train")
    with pytest.raises(storage.StorageError, match="ends early: asked for 1125899906842624 bytes at 0, got 1"):
        ShardReader(str(tmp_path)).read(entry)


def test_moments_that_claim_a_tebibyte() -> None:
    data = npy(4, 2, 2).replace(b"(4, 2, 2)", b"(4, 2, 99999999999)"[:9].ljust(9))
    with pytest.raises(ImageError, match="its moments are damaged"):
        moments(data)
    zipped = io.BytesIO()
    np.savez_compressed(zipped, a=np.zeros(2**20, np.float32))
    with pytest.raises(ImageError, match="its moments are damaged"):
        moments(zipped.getvalue())


def test_a_picture_that_would_start_another_program() -> None:
    """Pillow draws PostScript by Ghostscript."""
    with pytest.raises(ImageError, match="not an image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", 16)


def test_a_table_of_a_billion_equal_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is lowered here, not the table made larger: to write one takes as long as to read it."""
    monkeypatch.setattr("data_shards.sources.table.MAX_TABLE_BYTES", 2**21)
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a" * 100] * 100_000}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"t.parquet cannot be read as parquet: its values take more than"):
        read_rows(str(path))


def test_a_compressed_checkpoint(tmp_path: Path) -> None:
    """torch would inflate it: a thousand times of what there is."""
    saved(tmp_path)
    path = tmp_path / "optimizer.pt"
    with zipfile.ZipFile(path) as stored:
        members = [(info.filename, stored.read(info)) for info in stored.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members:
            packed.writestr(name, data)
    model, ema, optimizer = trained()
    with pytest.raises(UserError, match=r"optimizer.pt is damaged, or of another kind: its members are compressed"):
        checkpoint.load(tmp_path, model=model, ema=ema, optimizer=optimizer)


@pytest.mark.parametrize(
    ("shape", "end"),
    [([2**40], 2**42), ([2**40], 24), ([2, 3], 2**42)],
    ids=["all that it claims", "more than it has", "further than the file"],
)
def test_weights_that_claim_more_than_there_is(shape: list[int], end: int, tmp_path: Path) -> None:
    about = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(about).to_bytes(8, "little") + about + bytes(24))
    with pytest.raises(UserError, match=r"w.safetensors is damaged"):
        read_file(tmp_path / "w.safetensors")


def test_a_header_of_absurd_length(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"w.safetensors is damaged"):
        read_file(tmp_path / "w.safetensors")


def test_a_rank_whose_tensors_are_of_other_sizes_than_it_says(tmp_path: Path) -> None:
    state = State(step=1, optimizer_steps=1, ema_updates=1, shapes={"w": (2, 2**40)})
    sharded_checkpoint.save(tmp_path, {"weights": {"w": torch.ones(6)}}, rank=0, world_size=1, state=state)
    with pytest.raises(UserError, match="rank 0 does not hold elements 0 to 2199023255552 of weights/w"):
        ShardedCheckpoint(tmp_path)


def test_averages_and_moments_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """torch would spread the one over the weights, and the optimizer would take the other."""
    model, ema, optimizer = trained()
    saved(tmp_path)
    safetensors.torch.save_file({"weight": torch.ones(1, 3), "bias": torch.ones(2)}, tmp_path / "ema.safetensors")
    with pytest.raises(UserError, match=r"belongs to another model: weight is \[1, 3\], not \[2, 3\]"):
        checkpoint.load(tmp_path, model=model, ema=ema, optimizer=optimizer)
    saved(tmp_path)
    document = optimizer.state_dict()
    document["state"][0]["exp_avg"] = torch.ones(1).expand(2**40)
    torch.save(document, tmp_path / "optimizer.pt")
    with pytest.raises(UserError, match=r"optimizer.pt is damaged, or of another kind: exp_avg of weight 0 is \[1099"):
        checkpoint.load(tmp_path, model=model, ema=ema, optimizer=optimizer)
