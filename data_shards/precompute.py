"""What frozen encoders would compute again at each step, computed once: latent moments and prompt embeddings.

    shards of images -> one shard of moments each, same samples, same order
    distinct captions -> files of prompt embeddings
    -> prompts.json -> manifest.json

The set is again plain WebDataset shards with a manifest, and follows from its arguments alone. Beside each finished
file stands a note of what it was made of, so that what is there already is not encoded again; the manifest comes last.
"""

import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from cluster import storage
from cluster.documents import parsing, read_json
from cluster.errors import UserError
from cluster.progress import OnProgress
from data_shards.decode import ImageError, decode
from data_shards.manifest import MANIFEST, Manifest, Precomputed, ShardEntry, index_name
from data_shards.parallel import is_connected, names_cluster, on_named_cluster
from data_shards.prompts import (
    AGAIN,
    EMPTY_PROMPT,
    FORMAT_VERSION,
    INDEX,
    Embeddings,
    PromptFile,
    PromptIndex,
    write_prompts,
)
from data_shards.reader import Encoded, ShardReader, encoded_image
from data_shards.sample import ABOUT_MEMBER, MIRRORED_MOMENTS_MEMBER, MOMENTS_MEMBER
from data_shards.stream import prefetched
from data_shards.writer import digest_of, write_tar

logger = logging.getLogger(__name__)

PROMPTS_PER_FILE = 64  # 256 MiB at FLUX's 512 tokens of 4096: little to encode again after a crash, few objects
DECODING_THREADS = 4
BATCHES_AHEAD = 2
# Names that files of a set have, also those half written by a killed process.
OURS = re.compile(r"\.?(prompts-\d{6}\.safetensors|[^/]+-\d{6}\.tar|prompts\.json|manifest\.json)(\.|$)")

EncodeImages = Callable[[Tensor], Tensor]
EncodePrompts = Callable[[Sequence[str]], Embeddings]


class Encoders(Protocol):
    """A model's frozen encoders, by names: none is opened before it is asked for. Travels to processes that encode."""

    @property
    def origin(self) -> dict[str, str]:
        """Where they are from, for whoever reads the set's manifest."""
        ...

    @property
    def max_tokens(self) -> int:
        """Of a prompt."""
        ...

    @property
    def components(self) -> Mapping[str, str]:
        """What they are made of, as a person would call it, by names in the diffusers layout; `vae` is one."""
        ...

    def digest(self, component: str) -> str:
        """Of all that the component's outputs follow from. Raises UserError if it is not there."""
        ...

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text as a whole, however many of them the text encoder reads."""
        ...

    def text_dtype(self, device: str) -> str:
        """What the text encoders compute in on a device."""
        ...

    def image_encoder(self, device: str) -> Callable[[Tensor], Tensor]:
        """A function from images [B, 3, H, W] to moments [B, 2C, h, w]. Raises UserError if the VAE cannot be opened.

        In float32 on any device: it is small and runs once, and its rounding would stay in the set. Stored so too:
        512 KiB an image at 512 x 512, which is little beside the 4 MiB of FLUX's prompts.
        """
        ...

    def prompt_encoder(self, device: str) -> Callable[[Sequence[str]], Embeddings]:
        """A function from B prompts to their embeddings. Raises UserError if the encoders cannot be opened."""
        ...


@dataclass(frozen=True)
class Job:
    shards: str
    out: str
    encoders: Encoders
    settings: Precomputed
    device: str
    batch_size: int
    most_workers: int | None


@dataclass(frozen=True)
class Task:
    """A file to be made of a shard of images, or of prompts."""

    name: str
    made_of: str
    """Digest of all that the file follows from."""
    content: Any


class EncodedShard(BaseModel):
    """A finished shard of moments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: ShardEntry
    captions: tuple[str, ...]
    """Its distinct captions."""
    undecodable: tuple[str, ...]
    """Keys of the samples whose images could not be decoded; they have no moments."""


