"""How long `make demo` will take on this machine, by a second of what it does most: small convolutions.

A rough estimate: the whole demo was timed on two machines of two cores each. It took 9.5 minutes on one with AVX-512
and AMX, 19 on one with AVX2 alone.
"""

import os
import time

import torch
from torch import nn

STARTS_SECONDS = 150.0  # of starting processes, and of all else that is no training
TRAINING_SECONDS = 420.0  # where a step of the probe takes PROBE_SECONDS
PROBE_SECONDS = 0.019
PROCESSES = 2
SLOW_MINUTES = 15
BF16_PAYS = 0.7  # below this share of the time in fp32
FEWER_STEPS = "--set vae.training.steps=800 --set denoiser.training.steps=425"
IN_BF16 = "--set vae.training.precision=bf16 --set denoiser.training.precision=bf16"


def step_seconds(*, bf16: bool = False, budget_seconds: float = 0.6) -> float:
    """Processor seconds of a forward and backward pass of two convolutions of the demo's size: the fastest."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(96, 96, 3, padding=1), nn.SiLU(), nn.Conv2d(96, 96, 3, padding=1))
    images = torch.randn(8, 96, 16, 16)
    fastest, began = float("inf"), time.process_time()
    while time.process_time() - began < budget_seconds:
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = layers(images).square().mean()
        loss.backward()
        fastest = min(fastest, time.process_time() - start)
    return fastest


def estimate_minutes(seconds: float, *, cores: int, load: float) -> float:
    """Of the demo, where a step of the probe takes so many seconds and so many other processes want the cores."""
    crowding = max(1.0, (load + PROCESSES) / cores)
    return (STARTS_SECONDS + TRAINING_SECONDS * seconds / PROBE_SECONDS) * crowding / 60


def main() -> None:
    torch.set_num_threads(1)
    load, plain = os.getloadavg()[0], step_seconds()
    minutes = estimate_minutes(plain, cores=os.cpu_count() or 1, load=load)
    print(
        f"The demo will take about {minutes:.0f} minutes here: an estimate, by a second of convolutions and the load, "
        f"which is {load:.1f}.",
        flush=True,
    )
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() and (share := step_seconds(bf16=True) / plain) < BF16_PAYS:
        print(f'In bf16 they take {share:.0%} of the time here: make demo TRAIN="{IN_BF16}"', flush=True)
    if minutes > SLOW_MINUTES:
        print(f'Half as many steps, for worse pictures: make demo TRAIN="{FEWER_STEPS}"', flush=True)


if __name__ == "__main__":
    main()
