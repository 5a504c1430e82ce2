"""The stream: the same batches at any number of ranks and threads, resumable, and damage is found and named."""

import hashlib
import io
import itertools
import random
import tarfile
import threading
import time
import zlib
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cluster import counters, storage
from cluster.errors import UserError
from data_shards import Batch, Manifest, Settings, ShardStream, plan, write_shards
from data_shards.manifest import ShardIndex, read_index
from data_shards.plan import Stretch, window_size
from data_shards.sample import derive_seed
from data_shards.sources import medvqa_records
from data_shards.stream import FETCH_THREADS, _Memory
from data_shards.writer import write_tar
from tests.conftest import write_small_shards
from tests.fault_proxy import Fault, fault_proxy

GLOBAL = 8


def stream(shards: str, **changes: Any) -> ShardStream:
    chosen: dict[str, Any] = {
        "split": "train",
        "resolution": 16,
        "global_batch_size": GLOBAL,
        "micro_batch_size": 1,
        "seed": 3,
        "rank": 0,
        "world_size": 1,
    }
    return ShardStream(shards, **(chosen | changes))


def keys_of(shards: str, split: str) -> list[str]:
    return [entry.key for shard in Manifest.load(shards).split(split) for entry in read_index(shards, shard)]


def joined(batches: list[Batch]) -> dict[str, Any]:
    return {
        "inputs": torch.cat([batch.inputs for batch in batches]),
        "captions": [caption for batch in batches for caption in batch.captions],
        "keys": [key for batch in batches for key in batch.keys],
        "flipped": [flipped for batch in batches for flipped in batch.flipped],
        "seeds": [seed for batch in batches for seed in batch.seeds],
    }


def global_batches(shards: str, steps: int, world_size: int, *, start: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """What all ranks together see at each step, in rank order."""
    ranks = [stream(shards, rank=rank, world_size=world_size, **changes).batches(start) for rank in range(world_size)]
    return [joined([batch for rank in ranks for batch in next(rank) if batch.weight]) for _ in range(steps)]


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours.pop("inputs"), theirs.pop("inputs"))
        assert ours == theirs


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_world_size_and_worker_count_sees_the_same(shards: str, world_size: int, num_workers: int) -> None:
    """Over several epochs, with mirroring on, so that every random choice of the stream takes part."""
    common = {"horizontal_flip": True}
    straight = global_batches(shards, 6, 1, num_workers=0, micro_batch_size=GLOBAL, **common)
    assert_same(straight, global_batches(shards, 6, world_size, num_workers=num_workers, **common))
    assert len({True, False} & {f for batch in global_batches(shards, 6, 1, **common) for f in batch["flipped"]}) == 2


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("world_size", [1, 4])
def test_resuming_at_a_step_continues_the_very_sequence(shards: str, step: int, world_size: int) -> None:
    straight = global_batches(shards, 7, 2)
    assert_same(straight[step:], global_batches(shards, 7 - step, world_size, start=step))