P = TypeVar("P", EncodedShard, PromptFile)


def precompute(
    shards: str,
    out: str,
    *,
    encoders: Encoders,
    resolution: int,
    horizontal_flip: bool,
    extra_prompts: Sequence[str] = (),
    device: str | None = None,
    batch_size: int = 8,
    most_workers: int | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    on_encoded: Callable[[int, float], None] = lambda images, seconds: None,
) -> Manifest:
    """Encode all images of `shards`, their distinct captions, the empty prompt and `extra_prompts`; write to `out`.

    `device` is "cuda" where there is one, else "cpu". Where RAY_ADDRESS names a cluster, its GPUs (or CPUs) each encode
    whole files: the set is the same. A cluster that grows is asked for `most_workers` of them, or without a number for
    one a file. `on_encoded` is told how many images this call encoded, and in how many seconds. A second call with the
    same arguments encodes nothing; one after a killed call goes on where that was. What other arguments leave as it is
    (all images, where only a prompt is new) is kept. Raises UserError if `out` holds something else.
    """
    source = _images(shards)
    if storage.absolute(out) == storage.absolute(shards):
        raise UserError(f"the precomputed set cannot take the place of its own shards {shards}: name another folder")
    storage.check_writable(out)
    with on_named_cluster():
        device = device or _best_device()
        settings = _settings(source, encoders, resolution, horizontal_flip, device)
        if existing := _finished(out, settings, encoders, extra_prompts):
            _tell_of_cut(PromptIndex.load(out), encoders.max_tokens)
            return existing
        _unpublish(out)
        job = Job(storage.absolute(shards), storage.absolute(out), encoders, settings, device, batch_size, most_workers)
        encoded = _encode_shards(job, source, on_progress, on_encoded)
        # Extra prompts come last: others make another last file, and leave those before it.
        captions = list(dict.fromkeys(caption for piece in encoded for caption in piece.captions))
        num_cut = sum(count > encoders.max_tokens for count in encoders.num_tokens(captions))
        prompts = list(dict.fromkeys([EMPTY_PROMPT, *captions, *extra_prompts]))
        files = _encode_prompts(job, prompts, on_progress)
    _tidy(out, [piece.shard.name for piece in encoded], [file.name for file in files])
    index = PromptIndex(files=tuple(files), num_captions=len(captions), num_cut=num_cut)
    index.save(out)
    _tell_of_cut(index, encoders.max_tokens)
    undecodable = sum(len(piece.undecodable) for piece in encoded)
    manifest = Manifest(
        name=source.name,
        source={"format": "precomputed", "uri": shards, **encoders.origin},
        split_rule=source.split_rule,
        groups=source.groups,
        captions=source.captions,
        licences=source.licences,
        quarantined={"undecodable": undecodable} if undecodable else {},
        conversions={},
        shards=tuple(piece.shard for piece in encoded),
        precomputed=settings,
    )
    manifest.save(out)
    return manifest


def check_precomputed(
    out: str,
    *,
    shards: str,
    encoders: Encoders,
    resolution: int,
    horizontal_flip: bool,
    prompts: Sequence[str] = (),
) -> Manifest:
    """The manifest of the precomputed set at `out`.

    Raises UserError if there is none, or if it is stale: the message names the part that changed.
    """
    known = _existing(out)
    if known is None or known.precomputed is None:
        raise UserError(f"no precomputed set at {out}: write it with medsynth shards precompute RECIPE")
    settings = _settings(_images(shards), encoders, resolution, horizontal_flip, "cpu")
    index = PromptIndex.load(out)
    for difference in _differences(known.precomputed, settings, encoders.components, index, prompts):
        raise UserError(f"precomputed set {out} is stale: {difference}; {AGAIN}")
    _tell_of_cut(index, encoders.max_tokens)
    return known


