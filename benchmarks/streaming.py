"""Streaming: ours beside plain WebDataset, MosaicML Streaming, LitData, and what reading and decoding alone allow.

    python -m benchmarks.streaming                     # all of it
    python -m benchmarks.streaming --places local --contenders limit ours

One set of images, each of `--resolution` already, in each contender's own format, whole on local disk or on an S3
server of this machine; batches of 32 float32 images, shuffled, two workers. All decode with the same function, so
what differs is what brings the bytes to it. Each contender is a process of its own and takes its turn in each round;
of the rounds the median counts. Needs, beside medsynth, `litdata` and `streaming-community` with their dependencies.

"limit": as many processes as workers read shards from front to back and decode, and hand nothing on.
"latents": ours and such a limit on a precomputed set. "plan", "shuffle": on a manifest without shards.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import torch
from PIL import Image, ImageOps

from benchmarks.circumstances import RESULTS, ROOT, circumstances
from cluster import storage
from data_shards import Manifest, ShardStream
from data_shards.block_cache import BlockCache
from data_shards.decode import decode_into
from data_shards.manifest import Precomputed, ShardEntry
from data_shards.plan import Plan, window_size
from data_shards.prompts import PromptIndex, write_prompts
from data_shards.writer import write_tar

BATCH, WORKERS, SHARD_SAMPLES, RESUMED_AT = 32, 2, 1000, 0.9
BUCKET = "s3://streaming"
UNTOLD: dict[str, Any] = {"groups": {}, "captions": {}, "licences": {}, "quarantined": {}, "conversions": {}}
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
CHUNK = 2**20  # memory that is used again: pages of new memory for a whole shard take longer than reading it
REQUEST = 2**26  # bytes of what a limit asks S3 for at a time
LATENTS = (16, 32, 32)  # mean and log-variance of 8 channels: the study's autoencoder at 256 x 256
PROMPT = (64, 768)  # tokens and width of its text encoder


# --- the data, once for each contender ---


def images(folder: Path, resolution: int) -> list[bytes]:
    """Real frames as JPEG of `resolution`, so that nothing is left to scale."""
    found = []
    for path in sorted(folder.rglob("*.jpg")):
        file = io.BytesIO()
        square = ImageOps.fit(Image.open(path).convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
        square.save(file, "JPEG", quality=92)
        found.append(file.getvalue())
    return found


def write_ours(folder: Path, samples: Sequence[dict[str, Any]], precomputed: Precomputed | None = None) -> None:
    """Shards that WebDataset reads too."""
    shards = []
    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        part = samples[start : start + SHARD_SAMPLES]
        name = f"images-train-{number:06d}.tar"
        shards.append(write_tar(part, str(folder), name=name, split="train", made_of=""))
    manifest = Manifest(
        name="images", source={}, split_rule="", shards=tuple(shards), precomputed=precomputed, **UNTOLD
    )
    manifest.save(str(folder))


def write_mosaicml(folder: Path, samples: Sequence[dict[str, Any]]) -> None:
    streaming = import_mosaicml()
    columns = {"image": "bytes", "caption": "str"}
    with streaming.MDSWriter(out=str(folder), columns=columns, progress_bar=False) as out:
        for sample in samples:
            out.write({"image": sample["jpg"], "caption": "a polyp"})


def write_litdata(folder: Path, samples: Sequence[dict[str, Any]]) -> None:
    import litdata

    litdata.optimize(AsLitData(samples), list(range(len(samples))), str(folder), chunk_bytes="64MB", num_workers=1)


@dataclass
class AsLitData:
    samples: Sequence[dict[str, Any]]

    def __call__(self, number: int) -> dict[str, Any]:
        return {"image": self.samples[number]["jpg"], "caption": "a polyp"}


def import_mosaicml() -> Any:
    """Its package imports two names of torchvision that nothing here uses, and torchvision has no build for a CPU's
    torch everywhere."""
    import transformers  # noqa: F401 - looks for torchvision, and is to find none

    for name, used in {"": {}, ".datasets": {"VisionDataset": object}, ".transforms": {}}.items():
        sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
        vars(sys.modules[f"torchvision{name}"]).update(used)
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.to_tensor = None  # type: ignore[attr-defined]
    sys.modules[functional.__name__] = functional
    import streaming

    return streaming


# --- contenders: from a place to batches of one epoch ---


@dataclass(frozen=True)
class Source:
    """Where a contender reads, and where it may keep what it read; nothing is kept there yet when it is cold."""

    place: str
    cache: str
    resolution: int
    start: float = 0.0
    """Share of the epoch after which to begin."""
    epochs: int = 1


def decoded(data: bytes, resolution: int) -> torch.Tensor:
    image = torch.empty(3, resolution, resolution)
    decode_into(image.numpy(), data)
    return image


def ours(source: Source) -> Iterator[int]:
    cache = BlockCache(Path(source.cache), 2**40) if storage.is_remote(source.place) else None
    settings: dict[str, Any] = {"split": "train", "resolution": source.resolution, "seed": 0, "rank": 0}
    stream = ShardStream(
        source.place,
        **settings,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        world_size=1,
        num_workers=WORKERS,
        cache=cache,
    )
    steps = source.epochs * stream.num_samples // BATCH
    first = int(source.start * steps)
    for (batch,) in islice(stream.batches(first), steps - first):
        yield len(batch.inputs)


def webdataset(source: Source) -> Iterator[int]:
    """As its documentation recommends: shards then samples shuffled, batches made by the workers."""
    import webdataset as wds

    if storage.is_remote(source.place):
        base = f"{os.environ['AWS_ENDPOINT_URL']}/{source.place.removeprefix('s3://')}"
        urls = [f"{base}/{name}" for name in storage.list_files(source.place) if name.endswith(".tar")]
    else:
        urls = [str(path) for path in sorted(Path(source.place).glob("*.tar"))]
    total = sum(shard.num_samples for shard in Manifest.load(source.place).shards)

    def opened(sample: dict[str, Any]) -> tuple[torch.Tensor, str]:
        return decoded(sample["jpg"], source.resolution), json.loads(sample["json"])["captions"][0]

    cache = {"cache_dir": source.cache} if storage.is_remote(source.place) else {}
    dataset = wds.WebDataset(urls, shardshuffle=100, **cache).shuffle(1000).map(opened).batched(BATCH)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    skipped = 0
    for batch, _ in loader:
        skipped += len(batch)
        if skipped > source.start * total:  # there is no other way to come there
            yield len(batch)


def mosaicml(source: Source) -> Iterator[int]:
    streaming = import_mosaicml()

    class Frames(streaming.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return decoded(sample["image"], source.resolution), sample["caption"]

    where = {"remote": source.place, "local": source.cache} if storage.is_remote(source.place) else {}
    dataset = Frames(**(where or {"local": source.place}), shuffle=True, batch_size=BATCH)
    loader = streaming.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
    if source.start:
        state = dataset.state_dict(int(source.start * len(dataset)), from_beginning=True)
        loader.load_state_dict(state | {"epoch": 0})
    for batch, _ in loader:
        yield len(batch)


def litdata(source: Source) -> Iterator[int]:
    import litdata

    class Frames(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decoded(sample["image"], source.resolution), sample["caption"]

    where: dict[str, Any] = {"input_dir": source.place}
    if storage.is_remote(source.place):
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it takes TLS alone, which the test server has not
        where |= {"cache_dir": source.cache, "storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}}
    dataset = Frames(**where, shuffle=True, drop_last=False)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
    kept = Path(f"{source.cache}.state")  # of the epoch before, as only a loader under way has one
    if source.start:
        state = json.loads(kept.read_text())
        done = int(source.start * len(dataset)) // BATCH * BATCH
        state["num_samples_yielded"] = done
        state["dataset"] |= {"num_samples_yielded": done, "sample_in_epoch": done}
        loader.load_state_dict(state)
    for batch, _ in loader:
        if not source.start and not kept.exists():
            kept.write_text(json.dumps(loader.state_dict()))
        yield len(batch)


def limit(work: Callable[[Source, ShardEntry], int], source: Source) -> Iterator[int]:
    """Each shard from front to back, in as many processes as the others have workers."""
    with multiprocessing.Pool(WORKERS) as pool:
        yield from pool.imap_unordered(partial(work, source), Manifest.load(source.place).shards * source.epochs)


def read_and_decode(source: Source, shard: ShardEntry) -> int:
    data = storage.read_bytes(storage.join(source.place, shard.name))
    images = np.empty((BATCH, 3, source.resolution, source.resolution), np.float32)
    for number, jpeg in enumerate(jpegs_in(data)):
        decode_into(images[number % BATCH], jpeg)
    return shard.num_samples


def read_only(source: Source, shard: ShardEntry) -> int:
    size = REQUEST if storage.is_remote(source.place) else CHUNK
    for _ in storage.iter_chunks(storage.join(source.place, shard.name), size):
        pass
    return shard.num_samples


def jpegs_in(data: bytes) -> Iterable[bytes]:
    """The members that are JPEG, by the sizes in their headers and no more."""
    at = 0
    while at < len(data) and data[at]:
        size = int(data[at + 124 : at + 135], 8)
        if data[at + 512 : at + 514] == b"\xff\xd8":
            yield data[at + 512 : at + 512 + size]
        at += 512 + -(-size // 512) * 512


CONTENDERS: dict[str, Callable[[Source], Iterator[int]]] = {
    "limit": partial(limit, read_and_decode),
    "ours": ours,
    "webdataset": webdataset,
    "mosaicml": mosaicml,
    "litdata": litdata,
    "latents_limit": partial(limit, read_only),
    "latents": ours,
}
PACKAGES = {"webdataset": "webdataset", "mosaicml": "streaming-community", "litdata": "litdata"}
EPOCHS = {"ours": 4, "limit": 4, "latents": 10, "latents_limit": 10}
"""Of contenders who otherwise would have ended before they are under way; with nothing cached it is one."""
FORMATS = {"mosaicml": "mosaicml", "litdata": "litdata", "latents": "latents", "latents_limit": "latents"}


# --- one turn of one contender, in a process of its own ---


def turn(contender: str, source: Source) -> dict[str, float]:
    """An epoch, or several: the speed from the second batch on, or in all where what comes first is most of it; the
    time to the first batch."""
    began, used = time.perf_counter(), cpu_seconds()
    batches = CONTENDERS[contender](source)
    first = next(batches)
    to_first = time.perf_counter()
    rest = sum(batches)
    ended = time.perf_counter()
    in_all = contender.endswith("limit") or contender == "latents"
    return {
        "images": first + rest,
        "images_per_second": (first + rest) / (ended - began) if in_all else rest / (ended - to_first),
        "cpu_ms_per_image": (cpu_seconds() - used) / (first + rest) * 1e3,
        "seconds_to_first_batch": to_first - began,
    }


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def in_own_process(contender: str, source: Source) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.streaming", "--turn", contender, json.dumps(asdict(source))]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True)
        memory = 0.0
        while process.poll() is None:
            memory = max(memory, memory_of(process.pid))
            time.sleep(0.25)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{contender} failed:\n{errors.read()[-3000:]}")
        return {**json.loads(output.read().splitlines()[-1]), "peak_memory_mb": memory / 1e6}


def memory_of(pid: int) -> float:
    """Bytes that a process and its children take; what they share counts once."""
    total = 0.0
    try:
        for process in [(parent := psutil.Process(pid)), *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:  # one has just ended
        pass
    return total


def forget_pages(place: str) -> None:
    """Let the system read local files from the disk again."""
    for path in Path(place).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- without data ---


def planning() -> dict[str, float]:
    """An epoch of 100 M samples in 10,000 shards: from the manifest's bytes to what a rank reads first."""
    shards = tuple(
        ShardEntry(
            name=f"big-train-{number:06d}.tar",
            split="train",
            num_samples=10_000,
            num_bytes=2**30,
            sha256=f"{number:064x}",
            index_sha256=f"{number:064x}",
        )
        for number in range(10_000)
    )
    with tempfile.TemporaryDirectory() as folder:
        Manifest(name="big", source={}, split_rule="", shards=shards, **UNTOLD).save(folder)
        del shards
        command = [sys.executable, "-m", "benchmarks.streaming", "--plan", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {**json.loads(done.stdout), "manifest_mb": (Path(folder) / "manifest.json").stat().st_size / 1e6}


def plan_of_a_rank(folder: str) -> dict[str, float]:
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    manifest = Manifest.load(folder)
    batch, ranks = 4096, 512
    counts = tuple(shard.num_samples for shard in manifest.split("train"))
    plan = Plan(counts, manifest.digest, 0, batch, window_size(batch))
    keys = [plan.place(0, slot).window for slot in range(batch // ranks)]
    windows = {key: plan.window(key) for key in keys}
    seconds = time.perf_counter() - began
    assert len(windows) == batch // ranks
    return {"seconds": seconds, "memory_mb": (psutil.Process().memory_info().rss - before) / 1e6}


def shuffling(global_batch_size: int) -> dict[str, float]:
    """How our order compares with a full random permutation, where shards are sorted: the worst there is.

    Each sample's label is its shard's place among all, in [0, 1]. `batch_variance`: of the mean label of a batch;
    `successive`: correlation of one batch's mean with the next one's; `met_again`: pairs of samples of one batch that
    share a batch in the next epoch, too. Each is divided by what a permutation gives, but for the correlation.
    """
    shards, samples = 100, 200
    plan = Plan((samples,) * shards, "digest", 0, global_batch_size, window_size(global_batch_size))
    steps = shards * samples // global_batch_size
    drawn = np.array(
        [[plan.sample(step, slot)[1:] for slot in range(global_batch_size)] for step in range(2 * steps)]
    )  # [2 epochs of steps, G, (shard, index)]
    generator = np.random.default_rng(0)
    permuted = np.concatenate([generator.permutation(shards * samples)[: steps * global_batch_size] for _ in range(2)])
    reference = permuted.reshape(2 * steps, global_batch_size)
    found = drawn[..., 0] * samples + drawn[..., 1]

    def figures(order: np.ndarray) -> tuple[float, float, float]:
        means = (order[:steps] // samples / shards).mean(axis=1)
        batch_of = {int(sample): step for step in range(steps) for sample in order[step]}
        again = 0
        for batch in order[steps:]:
            met = [batch_of[int(sample)] for sample in batch if int(sample) in batch_of]
            again += sum(count * (count - 1) // 2 for count in np.bincount(met))
        return float(means.var()), float(np.corrcoef(means[:-1], means[1:])[0, 1]), float(again)

    (variance, successive, again), (expected, _, often) = figures(found), figures(reference)
    return {
        "batch_variance": variance / expected,
        "successive": successive,
        "met_again": again / often,
        "shards_in_a_batch": float(np.mean([len(set(batch)) for batch in drawn[:steps, :, 0]])),
        "shards_in_a_permuted_batch": float(np.mean([len(set(batch // samples)) for batch in reference[:steps]])),
    }


# --- all of it ---


def measure(options: argparse.Namespace, folder: Path, stack: ExitStack) -> dict[str, Any]:
    frames = images(options.images, options.resolution)
    random.Random(0).shuffle(frames)
    about = json.dumps({"captions": ["a polyp"]}).encode()
    samples = [
        {"__key__": f"{number:06d}", "jpg": frames[number % len(frames)], "json": about}
        for number in range(options.samples)
    ]
    write_ours(folder / "shards", samples)
    if "mosaicml" in options.contenders:
        write_mosaicml(folder / "mosaicml", samples)
    if "litdata" in options.contenders:
        write_litdata(folder / "litdata", samples)
    write_latents(folder / "latents", options.samples)
    size = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
    if "s3" in options.places:
        from tests.servers import s3_server  # its package forgets AWS's variables, which every turn needs

        os.environ |= {
            "AWS_ENDPOINT_URL": stack.enter_context(s3_server(folder)),
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]  # as MosaicML's asks for it
        name = BUCKET.removeprefix("s3://")
        boto3.client("s3").create_bucket(Bucket=name, ACL="public-read")
        for kind in ("shards", "mosaicml", "litdata", "latents"):
            if (folder / kind).is_dir():
                storage.upload_folder(folder / kind, f"{BUCKET}/{kind}")
    found: dict[str, Any] = {}
    for round_number in range(options.rounds):
        for place in options.places:
            for contender in options.contenders:
                kind = FORMATS.get(contender, "shards")
                base = f"{BUCKET}/{kind}" if place == "s3" else str(folder / kind)
                cache = folder / f"cache-{contender}-{place}-{round_number}"
                cache.mkdir()
                for state in ("cold", "warm", "resumed"):
                    if contender.endswith("limit") and state == "resumed":
                        continue
                    if state == "cold" and place == "local":
                        forget_pages(base)
                    start = RESUMED_AT if state == "resumed" else 0.0
                    epochs = EPOCHS.get(contender, 1) if state == "warm" else 1
                    one = in_own_process(contender, Source(base, str(cache), options.resolution, start, epochs))
                    found.setdefault(f"{place}, {state}", {}).setdefault(contender, []).append(one)
                    print(f"{place}, {state}, {contender}: {one}", flush=True)
    per_image = size / options.samples
    return {
        "samples": options.samples,
        "resolution": options.resolution,
        "bytes_per_image": per_image,
        "median": {
            state: {contender: median_of(turns, per_image) for contender, turns in by.items()}
            for state, by in found.items()
        },
        "turns": found,
    }


def median_of(turns: Sequence[dict[str, float]], bytes_per_image: float) -> dict[str, float]:
    middle = {name: statistics.median(one[name] for one in turns) for name in turns[0]}
    return {**middle, "mb_per_second": middle["images_per_second"] * bytes_per_image / 1e6}


def write_latents(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    about = json.dumps({"captions": ["a polyp"]}).encode()

    def member() -> bytes:
        file = io.BytesIO()
        np.save(file, generator.standard_normal(LATENTS, np.float32))
        return file.getvalue()

    samples = [{"__key__": f"{n:06d}", "moments.npy": member(), "json": about} for n in range(count)]
    settings = Precomputed(
        source_digest="", components={}, resolution=256, max_tokens=1, horizontal_flip=False, dtypes={}
    )
    write_ours(folder, samples, settings)
    captions = ("", "a polyp")
    embeddings = {"prompt_embeds": torch.zeros(2, *PROMPT), "prompt_mask": torch.ones(2, PROMPT[0])}
    prompts = write_prompts(str(folder), "prompts-000000.safetensors", captions, embeddings)
    PromptIndex(files=(prompts,)).save(str(folder))


def draw(document: dict[str, Any], path: Path) -> None:
    """Images a second of each contender in each state, beside what reading and decoding alone give."""
    from matplotlib import pyplot as plt

    names = {"ours": "medsynth", "litdata": "LitData", "mosaicml": "MosaicML Streaming", "webdataset": "WebDataset"}
    titles = {
        "local, warm": "local disk, pages in memory",
        "local, cold": "local disk, pages forgotten",
        "s3, cold": "S3 over HTTP, first epoch",
        "s3, warm": "S3 over HTTP, second epoch, with cache",
    }
    states = [state for state in titles if state in document["median"]]
    figure, axes = plt.subplots(len(states), 1, figsize=(8, 1 + 1.6 * len(states)), sharex=True, squeeze=False)
    for axis, state in zip(axes[:, 0], states, strict=True):
        found = document["median"][state]
        there = [name for name in reversed(names) if name in found]
        speeds = [found[name]["images_per_second"] for name in there]
        colours = ["#0b6bcb" if name == "ours" else "#b8c4ce" for name in there]
        bars = axis.barh([names[name] for name in there], speeds, color=colours)
        axis.bar_label(bars, fmt="{:,.0f}", padding=-34, fontsize=9, color="#1b1f24", bbox=LABEL)
        limit = found["limit"]["images_per_second"]
        axis.axvline(limit, color="#1b1f24", linestyle="--", linewidth=1)
        axis.set_title(f"{titles[state]} (dashed: reading and decoding alone, {limit:,.0f})", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"images a second, {WORKERS} cores; {document['bytes_per_image'] / 1e3:.0f} kB of JPEG each")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "tests/data/colonoscopy", help="a folder of JPEG files")
    parser.add_argument("--samples", type=int, default=8000, help="the images are repeated up to so many")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--places", nargs="+", choices=("local", "s3"), default=["local", "s3"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-streaming-cpu.json")
    parser.add_argument("--turn", nargs=2, metavar=("CONTENDER", "SOURCE"), help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.turn:
        print(json.dumps(turn(options.turn[0], Source(**json.loads(options.turn[1])))))
        return
    if options.plan:
        print(json.dumps(plan_of_a_rank(options.plan)))
        return
    here = circumstances()
    used = ["isal", "simplejpeg", *(PACKAGES[name] for name in options.contenders if name in PACKAGES)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        document = {
            **here,
            "contenders": {name: version(name) for name in used},
            "plan": planning(),
            "shuffle": {size: shuffling(size) for size in (32, 256, 1024)},
            **measure(options, folder, stack),
        }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, options.out.with_suffix(".png"))
    print(json.dumps({name: document[name] for name in ("plan", "shuffle", "median")}, indent=1))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
