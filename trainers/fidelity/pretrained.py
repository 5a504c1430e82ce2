"""Vision models in the transformers layout: CLIP, DINOv2, RAD-DINO and any other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel
from transformers.utils import logging as transformers_logging

from cluster.errors import UserError
from cluster.weights import local_weights
from trainers.fidelity.encoders import ImageEncoder, ImageTextEncoder
from trainers.fidelity.preprocessing import Preprocessing, ProcessorResize

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
PICKLED = "*.bin"  # read by transformers as tensors only
CLASS_TOKENS = ("cls_token", "class_embedding")


class CLIP(ImageTextEncoder):
    """Radford et al. 2021 (2103.00020): both towers with their projections; features are not normalised."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.dim = int(model.config.projection_dim)
        self._model = model
        self._tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._model.get_image_features(pixel_values=images).pooler_output
        return features

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        features: Tensor = self._model.get_text_features(**tokens.to(self._model.device)).pooler_output
        return features


class Vision(ImageEncoder):
    """Features are the class token after the last norm; of a model without one, as a ConvNet, its pooled output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.has_class_token = any(name.endswith(CLASS_TOKENS) for name, _ in model.named_parameters())

    def forward(self, images: Tensor) -> Tensor:
        output = self._model(pixel_values=images)
        features: Tensor = (
            output.last_hidden_state[:, 0] if self.has_class_token else output.pooler_output.flatten(start_dim=1)
        )
        return features


def load_clip(weights: str) -> tuple[CLIP, Preprocessing]:
    """Raises UserError if there is no such model, or it is not CLIP."""
    with _model_folder(weights) as folder:
        _check_type(folder, ("clip",))
        model, missing = _loaded(CLIPModel, folder)
        _check_complete(missing)
        return CLIP(model, AutoTokenizer.from_pretrained(folder)), ProcessorResize.from_folder(folder)


def load_vision_model(weights: str, *model_types: str) -> tuple[Vision, Preprocessing]:
    """A vision model of one of these types, or of any if none is given."""
    with _model_folder(weights) as folder:
        _check_type(folder, model_types)
        model, missing = _loaded(AutoModel, folder)
        network = Vision(model)
        if network.has_class_token:  # a classifier is often published without the pooler, which is not used then
            missing = [name for name in missing if not name.startswith("pooler.")]
        _check_complete(missing)
        return _checked(network, ProcessorResize.from_folder(folder))


@contextmanager
def _model_folder(weights: str) -> Iterator[Path]:
    """A local folder with the model's files; pickled weights are fetched only where there are no others."""
    try:
        with local_weights(weights, FILES) as folder:
            if any(folder.glob("*.safetensors")):
                yield folder
                return
        with local_weights(weights, [*FILES, PICKLED]) as folder:
            yield folder
    except (OSError, ValueError) as error:
        raise UserError(str(error).strip().splitlines()[0]) from None


def _check_type(folder: Path, model_types: Sequence[str]) -> None:
    found = AutoConfig.from_pretrained(folder).model_type
    if model_types and found not in model_types:
        raise UserError(f"its config.json is of a '{found}' model, not {' or '.join(model_types)}")


def _loaded(model_class: Any, folder: Path) -> tuple[Any, list[str]]:
    """The model in float32, and names of its tensors that the weights lack, which are random then."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # what is missing is looked at here; the rest is heads that none needs
    try:
        model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, sorted(info["missing_keys"])


def _check_complete(missing: Sequence[str]) -> None:
    if missing:
        raise UserError(f"its weights lack {len(missing)} tensors such as '{missing[0]}'")


def _checked(network: Vision, preprocessing: Preprocessing) -> tuple[Vision, Preprocessing]:
    """Try it on one black image, which also tells how wide its features are."""
    black = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    try:
        with torch.inference_mode():
            network.dim = network.eval()(preprocessing(black)).shape[1]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"it gives no class token and no pooled output for an image alone: {reason}") from None
    return network, preprocessing