def _tell_of_cut(index: PromptIndex, max_tokens: int) -> None:
    if index.num_cut:
        logger.warning(
            "%d of %d captions are cut at %d tokens, and the model does not read the rest: raise max_tokens, as far as "
            "the text encoder goes, or shorten the captions",
            *(index.num_cut, index.num_captions, max_tokens),
        )


# --- what a set is made of ---


def _images(shards: str) -> Manifest:
    source = Manifest.load(shards)
    if source.precomputed is not None:
        raise UserError(f"{shards} is a precomputed set itself: name the shards of images that it was made of")
    return source


def _settings(source: Manifest, encoders: Encoders, resolution: int, horizontal_flip: bool, device: str) -> Precomputed:
    return Precomputed(
        source_digest=source.digest,
        components={name: encoders.digest(name) for name in encoders.components},
        resolution=resolution,
        max_tokens=encoders.max_tokens,
        horizontal_flip=horizontal_flip,
        dtypes={"moments": "float32", "prompt_embeds": "bfloat16", "text_encoders": encoders.text_dtype(device)},
    )


def _differences(
    then: Precomputed, now: Precomputed, words: Mapping[str, str], index: PromptIndex, prompts: Iterable[str]
) -> Iterator[str]:
    """What of `now` the set made of `then` does not serve. Mirror images that are not asked for do no harm."""
    digests = {"source": ("the source shards", then.source_digest, now.source_digest)}
    for name, word in words.items():
        digests[name] = (f"{word} ({name})", then.components.get(name, "none"), now.components[name])
    for what, digest_then, digest_now in digests.values():
        if digest_then != digest_now:
            yield f"{what} changed (digest {digest_then[:12]} then, {digest_now[:12]} now)"
    if then.resolution != now.resolution:
        yield f"resolution was {then.resolution} then, is {now.resolution} now"
    if then.max_tokens != now.max_tokens:
        yield f"max_tokens was {then.max_tokens} then, is {now.max_tokens} now"
    if now.horizontal_flip and not then.horizontal_flip:
        yield "horizontal_flip was off then, is on now"
    for prompt in prompts:
        if prompt not in index.places:
            yield f"the prompt '{prompt}' is not in it"


def _existing(out: str) -> Manifest | None:
    return Manifest.load(out) if storage.exists(storage.join(out, MANIFEST)) else None


def _finished(out: str, settings: Precomputed, encoders: Encoders, prompts: Sequence[str]) -> Manifest | None:
    """The set at `out` if it is whole and serves."""
    existing = _existing(out)
    if existing is None:
        return None
    if existing.precomputed is None:
        raise UserError(f"{out} holds shards of images: name another folder for the precomputed set")
    found = set(storage.list_files(out))
    if INDEX not in found:
        return None
    try:
        index = PromptIndex.load(out)
    except UserError as error:
        if storage.is_outage(error):
            raise
        return None  # of another version, which what is made now takes the place of
    names = {shard.name for shard in existing.shards} | {file.name for file in index.files}
    serves = not any(_differences(existing.precomputed, settings, encoders.components, index, prompts))
    return existing if serves and names <= found else None


def _unpublish(out: str) -> None:
    """Take away what would describe a set whose files are about to change."""
    for name in (MANIFEST, INDEX):
        if storage.exists(storage.join(out, name)):
            storage.delete(storage.join(out, name))


# --- pieces, each made once ---


def _note(name: str) -> str:
    return f"{name}.json"


def _noted(out: str, name: str, made_of: str, kind: type[P]) -> P | None:
    """What the note beside a finished file says, if the file was made of the same."""
    note_uri = storage.join(out, _note(name))
    try:
        note = read_json(note_uri)
        storage.size(storage.join(out, name))
    except storage.NotFoundError:
        return None
    with parsing(f"{note_uri} (remove it to have {name} written again)"):
        return kind.model_validate(note["piece"]) if note["made_of"] == made_of else None


