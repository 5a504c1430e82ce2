"""ResNet-50 (He et al. 2015, 1512.03385; stride in the 3 × 3 convolution, as torchvision has it) for RadImageNet."""

from torch import Tensor, nn

from trainers.fidelity.encoders import ImageEncoder
from trainers.fidelity.preprocessing import Preprocessing, SquareResize
from trainers.fidelity.state_dicts import load_into, read_state_dict

SIDE = 224
DEPTHS = (3, 4, 6, 3)
EXPANSION = 4
# RadImageNet publishes nn.Sequential(*resnet50().children()), whose layers bear numbers instead of names.
NAMES_BY_NUMBER = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
WRAPPERS = ("module.", "backbone.")
CLASSIFIER = ("fc.weight", "fc.bias")


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = (
            nn.Identity()
            if channels == out and stride == 1
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        result: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return result


class ResNet50(ImageEncoder):
    """Images [B, 3, 224, 224] -> the last stage's mean over places [B, 2048]."""

    dim = 512 * EXPANSION

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for number, depth in enumerate(DEPTHS, start=1):
            width = 64 * 2 ** (number - 1)
            blocks = []
            for place in range(depth):
                blocks.append(Bottleneck(channels, width, stride=2 if place == 0 and number > 1 else 1))
                channels = width * EXPANSION
            self.add_module(f"layer{number}", nn.Sequential(*blocks))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.children():
            x = layer(x)
        return x.mean(dim=(2, 3))


def load_radimagenet(weights: str) -> tuple[ResNet50, Preprocessing]:
    """RadImageNet's ResNet-50 (Mei et al. 2022), which read pixels in [-1, 1] at 224 × 224.

    Raises UserError if the weights are missing or of another layout.
    """
    network = ResNet50()
    state = {_torchvision_name(name): tensor for name, tensor in read_state_dict(weights).items()}
    load_into(network, state, unused=CLASSIFIER)
    return network, SquareResize(SIDE, mean=(127.5,) * 3, std=(127.5,) * 3)


def _torchvision_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    first, _, rest = name.partition(".")
    return f"{NAMES_BY_NUMBER.get(first, first)}.{rest}"