def test_an_epoch_has_each_sample_once_and_captions_change_between_epochs(shards: str) -> None:
    train = keys_of(shards, "train")
    epochs = 4
    steps = -(-epochs * len(train) // GLOBAL)
    batches = global_batches(shards, steps, 2)
    keys = [key for batch in batches for key in batch["keys"]]
    captions = [caption for batch in batches for caption in batch["captions"]]
    for epoch in range(epochs):
        assert sorted(keys[epoch * len(train) : (epoch + 1) * len(train)]) == sorted(train)
    by_key: dict[str, set[str]] = {}
    for key, caption in zip(keys, captions, strict=True):
        by_key.setdefault(key, set()).add(caption)
    assert max(len(drawn) for drawn in by_key.values()) > 1


def test_seeds_belong_to_sample_and_epoch(shards: str) -> None:
    seeds = [seed for batch in global_batches(shards, 12, 1) for seed in batch["seeds"]]
    assert len(set(seeds)) == len(seeds)
    assert set(seeds).isdisjoint(seed for batch in global_batches(shards, 12, 1, seed=4) for seed in batch["seeds"])


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_one_pass_sees_each_sample_once_and_the_same_each_time(shards: str, world_size: int) -> None:
    def passed(num_samples: int | None = None) -> list[Batch]:
        ranks = [
            stream(shards, split="validation", global_batch_size=10, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return [batch for rank in ranks for batch in rank.one_pass(3, num_samples)]

    expected = keys_of(shards, "validation")
    first = joined(passed())
    assert first["keys"] == expected
    assert not any(first["flipped"])
    assert_same([first], [joined(passed())])
    assert joined(passed(4))["keys"] == expected[:4]
    assert joined(passed(4000))["keys"] == expected


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_pass_is_read_and_decoded_ahead_by_other_threads(
    shards: str, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = stream(shards, num_workers=num_workers)
    read, readers = ahead.read, []

    def noted(stretch: Stretch) -> Any:
        readers.append(threading.current_thread())
        return read(stretch)

    monkeypatch.setattr(ahead, "read", noted)
    batches = ahead.one_pass(2)
    first = next(batches)
    deadline = time.monotonic() + 10
    while len(readers) < 2:  # what follows is on its way while the first is used
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert threading.main_thread() not in readers
    assert_same([joined([first, *batches])], [joined(list(stream(shards, num_workers=0).one_pass(2)))])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int]]]:
    """(start, stop) of each read of a shard, by its name."""
    found: dict[str, list[tuple[int, int]]] = {}
    read_bytes = storage.read_bytes

    def noted(uri: str, start: int = 0, length: int | None = None) -> bytes:
        data = read_bytes(uri, start, length)
        if uri.endswith(".tar"):
            found.setdefault(uri.rpartition("/")[2], []).append((start, start + len(data)))
        return data

    monkeypatch.setattr(storage, "read_bytes", noted)
    return found


@pytest.mark.parametrize("world_size", [1, 4])
def test_an_epoch_reads_every_byte_once_window_by_window(
    tmp_path: Path, reads: dict[str, list[tuple[int, int]]], world_size: int
) -> None:
    """All ranks together, front to back in each lane, and never a request for each sample."""
    shards = tiny_shards(tmp_path, [200] * 5)
    global_batches(shards, 1000 // GLOBAL, world_size, num_workers=0)
    for shard in Manifest.load(shards).shards:
        entries = read_index(shards, shard)
        parts = sorted(reads[shard.name])
        assert parts[0][0] == 0
        assert parts[-1][1] == entries[-1].offset + entries[-1].length
        assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    windows_a_lane = -(-1000 // GLOBAL // window_size(GLOBAL))  # and windows are cut where shards end
    assert sum(map(len, reads.values())) <= GLOBAL * windows_a_lane + len(reads) + 1


def test_resuming_reads_what_it_needs(tmp_path: Path, reads: dict[str, list[tuple[int, int]]]) -> None:
    """Not what came before: the windows of this step and the next ones, a few samples of a thousand."""
    shards = tiny_shards(tmp_path, [1000, 1000])
    global_batches(shards, 1, 1, start=9 * 250 // 10, num_workers=0)
    assert sum(stop - start for parts in reads.values() for start, stop in parts) < 0.6 * sum(
        shard.num_bytes for shard in Manifest.load(shards).shards
    )
    assert sum(map(len, reads.values())) <= 2 * GLOBAL + 4


def test_the_windows_that_a_step_lacks_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes, number, together = storage.read_bytes, itertools.count(), threading.Barrier(FETCH_THREADS, timeout=30)

    def waits_for_others(uri: str, start: int = 0, length: int | None = None) -> bytes:
        if uri.endswith(".tar") and next(number) < FETCH_THREADS:
            together.wait()
        return read_bytes(uri, start, length)

    monkeypatch.setattr(storage, "read_bytes", waits_for_others)
    global_batches(tiny_shards(tmp_path, [200]), 1, 1, num_workers=0)


def test_local_and_s3_shards_stream_the_same(shards: str, s3_shards: str) -> None:
    assert_same(global_batches(shards, 3, 2), global_batches(s3_shards, 3, 1))


def tiny_shards(folder: Path, counts: list[int]) -> str:
    """Shards of so many samples each, whose images are a few pixels."""
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "PNG")
    shards = []
    for number, count in enumerate(counts):
        samples: list[dict[str, str | bytes]] = [
            {"__key__": f"{number}-{i}", "png": image.getvalue(), "json": b'{"captions": ["a", "b"]}'}
            for i in range(count)
        ]
        name = f"tiny-train-{number:06d}.tar"
        shards.append(write_tar(samples, str(folder), name=name, split="train", made_of=""))
    empty: dict[str, Any] = {"groups": {}, "captions": {}, "licences": {}, "quarantined": {}, "conversions": {}}
    Manifest(name="tiny", source={}, split_rule="", shards=tuple(shards), **empty).save(str(folder))
    return str(folder)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    micro_batch_size=st.integers(1, 3),
    micro_batches=st.integers(1, 5),
    legs=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0, 1, 3]), st.integers(1, 4)), min_size=1, max_size=3),
)
def test_whatever_the_shards_ranks_and_workers_the_sequence_is_that_of_the_plan(
    counts: list[int], micro_batch_size: int, micro_batches: int, legs: list[tuple[int, int, int]]
) -> None:
    """Each leg of a training goes on where the one before stopped, on other ranks with other workers."""
    sizes = {"global_batch_size": micro_batch_size * micro_batches, "micro_batch_size": micro_batch_size}
    seen, step = [], 0
    with TemporaryDirectory() as folder:
        shards = tiny_shards(Path(folder), counts)
        planned = stream(shards, **sizes).plan
        for world_size, num_workers, steps in legs:
            for batch in global_batches(shards, steps, world_size, start=step, num_workers=num_workers, **sizes):
                seen += list(zip(batch["keys"], batch["seeds"], strict=True))
            step += steps
    first = [sum(counts[:number]) for number in range(len(counts))]
    slots = itertools.product(range(step), range(sizes["global_batch_size"]))
    assert seen == [
        (f"{shard}-{index}", derive_seed(3, epoch, first[shard] + index))
        for epoch, shard, index in itertools.starmap(planned.sample, slots)
    ]