def _make(out: str, name: str, made_of: str, make: Callable[[], P]) -> P:
    """Write a file and then the note beside it, so that a note never speaks of another file than is there."""
    note = storage.join(out, _note(name))
    if storage.exists(note):
        storage.delete(note)
    piece = make()
    storage.write_bytes(note, json.dumps({"made_of": made_of, "piece": piece.model_dump()}).encode())
    return piece


def _tidy(out: str, shards: Sequence[str], prompt_files: Sequence[str]) -> None:
    """Remove what other arguments and killed processes left behind."""
    wanted = [*shards, *prompt_files]
    kept = {*wanted, *map(_note, wanted), *map(index_name, shards)}
    for name in storage.list_files(out):
        if OURS.match(name) and name not in kept:
            storage.delete(storage.join(out, name))


def _best_device() -> str:
    """cuda where there is a GPU: on the cluster, if there is one, for what starts the work may be a machine without."""
    if names_cluster():
        from cluster.runtime import total

        return "cuda" if total("GPU") else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _notes(job: Job, kind: type[P], tasks: Sequence[Task]) -> dict[str, P | None]:
    """What the notes say of the files that are there already."""
    return {task.name: _noted(job.out, task.name, task.made_of, kind) for task in tasks}


def _pieces(
    job: Job, tasks: Sequence[Task], notes: Mapping[str, P | None], make_encoder: Callable[[Job], Callable[[Task], P]]
) -> Iterator[P]:
    """What describes each task's file, in order: its note, or else what an encoder that makes the file returns."""
    made = _made(job, [task for task in tasks if notes[task.name] is None], make_encoder)
    for task in tasks:
        yield notes[task.name] or next(made)


def _made(job: Job, tasks: Sequence[Task], make_encoder: Callable[[Job], Callable[[Task], P]]) -> Iterator[P]:
    if not tasks:
        return
    # A process of Ray's own takes the GPUs while it encodes, and gives them back: this one would keep its part of one.
    if not names_cluster() and not (job.device == "cuda" and is_connected()):
        yield from map(make_encoder(job), tasks)
        return
    from cluster.runtime import grows, map_actors, total

    resource = "CPU" if job.device == "cpu" else "GPU"
    num_actors = (job.most_workers or len(tasks)) if grows() else max(1, total(resource))
    gpus = 0 if job.device == "cpu" else 1
    yield from map_actors(partial(make_encoder, job), tasks, num_actors=num_actors, gpus_per_actor=gpus)


# --- images ---


def _encode_shards(
    job: Job, source: Manifest, on_progress: OnProgress, on_encoded: Callable[[int, float], None]
) -> list[EncodedShard]:
    """One shard of moments for each shard of images."""
    settings = job.settings
    how = (settings.components["vae"], settings.resolution, settings.horizontal_flip)
    tasks = [Task(shard.name, digest_of(shard.sha256, *how), shard) for shard in source.shards]
    notes = _notes(job, EncodedShard, tasks)
    done, total = 0, sum(shard.num_samples for shard in source.shards)
    pieces: list[EncodedShard] = []
    started = time.monotonic()
    for shard, piece in zip(source.shards, _pieces(job, tasks, notes, _image_encoder), strict=True):
        pieces.append(piece)
        done += shard.num_samples
        on_progress("encoding images", done, total)
    num_encoded = sum(shard.num_samples for shard in source.shards if notes[shard.name] is None)
    on_encoded(num_encoded, time.monotonic() - started)
    return pieces


def _image_encoder(job: Job) -> Callable[[Task], EncodedShard]:
    encode = job.encoders.image_encoder(job.device)
    return lambda task: _make(job.out, task.name, task.made_of, partial(_encode_shard, job, encode, task))


def _encode_shard(job: Job, encode: EncodeImages, task: Task) -> EncodedShard:
    shard: ShardEntry = task.content
    captions: dict[str, None] = {}
    undecodable: list[str] = []

    def samples() -> Iterator[dict[str, str | bytes]]:
        for sample, moments in _with_moments(job, encode, shard):
            captions.update(dict.fromkeys(sample.captions))
            if not moments:
                undecodable.append(sample.key)
            yield {"__key__": sample.key, ABOUT_MEMBER: bytes(sample.members[ABOUT_MEMBER]), **moments}

    entry = write_tar(samples(), job.out, name=shard.name, split=shard.split, made_of=task.made_of)
    return EncodedShard(shard=entry, captions=tuple(captions), undecodable=tuple(undecodable))


