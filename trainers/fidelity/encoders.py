"""What the networks behind extractors have in common."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """forward: preprocessed images float32 [B, 3, S, S] -> features [B, dim]."""

    dim: int


class ImageTextEncoder(ImageEncoder):
    """Maps prompts into the space of its image features."""

    @abstractmethod
    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Features [B, dim], of any length; the cosine to an image's features tells how well they fit."""
