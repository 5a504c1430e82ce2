"""Precomputed sets: what frozen encoders say, in the very order of training from pixels; stale ones are refused."""

import json
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import webdataset
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from cluster import storage
from cluster.errors import UserError
from data_shards import Manifest, PromptStore, Settings, ShardStream, check_precomputed, write_shards
from data_shards.block_cache import BlockCache
from data_shards.manifest import read_index
from data_shards.precompute import precompute
from data_shards.prompts import PromptIndex
from data_shards.reader import ShardReader
from data_shards.sources import medvqa_records
from tests.conftest import DATA, PREVIEW_PROMPTS
from tests.data_shards.test_stream import global_batches, joined, shards_with_an_undecodable_sample
from trainers.flux.encoders import FluxEncoders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def vae(flux_folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(flux_folder, subfolder="vae").eval()


@pytest.fixture
def arguments(shards: str, flux_folder: Path) -> dict[str, Any]:
    """What the fixture `precomputed` was made of."""
    return {
        "shards": shards,
        "encoders": FluxEncoders(str(flux_folder), max_tokens=16),
        "resolution": 32,
        "horizontal_flip": True,
    }


def run(arguments: dict[str, Any], out: str, **changes: Any) -> Manifest:
    defaults: dict[str, Any] = {"batch_size": 4, "extra_prompts": PREVIEW_PROMPTS}
    return precompute(**defaults | arguments | {"out": out} | changes)


def encoders_of(folder: Path | str) -> FluxEncoders:
    return FluxEncoders(str(folder), max_tokens=16)


def content(folder: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.list_files(folder)}


def moments_of(vae: AutoencoderKL, images: Tensor) -> Tensor:
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


def distinct_captions(shards: str) -> set[str]:
    manifest = Manifest.load(shards)
    return {c for shard in manifest.shards for sample in ShardReader(shards).read(shard) for c in sample.captions}


# --- the same training as from pixels ---


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_sees_what_it_would_see_from_pixels(
    shards: str, precomputed: str, vae: AutoencoderKL, world_size: int
) -> None:
    """Over two epochs and more: samples, captions, seeds and mirroring, and the moments of those very images."""
    settings = {"resolution": 32, "horizontal_flip": True, "micro_batch_size": 2}
    from_pixels = global_batches(shards, 5, world_size, **settings)
    from_cache = global_batches(precomputed, 5, world_size, **settings)
    for pixels, cached in zip(from_pixels, from_cache, strict=True):
        assert cached["inputs"].shape == (8, 32, 4, 4)
        torch.testing.assert_close(cached.pop("inputs"), moments_of(vae, pixels.pop("inputs")), rtol=1e-4, atol=1e-4)
        assert cached == pixels
    assert {f for batch in from_cache for f in batch["flipped"]} == {True, False}


def test_resuming_and_one_pass_are_those_of_pixels(shards: str, precomputed: str, vae: AutoencoderKL) -> None:
    def seen(uri: str) -> tuple[dict[str, Any], dict[str, Any]]:
        stream = ShardStream(
            uri,
            split="train",
            resolution=32,
            global_batch_size=4,
            micro_batch_size=2,
            seed=1,
            rank=0,
            world_size=1,
            horizontal_flip=True,
        )
        return joined(next(stream.batches(start_step=7))), joined(list(stream.one_pass(3)))

    for pixels, cached in zip(seen(shards), seen(precomputed), strict=True):
        torch.testing.assert_close(cached.pop("inputs"), moments_of(vae, pixels.pop("inputs")), rtol=1e-4, atol=1e-4)
        assert cached == pixels


def test_an_undecodable_image_is_replaced_as_it_is_from_pixels(arguments: dict[str, Any], tmp_path: Path) -> None:
    shards = shards_with_an_undecodable_sample(tmp_path)
    manifest = run(arguments, str(tmp_path / "out"), shards=shards)
    assert manifest.quarantined == {"undecodable": 1}
    from_pixels = global_batches(shards, 3, 2, resolution=32)
    for pixels, cached in zip(from_pixels, global_batches(str(tmp_path / "out"), 3, 2, resolution=32), strict=True):
        del pixels["inputs"], cached["inputs"]
        assert "bad" not in cached["keys"]
        assert cached == pixels


def test_a_batch_says_which_kind_it_is(shards: str, precomputed: str) -> None:
    common: dict[str, Any] = {"split": "train", "resolution": 32, "seed": 0, "rank": 0, "world_size": 1}
    common |= {"global_batch_size": 2, "micro_batch_size": 2}
    ((images,),) = islice(ShardStream(shards, **common).batches(), 1)
    ((moments,),) = islice(ShardStream(precomputed, **common).batches(), 1)
    assert images.images.shape == (2, 3, 32, 32)
    assert moments.moments.shape == (2, 32, 4, 4)
    with pytest.raises(AssertionError, match="precompute them"):
        _ = images.moments
    with pytest.raises(AssertionError, match="holds no images"):
        _ = moments.images


def test_a_stream_of_another_resolution_or_without_its_flips_is_refused(
    precomputed: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="precomputed at resolution 32, not 16"):
        global_batches(precomputed, 1, 1, resolution=16)
    out = str(tmp_path / "out")
    run(arguments, out, horizontal_flip=False)
    with pytest.raises(UserError, match="without mirror images"):
        global_batches(out, 1, 1, resolution=32, horizontal_flip=True)


def test_damage_is_found_and_named(precomputed: str, tmp_path: Path) -> None:
    out = shutil.copytree(precomputed, tmp_path / "out")
    shard = Manifest.load(str(out)).split("train")[0]
    data = bytearray((out / shard.name).read_bytes())
    damaged = read_index(str(out), shard)[1]
    data[damaged.offset + 700] ^= 1
    (out / shard.name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name} is damaged at sample '{damaged.key}'"):
        global_batches(str(out), 5, 1, resolution=32)


# --- what is stored ---


def test_any_webdataset_reader_opens_it(shards: str, precomputed: str, vae: AutoencoderKL) -> None:
    source, manifest = Manifest.load(shards), Manifest.load(precomputed)
    assert [shard.name for shard in manifest.shards] == [shard.name for shard in source.shards]
    for shard, its_source in zip(manifest.shards, source.shards, strict=True):
        dataset = webdataset.WebDataset(f"{precomputed}/{shard.name}", shardshuffle=False).decode()
        originals = webdataset.WebDataset(f"{shards}/{shard.name}", shardshuffle=False).decode("torchrgb")
        samples = list(dataset)
        assert [sample["__key__"] for sample in samples] == [entry.key for entry in read_index(shards, its_source)]
        for sample, original in zip(samples, originals, strict=True):
            assert sample["json"] == original["json"]
            image = original["jpg" if "jpg" in original else "png"] * 2 - 1
            for member, variant in (("moments.npy", image), ("mirrored.npy", image.flip(-1))):
                found = torch.from_numpy(sample[member])
                assert found.dtype == torch.float32
                torch.testing.assert_close(found, moments_of(vae, variant[None])[0], rtol=1e-4, atol=1e-4)


def test_prompts_are_encoded_as_flux_pipeline_encodes_them(shards: str, precomputed: str, flux_folder: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(flux_folder, transformer=None, vae=None)
    prompts = ["", *sorted(distinct_captions(shards))[:6], *PREVIEW_PROMPTS]
    embeddings = PromptStore(precomputed, max_bytes=0).get(prompts)
    prompt_embeds, pooled = embeddings["prompt_embeds"], embeddings["pooled_prompt_embeds"]
    assert prompt_embeds.shape == (10, 16, 64)
    assert prompt_embeds.dtype == pooled.dtype == torch.bfloat16
    with torch.no_grad():
        expected, expected_pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=16)
    ulp = 2**-8  # float32 values that differ in their last bits may round to neighbours in bfloat16
    torch.testing.assert_close(prompt_embeds.float(), expected, rtol=ulp, atol=1e-5)
    torch.testing.assert_close(pooled.float(), expected_pooled, rtol=ulp, atol=1e-5)
    assert len({embeds.float().numpy().tobytes() for embeds in prompt_embeds}) == len(prompts)


def test_each_distinct_prompt_is_stored_once(shards: str, precomputed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = PromptIndex.load(precomputed)
    stored = [entry.prompt for file in index.files for entry in file.prompts]
    assert len(stored) == len(set(stored))
    assert set(stored) == distinct_captions(shards) | {"", *PREVIEW_PROMPTS}
    assert 10 < len(stored) < sum(Manifest.load(shards).captions.values())
    for file in index.files:
        with safetensors.safe_open(f"{precomputed}/{file.name}", "pt") as tensors:
            assert json.loads(tensors.metadata()["prompts"]) == [entry.prompt for entry in file.prompts]
            by_name = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        found = PromptStore(precomputed, max_bytes=0).get([entry.prompt for entry in file.prompts])
        assert found.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
        assert len(by_name) == 2 * len(file.prompts)
        for number in range(len(file.prompts)):
            for name, values in found.items():
                assert torch.equal(by_name[f"{number:06d}.{name}"], values[number])


def test_prompts_are_read_once_each_as_far_as_memory_allows(precomputed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[str, int, int | None]] = []
    read_bytes = storage.read_bytes

    def counted(uri: str, start: int = 0, length: int | None = None) -> bytes:
        reads.append((uri, start, length))
        return read_bytes(uri, start, length)

    one_prompt = (16 * 64 + 64) * 2  # bytes
    store = PromptStore(precomputed, max_bytes=2 * one_prompt)
    monkeypatch.setattr(storage, "read_bytes", counted)
    first = store.get(["a polyp", "", "a polyp", "a small polyp"])
    assert [length for _, _, length in reads] == [one_prompt] * 3
    assert torch.equal(first["prompt_embeds"][0], first["prompt_embeds"][2])
    again = store.get(["a polyp", "", "a polyp", "a small polyp"])
    assert len(reads) == 4, "two are kept, the third is read again"
    assert all(torch.equal(values, again[name]) for name, values in first.items())


def test_a_prompt_that_is_missing_or_damaged_is_named(precomputed: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the prompt 'a unicorn' is not in .*precompute the set again"):
        PromptStore(precomputed, max_bytes=0).get(["a polyp", "a unicorn"])
    out = shutil.copytree(precomputed, tmp_path / "out")
    file, entry = PromptIndex.load(str(out)).places["a polyp"]
    data = bytearray((out / file.name).read_bytes())
    data[entry.offset + entry.length - 1] ^= 1
    (out / file.name).write_bytes(data)
    store = PromptStore(str(out), max_bytes=0)
    store.get(["a small polyp"])
    with pytest.raises(UserError, match=rf"{file.name} is damaged at the prompt 'a polyp'"):
        store.get(["a polyp"])


def test_prompts_that_memory_does_not_keep_are_kept_on_disk(
    precomputed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlockCache(tmp_path / "cache", 10**8)
    prompts = ["", "a polyp", "a small polyp"]
    expected = PromptStore(precomputed, max_bytes=0).get(prompts)

    def is_as_expected() -> bool:
        found = PromptStore(precomputed, max_bytes=0, cache=cache).get(prompts)
        return all(torch.equal(values, found[name]) for name, values in expected.items())

    assert is_as_expected()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", refuse_safetensors(storage.read_bytes))
        assert is_as_expected()
    # A block that has changed on disk is fetched again.
    [block] = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    block.write_bytes(bytes(block.stat().st_size))
    assert is_as_expected()


def refuse_safetensors(read_bytes: Any) -> Any:
    def read(uri: str, start: int = 0, length: int | None = None) -> Any:
        assert not uri.endswith(".safetensors"), "it is in the cache"
        return read_bytes(uri, start, length)

    return read


# --- stale sets ---


def test_a_set_that_fits_passes(precomputed: str, arguments: dict[str, Any]) -> None:
    manifest = check_precomputed(precomputed, **arguments, prompts=PREVIEW_PROMPTS)
    assert manifest == Manifest.load(precomputed)
    check_precomputed(precomputed, **arguments | {"horizontal_flip": False})  # mirror images do no harm


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("vae/config.json", r"the VAE \(vae\) changed \(digest [0-9a-f]{12} then, [0-9a-f]{12} now\)"),
        ("vae/diffusion_pytorch_model.safetensors", r"the VAE \(vae\) changed"),
        ("text_encoder/model.safetensors", r"the CLIP text encoder \(text_encoder\) changed"),
        ("tokenizer/tokenizer.json", r"the CLIP tokenizer \(tokenizer\) changed"),
        ("text_encoder_2/model.safetensors", r"the T5 text encoder \(text_encoder_2\) changed"),
        ("tokenizer_2/tokenizer_config.json", r"the T5 tokenizer \(tokenizer_2\) changed"),
    ],
)
def test_other_weights_are_refused_by_name(
    precomputed: str, arguments: dict[str, Any], flux_folder: Path, tmp_path: Path, changed: str, message: str
) -> None:
    folder = shutil.copytree(flux_folder, tmp_path / "model")
    with (folder / changed).open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match=rf"^precomputed set {precomputed} is stale: {message}.*; precompute the set"):
        check_precomputed(precomputed, **arguments | {"encoders": encoders_of(folder)})
    # What the set does not depend on may change.
    folder = shutil.copytree(flux_folder, tmp_path / "other-transformer")
    (folder / "transformer" / "config.json").write_text("{}")
    (folder / "vae" / "README.md").write_text("words")
    check_precomputed(precomputed, **arguments | {"encoders": encoders_of(folder)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 48}, "resolution was 32 then, is 48 now"),
        ({"encoders": FluxEncoders(str(DATA / "flux-tiny"), max_tokens=32)}, "max_tokens was 16 then, is 32 now"),
        ({"prompts": ["a polyp", "a unicorn"]}, "the prompt 'a unicorn' is not in it"),
    ],
)
def test_other_settings_are_refused_by_name(
    precomputed: str, arguments: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^precomputed set {precomputed} is stale: {message}; precompute the set"):
        check_precomputed(precomputed, **arguments | changes)


def test_other_shards_and_missing_flips_are_refused_by_name(
    precomputed: str, arguments: dict[str, Any], small_source: Path, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    settings = Settings(name="small", splits={"train": 1.0}, samples_per_shard=50, resize=32, seed=1)
    write_shards(medvqa_records(str(small_source)), other, settings, source={})
    with pytest.raises(UserError, match=r"the source shards changed \(digest"):
        check_precomputed(precomputed, **arguments | {"shards": other})
    unflipped = str(tmp_path / "unflipped")
    run(arguments, unflipped, horizontal_flip=False)
    with pytest.raises(UserError, match="horizontal_flip was off then, is on now"):
        check_precomputed(unflipped, **arguments)


def test_what_is_no_precomputed_set_is_told(shards: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    for place in (str(tmp_path / "nothing"), shards):
        with pytest.raises(UserError, match=r"no precomputed set at .*write it with medsynth shards precompute"):
            check_precomputed(place, **arguments)


def test_places_that_cannot_be_meant_are_refused(shards: str, precomputed: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="cannot take the place of its own shards"):
        run(arguments, shards)
    with pytest.raises(UserError, match="holds shards of images"):
        run(arguments, shards, shards=shutil.copytree(shards, "copy"))
    with pytest.raises(UserError, match="is a precomputed set itself"):
        run(arguments, "out", shards=precomputed)
    with pytest.raises(UserError, match="no vae: is it a model in the diffusers layout"):
        run(arguments, "out", encoders=encoders_of(shards))


# --- again, and after a crash ---


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(FluxEncoders, name, lambda *_: pytest.fail("encoders are not needed"))


def test_a_second_run_encodes_nothing_and_new_prompts_encode_only_prompts(
    precomputed: str, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(shutil.copytree(precomputed, tmp_path / "out"))
    before = content(out)
    with monkeypatch.context() as patch:
        forbid(patch, "image_encoder", "prompt_encoder")
        assert run(arguments, out) == Manifest.load(precomputed)
        assert run(arguments, out, horizontal_flip=False, extra_prompts=()) == Manifest.load(precomputed)
    assert content(out) == before
    with monkeypatch.context() as patch:
        forbid(patch, "image_encoder")
        run(arguments, out, extra_prompts=[*PREVIEW_PROMPTS, "a new prompt"])
    check_precomputed(out, **arguments, prompts=["a new prompt"])
    # A set follows from its arguments alone, not from what was there before.
    run(arguments, str(tmp_path / "fresh"), extra_prompts=[*PREVIEW_PROMPTS, "a new prompt"])
    assert content(out) == content(str(tmp_path / "fresh"))


def test_a_lost_file_is_made_again(precomputed: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    out = shutil.copytree(precomputed, tmp_path / "out")
    before = content(str(out))
    (out / "small-train-000001.tar").unlink()
    (out / "prompts-000000.safetensors").unlink()
    run(arguments, str(out))
    assert content(str(out)) == before


def test_other_settings_replace_what_they_change(precomputed: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    out, fresh = str(shutil.copytree(precomputed, tmp_path / "out")), str(tmp_path / "fresh")
    encoders = FluxEncoders(arguments["encoders"].pretrained, max_tokens=8)
    changes = {"resolution": 48, "encoders": encoders, "extra_prompts": ()}
    for place in (out, fresh):
        run(arguments, place, **changes)
    assert content(out) == content(fresh)


def test_captions_that_are_cut_are_counted_and_told_once(
    shards: str, arguments: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When they are encoded, when they are found encoded, and by whoever trains on them."""
    out, encoders = str(tmp_path / "out"), FluxEncoders(arguments["encoders"].pretrained, max_tokens=8)
    captions = {
        caption
        for shard in Manifest.load(shards).shards
        for sample in ShardReader(shards).read(shard)
        for caption in sample.captions
    }
    num_cut = sum(count > 8 for count in encoders.num_tokens(sorted(captions)))
    assert num_cut > 0
    for again in (False, False, True):
        caplog.clear()
        changed = arguments | {"encoders": encoders}
        if again:
            check_precomputed(out, **changed)
        else:
            run(changed, out)
        told = [message for message in caplog.messages if "captions" in message]
        assert len(told) == 1
        assert told[0].startswith(f"{num_cut} of {len(captions)} captions are cut at 8 tokens, and the model does not")


def test_captions_that_are_read_whole_are_not_mentioned(
    arguments: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoders = FluxEncoders(arguments["encoders"].pretrained, max_tokens=200)
    run(arguments | {"encoders": encoders, "horizontal_flip": False}, str(tmp_path / "out"))
    assert not caplog.messages


KILLED = """
import os, signal, sys
from pathlib import Path
from data_shards.precompute import precompute
from trainers.flux.encoders import FluxEncoders

replace = Path.replace

def killed(self, target):
    if Path(target).name == sys.argv[1]:
        os.truncate(self, self.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = killed
precompute(sys.argv[2], sys.argv[3], encoders=FluxEncoders(sys.argv[4], 16), resolution=32, horizontal_flip=True,
           extra_prompts=sys.argv[5:], batch_size=4)
"""


@pytest.mark.slow
def test_runs_killed_in_the_middle_of_a_file_are_completed_to_the_same_bytes(
    precomputed: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    finished = {"small-train-000002.tar": 2, "prompts-000000.safetensors": len(Manifest.load(precomputed).shards)}
    for name, num_shards in finished.items():
        command = [sys.executable, "-c", KILLED, name, arguments["shards"], out, arguments["encoders"].pretrained]
        ended = subprocess.run([*command, *PREVIEW_PROMPTS], cwd=ROOT, check=False)
        assert ended.returncode == -signal.SIGKILL
        names = storage.list_files(out)
        assert len([found for found in names if found.endswith(".tar")]) == num_shards
        assert name not in names
        assert any(found.startswith(f".{name}.") for found in names), "a half file, under no final name"
        assert "manifest.json" not in names
    encoded: list[int] = []
    run(arguments, out, on_progress=lambda what, done, total: encoded.append(done))
    assert content(out) == content(precomputed)


# --- object storage ---


@pytest.mark.slow
def test_from_and_to_object_storage(
    s3_shards: str, bucket: str, precomputed: str, arguments: dict[str, Any], flux_folder: Path
) -> None:
    model, out = f"{bucket}/flux", f"{bucket}/cache"
    storage.upload_folder(flux_folder, model)
    remote = run(arguments, out, shards=s3_shards, encoders=encoders_of(model))
    local = Manifest.load(precomputed)
    assert remote.digest == local.digest
    assert remote.precomputed == local.precomputed
    check_precomputed(out, **arguments | {"shards": s3_shards, "encoders": encoders_of(model)}, prompts=PREVIEW_PROMPTS)
    assert content(out).keys() == content(precomputed).keys()
    for ours, theirs in zip(
        global_batches(out, 2, 2, resolution=32), global_batches(precomputed, 2, 2, resolution=32), strict=True
    ):
        assert torch.equal(ours.pop("inputs"), theirs.pop("inputs"))
        assert ours == theirs
    ours, theirs = (PromptStore(place, 0).get(["", "a polyp"]) for place in (out, precomputed))
    assert all(torch.equal(values, theirs[name]) for name, values in ours.items())


def test_opening_shards_loads_no_models_library() -> None:
    """`medsynth --help` and training from pixels do not wait for diffusers and transformers."""
    code = "import sys, data_shards; assert not {'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