def _with_moments(job: Job, encode: EncodeImages, shard: ShardEntry) -> Iterator[tuple[Encoded, dict[str, bytes]]]:
    """Each sample with its members of moments; one whose image cannot be decoded has none, and keeps its place."""
    for samples, images in prefetched(_decoded(job, shard), BATCHES_AHEAD):
        decodable = [image for image in images if image is not None]
        members: Iterator[dict[str, bytes]] = iter(_moments(encode, torch.stack(decodable), job) if decodable else [])
        for sample, image in zip(samples, images, strict=True):
            yield sample, {} if image is None else next(members)


def _decoded(job: Job, shard: ShardEntry) -> Iterator[tuple[list[Encoded], list[Tensor | None]]]:
    def decoded(sample: Encoded) -> Tensor | None:
        try:
            return decode(encoded_image(sample), job.settings.resolution)
        except ImageError as error:
            logger.warning("sample %s of %s has no moments: %s", sample.key, job.shards, error)
            return None

    reader = ShardReader(job.shards)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for start in range(0, shard.num_samples, job.batch_size):
            samples = reader.read(shard, start, start + job.batch_size)
            yield samples, list(pool.map(decoded, samples))


@torch.inference_mode()
def _moments(encode: EncodeImages, images: Tensor, job: Job) -> list[dict[str, bytes]]:
    """The members of moments of each of `images` [B, 3, H, W]."""
    images = images.to(job.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else it rounds what convolutions read to 10 bits
        variants = {MOMENTS_MEMBER: [_npy(moments) for moments in encode(images)]}
        if job.settings.horizontal_flip:
            variants[MIRRORED_MOMENTS_MEMBER] = [_npy(moments) for moments in encode(images.flip(-1))]
    return [dict(zip(variants, values, strict=True)) for values in zip(*variants.values(), strict=True)]


def _npy(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, tensor.float().cpu().numpy(), allow_pickle=False)
    return file.getvalue()


# --- prompts ---


def _encode_prompts(job: Job, prompts: Sequence[str], on_progress: OnProgress) -> list[PromptFile]:
    settings = job.settings
    text_parts = {name: digest for name, digest in settings.components.items() if name != "vae"}
    tasks = []
    for number, start in enumerate(range(0, len(prompts), PROMPTS_PER_FILE)):
        some = prompts[start : start + PROMPTS_PER_FILE]
        made_of = digest_of(some, text_parts, settings.max_tokens, settings.dtypes, FORMAT_VERSION)
        tasks.append(Task(f"prompts-{number:06d}.safetensors", made_of, some))
    files: list[PromptFile] = []
    for file in _pieces(job, tasks, _notes(job, PromptFile, tasks), _prompt_encoder):
        files.append(file)
        on_progress("encoding prompts", min(len(files) * PROMPTS_PER_FILE, len(prompts)), len(prompts))
    return files


def _prompt_encoder(job: Job) -> Callable[[Task], PromptFile]:
    encode = job.encoders.prompt_encoder(job.device)
    return lambda task: _make(
        job.out, task.name, task.made_of, partial(_encode_file, job, encode, task.name, task.content)
    )


@torch.inference_mode()
def _encode_file(job: Job, encode: EncodePrompts, name: str, prompts: Sequence[str]) -> PromptFile:
    batches = [encode(prompts[start : start + job.batch_size]) for start in range(0, len(prompts), job.batch_size)]
    embeddings = {part: torch.cat([batch[part] for batch in batches]) for part in batches[0]}
    return write_prompts(job.out, name, prompts, embeddings)
