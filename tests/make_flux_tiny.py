"""Make tests/data/flux-tiny: FLUX in small, in the diffusers layout, for tests that need no hub and no GPU.

    python -m tests.make_flux_tiny [MINUTES]

Everything has random weights but the autoencoder, which is trained for MINUTES (default 10, on one thread) on the
colonoscopy frames beside it: with a random one, no test could tell a right picture from a wrong one.
"""

import csv
import json
import math
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from data_shards.decode import decode

DATA = Path(__file__).parent / "data"
OUT = DATA / "flux-tiny"
FRAMES = 256  # the first, by name; tests draw theirs from the first 24
SIDE = 64
BATCH = 8
LATENT_CHANNELS = 16
KL_WEIGHT = 1e-6
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
END_OF_WORD = "</w>"
RARE = -20.0  # log-probability of a single letter
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def main(minutes: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    captions = all_captions()
    clip_tokenizer, t5_tokenizer = train_clip_tokenizer(captions), train_t5_tokenizer(captions)
    frames = load_frames()
    vae = build_vae()
    train_vae(vae, frames, minutes * 60)
    standardize_latents(vae, frames)
    transformer = build_transformer()
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae.eval().half(),
        text_encoder=build_clip(clip_tokenizer),
        tokenizer=clip_tokenizer,
        text_encoder_2=build_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    readme = (OUT / "README.md").read_text()
    shutil.rmtree(OUT)
    pipeline.save_pretrained(OUT)
    # In several files with an index, as FLUX's is.
    shutil.rmtree(OUT / "transformer")
    transformer.save_pretrained(OUT / "transformer", max_shard_size="1MB")
    (OUT / "README.md").write_text(readme)
    leave_no_paths(OUT)
    vae = AutoencoderKL.from_pretrained(OUT, subfolder="vae").eval()
    for side in (32, SIDE):
        print(f"PSNR at {side} x {side}: {psnr(vae, load_frames(side)):.1f} dB over {len(frames)} training frames")
    print(f"{sum(path.stat().st_size for path in OUT.rglob('*')) / 1e6:.1f} MB in {OUT}")


# --- tokenizers, trained on the captions ---


def all_captions() -> list[str]:
    with (DATA / "colonoscopy" / "prompt-gt.csv").open() as file:
        return [row["Prompt"] for row in csv.DictReader(file, delimiter=";")]


def train_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE; its vocabulary is each byte, each byte at a word's end, what merges make, two marks."""
    blank = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=ALPHABET, end_of_word_suffix=END_OF_WORD),
    )
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*ALPHABET, *(byte + END_OF_WORD for byte in ALPHABET), *("".join(pair) for pair in merges), BOS, EOS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def train_t5_tokenizer(captions: list[str]) -> T5TokenizerFast:
    """T5's Unigram model, its pieces the captions' words by their frequency, and printable ASCII for all others."""
    split = T5TokenizerFast().backend_tokenizer.pre_tokenizer
    words = Counter(piece for caption in captions for piece, _ in split.pre_tokenize_str(caption))
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(word, math.log(count / words.total())) for word, count in words.most_common()]
    vocabulary += [(letter, RARE) for letter in ("▁", *map(chr, range(33, 127)))]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


# --- models of random weights ---


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """Both kinds of blocks, guidance embedding and three rotary axes; in bfloat16, as FLUX.1 is published."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=6,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.to(torch.bfloat16)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's settings."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


# --- the autoencoder, trained ---


def build_vae() -> AutoencoderKL:
    """FLUX's in small: 16 latent channels, 8 times smaller sides, no convolutions around the latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def load_frames(side: int = SIDE) -> Tensor:
    paths = sorted((DATA / "colonoscopy" / "images").glob("*.jpg"))[:FRAMES]
    return torch.stack([decode(path.read_bytes(), side) for path in paths])


def train_vae(vae: AutoencoderKL, frames: Tensor, seconds: float) -> None:
    """Plain squared error and a little KL, for `seconds` of this process, over which the learning rate falls to zero.

    Every other step is on half the side, at which most tests run.
    """
    assert vae.encoder.conv_out.bias is not None
    vae.encoder.conv_out.bias.data[LATENT_CHANNELS:] = -4.0  # log-variance: a decoder learns little from noise alone
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, weight_decay=0.0)
    start, step = time.process_time(), 0
    while (share := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        images = frames[torch.randint(len(frames), (BATCH,))]
        if torch.rand(()) < 0.5:
            images = images.flip(-1)
        if step % 2:
            images = torch.nn.functional.avg_pool2d(images, 2)
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample()).sample - images).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"{share:4.0%} step {step} squared error {float(error):.4f}", flush=True)


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, frames: Tensor) -> None:
    """Measure the shift and scale that give draws mean 0 and variance 1."""
    draws = torch.cat([vae.encode(part).latent_dist.sample() for part in frames.split(BATCH)])
    vae.register_to_config(shift_factor=round(float(draws.mean()), 4), scaling_factor=round(1 / float(draws.std()), 4))


@torch.no_grad()
def psnr(vae: AutoencoderKL, frames: Tensor) -> float:
    """Mean over images, in dB, of reconstructions from the posterior's mean."""
    means = [vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1) for part in frames.split(BATCH)]
    errors = (torch.cat(means) - frames).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / errors)).mean())


def leave_no_paths(folder: Path) -> None:
    """Remove what says where this was made."""
    for path in folder.rglob("*.json"):
        document: Any = json.loads(path.read_text())
        if isinstance(document, dict) and document.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
