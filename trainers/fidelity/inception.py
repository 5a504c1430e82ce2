"""Inception-v3 as FID knows it: the TensorFlow graph of 2015-12-05.

Szegedy et al. 2015 (1512.00567), with that graph's own ways: average pools that leave padding out of the mean, a max
pool in the last block, and 1008 classes. Names are those of the published PyTorch ports of its weights (pytorch-fid's
pt_inception-2015-12-05-6726825d.pth and torch-fidelity's weights-inception-2015-12-05-6726825d.pth: one layout).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainers.fidelity.encoders import ImageEncoder
from trainers.fidelity.preprocessing import Preprocessing, SquareResize
from trainers.fidelity.state_dicts import load_into, read_state_dict

SIDE = 299
POOL3_DIM = 2048
NUM_CLASSES = 1008

Kernel = tuple[int, int]
Step = tuple[int, Kernel]
"""Output channels and kernel."""
Layer = tuple[Step, ...]
"""One convolution, or several that read the same input and whose outputs are joined."""

POINT, ROW3, COLUMN3, ROW7, COLUMN7 = (1, 1), (1, 3), (3, 1), (1, 7), (7, 1)


class Convolution(nn.Sequential):
    def __init__(self, channels: int, step: Step, *, stride: int = 1, is_padded: bool = True) -> None:
        out, kernel = step
        padding = (kernel[0] // 2, kernel[1] // 2) if is_padded else 0
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False),
                bn=nn.BatchNorm2d(out, eps=1e-3),
                relu=nn.ReLU(),
            )
        )


class Block(nn.Module):
    """Branches of convolutions side by side and a pool, joined along channels.

    A block whose pool has no convolution of its own (`pool_channels` None) halves the image: in the last layer of each
    branch, without padding.
    """

    def __init__(
        self, channels: int, branches: Mapping[str, Sequence[Layer]], pool: nn.Module, pool_channels: int | None = None
    ) -> None:
        super().__init__()
        self._branches = [
            self._add_branch(channels, name, layers, halves=pool_channels is None) for name, layers in branches.items()
        ]
        self._pool = pool
        self.branch_pool = nn.Identity() if pool_channels is None else Convolution(channels, (pool_channels, POINT))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layers in self._branches:
            y = x
            for names in layers:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self._pool(x))], dim=1)

    def _add_branch(self, channels: int, branch: str, layers: Sequence[Layer], *, halves: bool) -> list[list[str]]:
        """Names of the convolutions of each layer."""
        added = []
        for number, layer in enumerate(layers, start=1):
            stem = f"branch{branch}_{number}" if len(layers) > 1 else f"branch{branch}"
            names = [stem] if len(layer) == 1 else [f"{stem}a", f"{stem}b"]
            stride = 2 if halves and number == len(layers) else 1
            for name, step in zip(names, layer, strict=True):
                self.add_module(name, Convolution(channels, step, stride=stride, is_padded=stride == 1))
            channels = sum(out for out, _ in layer)
            added.append(names)
        return added


def _conv(out: int, kernel: int | Kernel) -> Layer:
    return ((out, (kernel, kernel) if isinstance(kernel, int) else kernel),)


def _average_pool() -> nn.Module:
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _block_a(channels: int, pool_channels: int) -> Block:
    branches = {
        "1x1": [_conv(64, 1)],
        "5x5": [_conv(48, 1), _conv(64, 5)],
        "3x3dbl": [_conv(64, 1), _conv(96, 3), _conv(96, 3)],
    }
    return Block(channels, branches, _average_pool(), pool_channels)


def _block_b(channels: int) -> Block:
    branches = {"3x3": [_conv(384, 3)], "3x3dbl": [_conv(64, 1), _conv(96, 3), _conv(96, 3)]}
    return Block(channels, branches, nn.MaxPool2d(3, stride=2))


def _block_c(channels: int, inner: int) -> Block:
    branches = {
        "1x1": [_conv(192, 1)],
        "7x7": [_conv(inner, 1), _conv(inner, ROW7), _conv(192, COLUMN7)],
        "7x7dbl": [
            _conv(inner, 1),
            _conv(inner, COLUMN7),
            _conv(inner, ROW7),
            _conv(inner, COLUMN7),
            _conv(192, ROW7),
        ],
    }
    return Block(channels, branches, _average_pool(), 192)


def _block_d(channels: int) -> Block:
    branches = {
        "3x3": [_conv(192, 1), _conv(320, 3)],
        "7x7x3": [_conv(192, 1), _conv(192, ROW7), _conv(192, COLUMN7), _conv(192, 3)],
    }
    return Block(channels, branches, nn.MaxPool2d(3, stride=2))


def _block_e(channels: int, pool: nn.Module) -> Block:
    fork = ((384, ROW3), (384, COLUMN3))
    branches = {
        "1x1": [_conv(320, 1)],
        "3x3": [_conv(384, 1), fork],
        "3x3dbl": [_conv(448, 1), _conv(384, 3), fork],
    }
    return Block(channels, branches, pool, 192)


class InceptionV3(ImageEncoder):
    """Images [B, 3, 299, 299], nominally in [-1, 1] -> pool3 features [B, 2048]."""

    dim = POOL3_DIM

    def __init__(self) -> None:
        super().__init__()
        # The published names, capitals and all: they are what a file of weights says.
        self.Conv2d_1a_3x3 = Convolution(3, (32, (3, 3)), stride=2, is_padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, (32, (3, 3)), is_padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, (64, (3, 3)))
        self.max_pool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = Convolution(64, (80, POINT))
        self.Conv2d_4a_3x3 = Convolution(80, (192, (3, 3)), is_padded=False)
        self.max_pool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = _block_a(192, pool_channels=32)
        self.Mixed_5c = _block_a(256, pool_channels=64)
        self.Mixed_5d = _block_a(288, pool_channels=64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, inner=128)
        self.Mixed_6c = _block_c(768, inner=160)
        self.Mixed_6d = _block_c(768, inner=160)
        self.Mixed_6e = _block_c(768, inner=192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average_pool())
        self.Mixed_7c = _block_e(2048, nn.MaxPool2d(3, stride=1, padding=1))
        self.fc = nn.Linear(POOL3_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for name, layer in self.named_children():
            if name != "fc":
                x = layer(x)
        return x.mean(dim=(2, 3))

    def class_logits(self, features: Tensor) -> Tensor:
        """Logits [B, 1008] of pool3 features, without the bias: so Inception Score was published (Salimans et al. 2016)
        and so torch-fidelity computes it ("logits_unbiased")."""
        return features @ self.fc.weight.T


def load_inception(weights: str) -> tuple[InceptionV3, Preprocessing]:
    """The network and clean-fid's way to feed it. Raises UserError if the weights are missing or of another layout."""
    network = InceptionV3()
    load_into(network, read_state_dict(weights))
    return network, SquareResize(SIDE, mean=(128.0,) * 3, std=(128.0,) * 3)
