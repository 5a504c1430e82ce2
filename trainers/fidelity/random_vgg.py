"""VGG-16 with random weights: features where no trained weights can be had, or none of the image's domain.

Naeem et al. 2020 (2002.09797) embed by a VGG-16 that was never trained, at its second fully connected layer, where
ImageNet's features are out of place. With their code come neither weights nor a generator of them; ours are these,
fixed once for all:

- Philox4x64 (Salmon et al. 2011) with key SEED, whose bits NumPy promises never to change; layers in order, each weight
  in C order; a weight's draw u is the upper 24 bits of 32 of the stream, the lower half of each 64-bit word first.
- He et al. 2015 (1502.01852), eq. 10: zero biases and weights of variance 2 / fan_in, which keep the scale of
  activations through all layers; uniform ones, (2u - 1) sqrt(6 / fan_in), for then no logarithm or cosine enters, and
  weights are equal to the last bit on any machine.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from cluster.errors import UserError
from trainers.fidelity.encoders import ImageEncoder
from trainers.fidelity.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, SquareResize

SIDE = 224
MIN_SIDE = 32  # five halvings leave one place
SEED = 20200223  # the paper's first day
WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
FC_DIM = 4096
POOLED_SIDE = 7
WORDS_AT_ONCE = 2**16  # what a processor's cache holds: seven times as fast as all at once


class RandomVGG16(ImageEncoder):
    """VGG-16 (Simonyan & Zisserman 2014, configuration D) up to fc2 and its ReLU: images [B, 3, S, S] -> [B, 4096].

    The average pool to 7 × 7 before fc1 lets S be any number from 32 on; at 224 it does nothing.
    """

    dim = FC_DIM

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            if isinstance(width, int):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(POOLED_SIDE), nn.Flatten())
        self.fc1 = nn.Linear(channels * POOLED_SIDE**2, FC_DIM)
        self.fc2 = nn.Linear(FC_DIM, FC_DIM)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.fc2(self.fc1(self.convolutions(images)).relu()).relu()
        return features


def load_random_vgg(side: str) -> tuple[RandomVGG16, Preprocessing]:
    """`side` is that of its input in pixels; "" is 224. Raises UserError if it is no such number."""
    if side and not (side.isdecimal() and int(side) >= MIN_SIDE):
        raise UserError(f"'{side}' is not a side in pixels, from {MIN_SIDE} on")
    with torch.device("meta"):  # weights that are drawn anyway need not be drawn twice
        network = RandomVGG16()
    draw_weights(network.to_empty(device="cpu"), SEED)
    return network, SquareResize(int(side or SIDE), mean=IMAGENET_MEAN, std=IMAGENET_STD)


@torch.no_grad()
def draw_weights(network: nn.Module, seed: int) -> None:
    """Fill all parameters of `network` as this module's docstring says."""
    generator = np.random.Philox(key=seed)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.zero_()
        else:
            bound = math.sqrt(6 / parameter[0].numel())
            _fill_uniform(parameter.view(-1), bound, generator)


def _fill_uniform(flat: Tensor, bound: float, generator: np.random.Philox) -> None:
    """Uniform in [-bound, bound)."""
    for start in range(0, flat.numel(), 2 * WORDS_AT_ONCE):
        part = flat[start : start + 2 * WORDS_AT_ONCE]
        words = generator.random_raw(-(-part.numel() // 2)).astype("<u8").view("<u4")[: part.numel()]
        draws = (words >> np.uint32(8)).astype(np.float32)  # 24 bits: exact in float32, as are the next two lines
        draws *= np.float32(2.0**-23)
        draws -= np.float32(1)
        part.copy_(torch.from_numpy(draws * np.float32(bound)))