def test_memory_is_lent_anew_only_when_nothing_of_it_is_held() -> None:
    memory = _Memory()
    array = memory.take(4, 2)
    array[:] = 1
    place = array.__array_interface__["data"]
    part = array[1:]
    tensor = torch.from_numpy(part)[1:]
    del array
    other = memory.take(4, 2)
    other[:] = 2
    del part
    memory.take(4, 2)[:] = 3
    assert (tensor == 1).all()
    del tensor
    assert memory.take(4, 2).__array_interface__["data"] == place


def test_batches_that_are_held_stay_as_they_were(shards: str) -> None:
    """All of an epoch and of a pass are held at once, and are those that were looked at one by one."""
    for held, single in (
        (
            [step[0] for step in islice(stream(shards, micro_batch_size=GLOBAL).batches(), 12)],
            (step[0] for step in stream(shards, micro_batch_size=GLOBAL, num_workers=0).batches()),
        ),
        (list(stream(shards).one_pass(3)), stream(shards).one_pass(3)),
    ):
        for one in held:
            assert torch.equal(one.inputs, next(single).inputs)


# --- faults ---


READ_FAULTS = (Fault.ERROR, Fault.SLOW_DOWN, Fault.RESET, Fault.TRUNCATED, Fault.HALTED)


def test_an_epoch_from_a_bad_service_is_the_very_epoch(
    bucket: str, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten fails, each in one of five ways."""
    shards = tiny_shards(tmp_path / "tiny", [80, 60, 60])
    storage.upload_folder(tmp_path / "tiny", f"{bucket}/tiny")
    monkeypatch.setattr(plan, "MAX_WINDOW", 2)  # many requests
    steps = 50  # four samples each: an epoch
    common = {"global_batch_size": 4, "num_workers": 2}
    straight = global_batches(shards, steps, 2, **common)
    assert len({key for batch in straight for key in batch["keys"]}) == 200
    draws, kinds = random.Random(0), itertools.cycle(READ_FAULTS)
    with fault_proxy(s3) as proxy:
        proxy.decide = lambda method, path: next(kinds) if draws.random() < 0.1 else None
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 0.5)
        storage.forget_clients()
        before = counters.counted()
        assert_same(global_batches(f"{bucket}/tiny", steps, 2, **common), straight)
        # A request of a window beyond the epoch may still be under way; it counts its retries when it ends.
        for _ in range(200):
            retries = (counters.counted() - before)["storage_read_retries"]
            if retries == sum(proxy.faults.values()):
                break
            time.sleep(0.05)
    assert proxy.faults.keys() == set(READ_FAULTS)
    assert retries == sum(proxy.faults.values())


def test_what_was_damaged_on_the_way_is_read_again(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = global_batches(shards, 3, 1)
    read_bytes = storage.read_bytes
    damaged: list[str] = []

    def damage_first(uri: str, start: int = 0, length: int | None = None) -> bytes:
        data = read_bytes(uri, start, length)
        if not uri.endswith(".tar") or damaged:
            return data
        damaged.append(uri)
        return data[:600] + bytes([data[600] ^ 1]) + data[601:]

    monkeypatch.setattr(storage, "read_bytes", damage_first)
    before = counters.counted()
    assert_same(global_batches(shards, 3, 1), straight)
    assert damaged
    assert counters.counted() - before == {"storage_read_retries": 1}


@pytest.fixture
def own_shards(small_source: Path, tmp_path: Path) -> str:
    return write_small_shards(small_source, str(tmp_path / "shards"))


def damage(shards: str, key_number: int, offset_in_sample: int) -> tuple[str, str]:
    """Flip a byte of one training sample; returns the names of its shard and of the sample."""
    shard = Manifest.load(shards).split("train")[0]
    entry = read_index(shards, shard)[key_number]
    path = Path(shards) / shard.name
    data = bytearray(path.read_bytes())
    data[entry.offset + offset_in_sample] ^= 0xFF
    path.write_bytes(data)
    return shard.name, entry.key


@pytest.mark.parametrize("offset", [0, 600, 1000])
def test_a_damaged_shard_is_an_error_that_names_shard_and_sample(own_shards: str, offset: int) -> None:
    shard, key = damage(own_shards, 2, offset)
    found = hashlib.sha256((Path(own_shards) / shard).read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf"{shard} is damaged at sample '{key}': .*SHA-256 {found}, the manifest says"):
        list(islice(stream(own_shards).batches(), 4))


def test_a_shard_that_is_missing_or_cut_off_is_named_at_the_start(own_shards: str) -> None:
    """Not when training comes to it: the last shard of the split."""
    path = Path(own_shards) / Manifest.load(own_shards).split("train")[-1].name
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=rf"{path.name} has 2000 bytes, the manifest says"):
        stream(own_shards)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        stream(own_shards)


def test_a_damaged_index_is_an_error_that_names_it(own_shards: str) -> None:
    shard = Manifest.load(own_shards).split("train")[0]
    path = Path(own_shards) / shard.index_name
    path.write_bytes(path.read_bytes().replace(b"0", b"1", 1))
    with pytest.raises(UserError, match=rf"{path.name} is damaged: SHA-256 .*, the manifest says {shard.index_sha256}"):
        list(islice(stream(own_shards).batches(), 4))


def test_a_sample_that_cannot_be_decoded_is_replaced_alike_everywhere(tmp_path: Path) -> None:
    """Shards may hold what this machine's decoder refuses; the place is filled the same way on any rank."""
    shards = shards_with_an_undecodable_sample(tmp_path)
    straight = stream(shards, num_workers=0, micro_batch_size=GLOBAL)
    before = counters.counted()
    batches = [joined(step) for step in islice(straight.batches(), 3)]
    assert straight.replaced == 3  # once an epoch; three steps of eight are three epochs of eight
    assert counters.counted() - before == {"replaced_samples": 3}
    assert all("bad" not in batch["keys"] for batch in batches)
    assert_same(batches, global_batches(shards, 3, 4, num_workers=2))


def shards_with_an_undecodable_sample(tmp_path: Path) -> str:
    """Eight samples in one valid shard whose second image is no image, as a foreign writer might leave it."""
    source, out = tmp_path / "source", tmp_path / "shards"
    (source / "images").mkdir(parents=True)
    names = ["bad" if i == 1 else f"ok{i}" for i in range(8)]
    for i, name in enumerate(names):
        Image.new("RGB", (16, 16), (i * 30, 0, 0)).save(source / "images" / f"{name}.png")
    (source / "prompt-gt.csv").write_text("Filename;Prompt\n" + "".join(f"{name}.png;x\n" for name in names))
    split = Settings(name="s", splits={"train": 1})
    write_shards(medvqa_records(str(source)), str(out), split, source={"uri": "x"})
    manifest = Manifest.load(str(out))
    (shard,) = manifest.shards
    data = bytearray((out / shard.name).read_bytes())
    (entry,) = (entry for entry in read_index(str(out), shard) if entry.key == "bad")
    with tarfile.open(fileobj=io.BytesIO(bytes(data[entry.offset : entry.offset + entry.length]))) as tar:
        member = tar.getmember("bad.png")
    at = entry.offset + member.offset_data
    data[at : at + member.size] = bytes(member.size)
    (out / shard.name).write_bytes(data)
    # The index and the manifest of such a writer describe its own bytes.
    crc32 = zlib.crc32(data[entry.offset : entry.offset + entry.length])
    samples = tuple(e._replace(crc32=crc32) if e == entry else e for e in read_index(str(out), shard))
    index = ShardIndex(made_of="", num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), samples=samples)
    described = index.save(str(out), name=shard.name, split=shard.split)
    manifest.model_copy(update={"shards": (described,)}).save(str(out))
    return str(out)


def test_what_does_not_fit_is_refused_with_the_numbers(shards: str) -> None:
    with pytest.raises(UserError, match="global_batch_size 8 is not a multiple of micro_batch_size 3"):
        stream(shards, micro_batch_size=3, world_size=2)
    with pytest.raises(UserError, match="did you mean 'train'"):
        stream(shards, split="trian")


def test_a_manifest_of_another_kind_is_explained(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(
        UserError, match=r"manifest.json is damaged or of another version.*remove it and write the shards again"
    ):
        Manifest.load(str(tmp_path))


def test_derived_seeds_are_spread_and_unrelated() -> None:
    seeds = [derive_seed("noise", i) for i in range(1000)]
    assert len(set(seeds)) == 1000
    halves = torch.tensor([seed >> 62 for seed in seeds], dtype=torch.float64)
    spread: Tensor = halves.mean()
    assert 0.4 < float(spread) < 0.6
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(1, 23) != derive_seed(12, 3)
