"""Prompt embeddings: stored once for each distinct prompt, and fetched one prompt at a time.

`prompts-000000.safetensors`, ... hold, for each prompt, T5's hidden states and CLIP's pooled output, side by side;
`prompts.json` says where each prompt's bytes are.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Literal, NamedTuple, Self

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from cluster import storage
from cluster.documents import read_small
from cluster.errors import UserError
from data_shards.manifest import MAX_BYTES, FileName

INDEX = "prompts.json"
FETCH_THREADS = 4

Pair = tuple[Tensor, Tensor]
"""prompt_embeds [L, D] and pooled_prompt_embeds [P], bfloat16."""


class PromptEntry(NamedTuple):
    """Where a prompt's embeddings are in their file: the pooled ones, then those of its tokens."""

    prompt: str
    offset: int
    length: int
    crc32: int


class PromptFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: FileName
    num_bytes: int
    sha256: str
    max_tokens: int = Field(gt=0)
    embedding_dim: int = Field(gt=0)
    pooled_dim: int = Field(gt=0)
    prompts: tuple[PromptEntry, ...]

    @model_validator(mode="after")
    def _prompts_lie_within(self) -> Self:
        num_bytes = (self.max_tokens * self.embedding_dim + self.pooled_dim) * torch.bfloat16.itemsize
        for entry in self.prompts:
            if entry.length != num_bytes or not 0 <= entry.offset <= self.num_bytes - num_bytes:
                raise ValueError(f"the embeddings of '{entry.prompt}' lie outside their file")
        return self


class PromptIndex(BaseModel):
    """Written when all of its files are there."""

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))

    format_version: Literal[1] = 1
    files: tuple[PromptFile, ...]

    @classmethod
    def load(cls, precomputed_uri: str) -> "PromptIndex":
        """Raises UserError if there is no index or it is damaged."""
        uri = storage.join(precomputed_uri, INDEX)
        try:
            return cls.model_validate_json(read_small(uri, MAX_BYTES))
        except storage.NotFoundError:
            raise UserError(f"no prompt embeddings at {precomputed_uri}: {INDEX} is not there") from None
        except ValidationError:
            raise UserError(f"{uri} is damaged or of another version") from None

    def save(self, precomputed_uri: str) -> None:
        storage.write_bytes(storage.join(precomputed_uri, INDEX), self.model_dump_json().encode())

    @cached_property
    def places(self) -> dict[str, tuple[PromptFile, PromptEntry]]:
        return {entry.prompt: (file, entry) for file in self.files for entry in file.prompts}


def write_prompts(
    out: str, name: str, prompts: Sequence[str], prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
) -> PromptFile:
    """Write embeddings [B, L, D] and [B, P] as one file, whole or not at all, and describe it."""
    tensors: dict[str, Tensor] = {}
    for number, (embeds, pooled) in enumerate(zip(prompt_embeds, pooled_prompt_embeds, strict=True)):
        # safetensors lays tensors of one type out by name, so a prompt's two are neighbours: one read fetches both.
        tensors[f"{number:06d}.pooled_prompt_embeds"] = pooled.to("cpu", torch.bfloat16).contiguous()
        tensors[f"{number:06d}.prompt_embeds"] = embeds.to("cpu", torch.bfloat16).contiguous()
    data = safetensors.torch.save(tensors, metadata={"prompts": json.dumps(prompts)})
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_bytes])
    entries = []
    for number, prompt in enumerate(prompts):
        start, middle = header[f"{number:06d}.pooled_prompt_embeds"]["data_offsets"]
        also_middle, stop = header[f"{number:06d}.prompt_embeds"]["data_offsets"]
        assert middle == also_middle, "a prompt's two tensors are neighbours"
        start, stop = header_bytes + start, header_bytes + stop
        entries.append(PromptEntry(prompt, start, stop - start, zlib.crc32(memoryview(data)[start:stop])))
    storage.write_bytes(storage.join(out, name), data)
    return PromptFile(
        name=name,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        max_tokens=prompt_embeds.shape[1],
        embedding_dim=prompt_embeds.shape[2],
        pooled_dim=pooled_prompt_embeds.shape[1],
        prompts=tuple(entries),
    )


class PromptStore:
    """The prompt embeddings of a precomputed set, those used first kept in memory up to `max_bytes`.

    Later ones are fetched each time they are asked for: where all do not fit, prompts come in random order, and then
    no choice of which to keep is better than another.
    """

    def __init__(self, precomputed_uri: str, max_bytes: int) -> None:
        self._uri = precomputed_uri
        self._places = PromptIndex.load(precomputed_uri).places
        self._room = max_bytes
        self._kept: dict[str, Pair] = {}
        self._fetchers = ThreadPoolExecutor(FETCH_THREADS)

    def get(self, captions: list[str]) -> Pair:
        """prompt_embeds [B, L, D] and pooled_prompt_embeds [B, P], bfloat16 on the CPU.

        Raises UserError naming a caption that is not in the set, or a file that is damaged.
        """
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._kept]
        fetched = dict(zip(missing, self._fetchers.map(self._fetch, missing), strict=True))
        pairs = [fetched[caption] if caption in fetched else self._kept[caption] for caption in captions]
        for caption, pair in fetched.items():
            num_bytes = sum(tensor.nbytes for tensor in pair)
            if num_bytes <= self._room:
                self._room -= num_bytes
                self._kept[caption] = pair
        prompt_embeds, pooled_prompt_embeds = zip(*pairs, strict=True)
        return torch.stack(prompt_embeds), torch.stack(pooled_prompt_embeds)

    def _fetch(self, caption: str) -> Pair:
        if caption not in self._places:
            raise UserError(
                f"the prompt '{caption}' is not in {self._uri}: run medsynth shards precompute RECIPE again"
            )
        file, entry = self._places[caption]
        uri = storage.join(self._uri, file.name)
        data = storage.read_bytes(uri, entry.offset, entry.length)
        if (found := zlib.crc32(data)) != entry.crc32:
            raise UserError(
                f"{uri} is damaged at the prompt '{caption}': CRC-32 {found:08x}, {INDEX} says {entry.crc32:08x}; "
                f"remove {file.name} and run medsynth shards precompute RECIPE again"
            )
        values = torch.frombuffer(bytearray(data), dtype=torch.bfloat16)
        pooled, embeds = values[: file.pooled_dim], values[file.pooled_dim :]
        return embeds.view(file.max_tokens, file.embedding_dim), pooled
