"""How long it takes to draw and look: our shares on one process and on two actors, beside a plain loop.

    python -m benchmarks.evaluation --num-samples 64

The plain loop is what a notebook does: one picture at a time, its features at once. The model is the demo's
architecture with random weights, for how long a picture takes does not depend on what it shows. All three draw the same
prompts by the same sampler on the same machine, one after the other.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.circumstances import RESULTS, circumstances
from cluster import runtime
from data_shards import derive_seed
from trainers.fidelity.extractors import kept_extractor
from trainers.fidelity.samples import Drawn, ShareWorker, collect, shares_of
from trainers.generate import load_model
from trainers.msdm import MSDMPipeline
from trainers.msdm.text_encoder import load_text_encoder
from trainers.msdm.unet import build_scheduler, build_unet
from trainers.msdm.vae import build_vae, set_channel_statistics
from trainers.recipe import MSDMRecipe, load_recipe

EXTRACTOR, PROMPT = "random-vgg:64", "Generate an image with a large polyp."
SETTINGS = {"num_inference_steps": 30, "guidance_scale": 3.5}


def save_model(folder: Path) -> None:
    """The demo's model, untrained."""
    recipe = load_recipe("recipes/msdm-demo.yaml")
    assert isinstance(recipe, MSDMRecipe)
    torch.manual_seed(0)
    tokenizer, text_encoder = load_text_encoder(recipe.text_encoder)
    channels = recipe.vae.architecture.latent_channels
    side = recipe.data.resolution // recipe.vae.architecture.downsampling
    vae = build_vae(recipe.vae.architecture, recipe.data.resolution)
    set_channel_statistics(vae, torch.randn(16, channels, side, side))
    unet = build_unet(
        recipe.denoiser.architecture,
        latent_channels=channels,
        latent_side=side,
        embedding_dim=text_encoder.config.hidden_size,
    )
    scheduler = build_scheduler(recipe.denoiser.noise, recipe.sampling)
    MSDMPipeline(vae, text_encoder, tokenizer, unet, scheduler).save_pretrained(folder)


def plain_loop(model_uri: str, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """One picture at a time, and its features."""
    model, extractor = load_model(model_uri, "cpu"), kept_extractor(EXTRACTOR, "cpu")
    features = []
    for number in range(count):
        generator = torch.Generator().manual_seed(derive_seed(0, "generate", number))
        (image,) = model.pipeline(PROMPT, **SETTINGS, generator=generator).images
        features.append(extractor.features(torch.from_numpy(np.array(image))[None]))
    return torch.cat(features).numpy()


def in_shares(
    model_uri: str, count: int, out: Path, *, actors: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """As `medsynth evaluate` does it."""
    worker = ShareWorker(Drawn(model_uri, (PROMPT,) * count, 0, SETTINGS, "cpu", ""), (EXTRACTOR,), "cpu", str(out))
    shares = shares_of(count, 8)
    if actors == 1:
        work = worker()
        for share in shares:
            work(share)
    else:
        with runtime.connect(min_cpus=actors):
            for _ in runtime.map_actors(worker, shares, num_actors=actors):
                pass
    return collect(str(out), shares)["random_vgg_64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON; default: benchmarks/results/DATE-evaluation-cpu.json"
    )
    options = parser.parse_args()
    count = options.num_samples
    here, rows = circumstances(), {}
    with tempfile.TemporaryDirectory() as temporary:
        model = str(Path(temporary) / "model")
        save_model(Path(model))
        ways: dict[str, Callable[[], np.ndarray[tuple[int, int], np.dtype[np.float32]]]] = {
            "plain loop, one picture at a time": lambda: plain_loop(model, count),
            "shares, one process": lambda: in_shares(model, count, Path(temporary) / "one", actors=1),
            "shares, two actors (Ray's start included)": lambda: in_shares(
                model, count, Path(temporary) / "two", actors=2
            ),
        }
        expected = None
        for name, way in ways.items():
            kept_extractor.cache_clear()
            started = time.perf_counter()
            found = way()
            seconds = time.perf_counter() - started
            expected = found if expected is None else expected
            off = float(np.abs(found - expected).max() / np.abs(expected).max())
            rows[name] = {"seconds": seconds, "images_per_second": count / seconds, "features_off_by": off}
            print(f"{name:45} {seconds:7.1f} s  {count / seconds:5.2f} images/s  features off by {off:.1e}", flush=True)
    first = next(iter(rows.values()))["seconds"]
    document = {
        **here,
        "num_samples": count,
        "settings": SETTINGS,
        "extractor": EXTRACTOR,
        "ways": {name: row | {"speedup": first / row["seconds"]} for name, row in rows.items()},
    }
    out = options.out or RESULTS / f"{date.today()}-evaluation-cpu.json"
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    main()
