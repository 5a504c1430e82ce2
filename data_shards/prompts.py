"""Prompt embeddings: stored once for each distinct prompt, and fetched one prompt at a time.

`prompts-000000.safetensors`, ... hold, for each prompt, all that its text encoders say of it, side by side: FLUX's
prompt_embeds and pooled_prompt_embeds, MSDM's prompt_embeds and prompt_mask. `prompts.json` says where each prompt's
bytes are.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Final, Literal, NamedTuple, Self

import safetensors.torch
import torch
from isal.isal_zlib import crc32
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from cluster import storage
from cluster.documents import read_small
from cluster.errors import UserError
from data_shards.block_cache import BlockCache
from data_shards.manifest import MAX_BYTES, FileName, Sha256
from data_shards.reader import read_checked

EMPTY_PROMPT = ""
INDEX = "prompts.json"
FORMAT_VERSION: Final = 2
AGAIN = "precompute the set again (FLUX: medsynth shards precompute RECIPE; MSDM: start the training again)"
FETCH_THREADS = 16  # a prompt is one request, and a batch may ask for as many as it has samples

Embeddings = Mapping[str, Tensor]
"""By name, bfloat16: of one prompt, or of B of them with that dimension first."""


class PromptEntry(NamedTuple):
    """Where a prompt's embeddings are in their file."""

    prompt: str
    offset: int
    length: int
    crc32: int


class PromptFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FileName
    num_bytes: int
    sha256: Sha256
    shapes: dict[str, tuple[Annotated[int, Field(gt=0)], ...]] = Field(min_length=1)
    """Of a prompt's embeddings, in the order in which they lie side by side."""
    prompts: tuple[PromptEntry, ...]

    @model_validator(mode="after")
    def _prompts_lie_within(self) -> Self:
        num_bytes = sum(map(math.prod, self.shapes.values())) * torch.bfloat16.itemsize
        for entry in self.prompts:
            if entry.length != num_bytes or not 0 <= entry.offset <= self.num_bytes - num_bytes:
                raise ValueError(f"the embeddings of '{entry.prompt}' lie outside their file")
        return self


class PromptIndex(BaseModel):
    """Written when all of its files are there."""

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    format_version: Literal[2] = FORMAT_VERSION
    files: tuple[PromptFile, ...]
    num_captions: int = 0
    """Distinct ones."""
    num_cut: int = 0
    """Of them, those with more tokens than the text encoder reads."""

    @model_validator(mode="after")
    def _files_agree(self) -> Self:
        if any(file.shapes != self.files[0].shapes for file in self.files):
            raise ValueError("its files hold embeddings of different shapes")
        return self

    @classmethod
    def load(cls, precomputed_uri: str) -> "PromptIndex":
        """Raises UserError if there is no index or it is damaged."""
        uri = storage.join(precomputed_uri, INDEX)
        try:
            return cls.model_validate_json(read_small(uri, MAX_BYTES))
        except storage.NotFoundError:
            raise UserError(f"no prompt embeddings at {precomputed_uri}: {INDEX} is not there") from None
        except ValidationError:
            raise UserError(f"{uri} is damaged or of another version: {AGAIN}") from None

    def save(self, precomputed_uri: str) -> None:
        storage.write_bytes(storage.join(precomputed_uri, INDEX), self.model_dump_json().encode())

    @cached_property
    def places(self) -> dict[str, tuple[PromptFile, PromptEntry]]:
        return {entry.prompt: (file, entry) for file in self.files for entry in file.prompts}


def write_prompts(out: str, name: str, prompts: Sequence[str], embeddings: Embeddings) -> PromptFile:
    """Write the embeddings of B prompts as one file, whole or not at all, and describe it."""
    names = sorted(embeddings)
    # safetensors lays tensors of one type out by name, so a prompt's are neighbours: one read fetches all.
    tensors = {
        f"{number:06d}.{part}": embeddings[part][number].to("cpu", torch.bfloat16).contiguous()
        for number in range(len(prompts))
        for part in names
    }
    data = safetensors.torch.save(tensors, metadata={"prompts": json.dumps(prompts)})
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_bytes])
    entries = []
    for number, prompt in enumerate(prompts):
        offsets = [header[f"{number:06d}.{part}"]["data_offsets"] for part in names]
        assert all(stop == start for (_, stop), (start, _) in pairwise(offsets)), "a prompt's tensors are neighbours"
        start, stop = header_bytes + offsets[0][0], header_bytes + offsets[-1][1]
        entries.append(PromptEntry(prompt, start, stop - start, crc32(memoryview(data)[start:stop])))
    storage.write_bytes(storage.join(out, name), data)
    return PromptFile(
        name=name,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        shapes={part: tuple(embeddings[part].shape[1:]) for part in names},
        prompts=tuple(entries),
    )


class PromptStore:
    """The prompt embeddings of a precomputed set, those used first kept in memory up to `max_bytes`.

    Later ones are fetched each time they are asked for, through the `cache` on disk if there is one: where all do not
    fit, prompts come in random order, and then no choice of which to keep is better than another.
    """

    def __init__(self, precomputed_uri: str, max_bytes: int, cache: BlockCache | None = None) -> None:
        self._uri = precomputed_uri
        self._cache = cache
        self._places = PromptIndex.load(precomputed_uri).places
        self._room = max_bytes
        self._kept: dict[str, Embeddings] = {}
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS)

    def get(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """By name, bfloat16 [B, ...] on the CPU.

        Raises UserError naming a prompt that is not in the set, or a file that is damaged.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        fetched = dict(zip(missing, self._fetchers.map(self._fetch, missing), strict=True))
        found = [fetched[prompt] if prompt in fetched else self._kept[prompt] for prompt in prompts]
        for prompt, embeddings in fetched.items():
            num_bytes = sum(tensor.nbytes for tensor in embeddings.values())
            if num_bytes <= self._room:
                self._room -= num_bytes
                self._kept[prompt] = embeddings
        return {name: torch.stack([embeddings[name] for embeddings in found]) for name in found[0]}

    def _fetch(self, prompt: str) -> Embeddings:
        if prompt not in self._places:
            raise UserError(f"the prompt '{prompt}' is not in {self._uri}: {AGAIN}")
        file, entry = self._places[prompt]
        uri = storage.join(self._uri, file.name)

        def is_damaged(data: bytes) -> bool:
            return bool(crc32(data) != entry.crc32)

        data, damaged = read_checked(uri, file, entry.offset, entry.length, self._cache, is_damaged)
        if damaged:
            raise UserError(
                f"{uri} is damaged at the prompt '{prompt}': its CRC-32 is not the one in {INDEX}; "
                f"remove {file.name} and {AGAIN}"
            )
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
        parts = values.split([math.prod(shape) for shape in file.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(file.shapes.items(), parts, strict=True)}
