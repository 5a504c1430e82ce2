"""Extractors by URI: published layouts load, give what the reference implementations give, and say what they are."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from cluster.errors import UserError
from tests.conftest import DATA
from tests.trainers.fidelity.seeded_weights import pattern, seeded_state
from trainers.fidelity.biomedclip import VisionTransformer
from trainers.fidelity.evaluation import measure_name
from trainers.fidelity.extractor_uris import label_of
from trainers.fidelity.extractors import ClassifyingExtractor, Extractor, PromptExtractor, open_extractor
from trainers.fidelity.inception import InceptionV3
from trainers.fidelity.resnet import ResNet50

PUBLISHED_INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
SIDE = 32


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / PUBLISHED_INCEPTION
    torch.save(seeded_state(InceptionV3().state_dict()), path)
    return path


@pytest.fixture(scope="module")
def random_vgg() -> Extractor:
    return open_extractor("random-vgg:32")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Real ones, pixels uint8 [24, 256, 256, 3]."""
    paths = sorted((DATA / "colonoscopy" / "images").iterdir())[:24]
    return torch.from_numpy(
        np.stack([np.asarray(Image.open(path).convert("RGB").resize((256, 256))) for path in paths])
    )


def assert_near(found: Tensor, expected: Sequence[float]) -> None:
    np.testing.assert_allclose(
        found[0, : len(expected)].numpy(), expected, rtol=1e-3, atol=1e-3 * max(map(abs, expected))
    )


# --- against the reference implementations ---
# The figures are those of the library named, on the CPU, given seeded_state() of its own state_dict() and pattern().


def test_inception_is_that_of_fid(inception_file: Path) -> None:
    """Reference: torch-fidelity 0.4.0, FeatureExtractorInceptionV3, outputs "2048" and "logits_unbiased"."""
    extractor = open_extractor(f"inception:{inception_file}")
    assert isinstance(extractor, ClassifyingExtractor)
    features = extractor.features(pattern(299))
    assert features.shape == (1, 2048)
    assert_near(features, [0.131248, 0.116782, 0.0, 0.34052, 0.067688, 2.84097])
    logits = extractor.class_logits(features)
    assert logits.shape == (1, 1008)
    assert_near(logits, [-0.319584, 1.6627, 2.9901, 1.42134, -2.42841, 1.30106])


def radimagenet_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As RadImageNet publishes it: layers by their numbers."""
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    return {"backbone." + re.sub(r"^\w+", lambda name: numbers[name[0]], name): w for name, w in state.items()}


def test_radimagenet_is_a_resnet50(tmp_path: Path) -> None:
    """Reference: torchvision 0.29.1, resnet50 without its classifier, on pixels in [-1, 1]."""
    torch.save(radimagenet_names(seeded_state(ResNet50().state_dict())), tmp_path / "ResNet50.pt")
    extractor = open_extractor(f"radimagenet:{tmp_path}/ResNet50.pt")
    assert extractor.record.dim == 2048
    assert_near(extractor.features(pattern(224)), [1563.24, 993.2, 64.7069, 630.876, 486.927, 1855.79])


def test_radimagenet_is_read_in_any_of_its_layouts(tmp_path: Path) -> None:
    state = ResNet50().state_dict()
    # Each tensor full of its own number, which takes no room in the file.
    named = {name: torch.tensor(float(at)).expand(state[name].shape) for at, name in enumerate(sorted(state))}
    layouts = {
        "published": radimagenet_names(named),
        "wrapped": {f"module.{name}": w for name, w in radimagenet_names(named).items()},
        "torchvision": named | {"fc.weight": torch.zeros(165, 2048), "fc.bias": torch.zeros(165)},
    }
    digests = set()
    for layout, tensors in layouts.items():
        torch.save(tensors, tmp_path / f"{layout}.pt")
        digests.add(open_extractor(f"radimagenet:{tmp_path}/{layout}.pt").record.digest)
    assert len(digests) == 1


def test_random_vgg_is_a_vgg16_whose_weights_never_change(random_vgg: Extractor) -> None:
    """Reference: torchvision 0.29.1, vgg16 up to fc2's ReLU, given these weights, on ImageNet-normalised pixels."""
    features = random_vgg.features(pattern(32))
    assert features.shape == (1, 4096)
    assert_near(features, [0.0, 0.0, 0.0, 0.0, 2.73399, 1.58468, 0.0, 0.322317, 2.18387, 0.107376, 0.0, 1.69759])
    state = random_vgg.network.state_dict()
    assert random_vgg.record.digest == "f32c0fa548c39b235b11ec7a387570ee49a53a8d08c0cf64556dd791df7eadec"
    bound = np.sqrt(6 / 4096)
    assert state["fc2.weight"].abs().max() <= bound
    assert state["fc2.weight"].std() == pytest.approx(bound / np.sqrt(3), rel=1e-3)
    assert not state["fc2.bias"].any()


def save_biomedclip(folder: Path, tokenizer_folder: Path, pooler: str) -> dict[str, Tensor]:
    """open_clip's layout with a ViT-Ti/16, its smallest, and a BERT of two layers."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    bert = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=64,
        ),
        add_pooling_layer=False,
    )
    towers: Mapping[str, nn.Module] = {
        "visual.trunk": VisionTransformer(192, 768, depth=12, patch=16, num_tokens=197),
        "visual.head.proj": nn.Linear(192, 48, bias=False),
        "text.transformer": bert,
        "text.proj.0": nn.Linear(128, (128 + 48) // 2, bias=False),
        "text.proj.2": nn.Linear((128 + 48) // 2, 48, bias=False),
    }
    state = {f"{prefix}.{name}": w for prefix, tower in towers.items() for name, w in tower.state_dict().items()}
    state = seeded_state(state | {"logit_scale": torch.tensor(0.0)})
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    config = {
        "model_cfg": {
            "embed_dim": 48,
            "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"},
            "text_cfg": {
                "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
                "hf_proj_type": "mlp",
                "hf_pooler_type": pooler,
                "context_length": 24,
            },
        },
        "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return state


def test_biomedclip_is_that_of_open_clip(text_encoder_folder: Path, tmp_path: Path) -> None:
    """Reference: open_clip 3.3.0 with timm 1.0.31, encode_image of the preprocessed picture and encode_text."""
    save_biomedclip(tmp_path, text_encoder_folder, "cls_last_hidden_state_pooler")
    extractor = open_extractor(f"biomedclip:{tmp_path}")
    assert isinstance(extractor, PromptExtractor)
    features = extractor.features(pattern(300))
    assert features.shape == (1, 48)
    assert_near(features, [-1.31059, 4.56064, -0.244542, 0.374079, 0.360532, -1.10579])
    prompts = ["a large polyp in the colon"]
    assert_near(extractor.prompt_features(prompts), [2.20554, 0.232924, 1.10007, 1.21167, 0.975203, 0.651817])
    config = tmp_path / "open_clip_config.json"
    config.write_text(config.read_text().replace("cls_last_hidden_state_pooler", "mean_pooler"))
    extractor = open_extractor(f"biomedclip:{tmp_path}")
    assert isinstance(extractor, PromptExtractor)
    assert_near(extractor.prompt_features(prompts), [2.22278, 0.520273, 1.13, 1.69364, 0.842703, 0.540014])


# --- models of transformers, small and saved as they are published ---


def save_processor(folder: Path, **settings: object) -> None:
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessorPil(**size | settings).save_pretrained(folder)


def small_transformer() -> dict[str, int]:
    return {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def clip_folder(text_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    text = small_transformer() | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = small_transformer() | {"image_size": SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    save_processor(folder)
    return folder


def save_dinov2(folder: Path) -> Dinov2Model:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**small_transformer(), image_size=SIDE, patch_size=8)).eval()
    model.save_pretrained(folder)
    save_processor(folder)
    return model


def test_clip_gives_images_and_prompts_a_common_space(clip_folder: Path) -> None:
    extractor = open_extractor(f"clip:{clip_folder}")
    assert isinstance(extractor, PromptExtractor)
    pixels = pattern(SIDE)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = (torch.tensor(values) for values in (CLIPImageProcessorPil.image_mean, CLIPImageProcessorPil.image_std))
    images = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    tokens = AutoTokenizer.from_pretrained(clip_folder)(["a polyp"], return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=images, **tokens)
    cosine = nn.functional.cosine_similarity(extractor.features(pixels), extractor.prompt_features(["a polyp"]))
    assert cosine.item() == pytest.approx((expected.image_embeds @ expected.text_embeds.T).item(), abs=1e-5)
    long = extractor.prompt_features(["a polyp " * 50, "a polyp"])
    assert long.shape == (2, 24) == (2, extractor.record.dim)


@pytest.mark.parametrize("kind", ["dinov2", "rad-dino", "transformers"])
def test_dinov2_gives_its_class_token(kind: str, tmp_path: Path) -> None:
    model = save_dinov2(tmp_path)
    extractor = open_extractor(f"{kind}:{tmp_path}")
    pixels = pattern(48)
    features = extractor.features(pixels)
    with torch.no_grad():
        expected = model(pixel_values=extractor.preprocessing(pixels)).pooler_output
    torch.testing.assert_close(features, expected)
    assert type(extractor) is Extractor, "it has neither classes nor prompts"


def test_a_model_without_a_class_token_gives_its_pooled_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConvNextModel(ConvNextConfig(hidden_sizes=[4, 6, 8, 12], depths=[1, 1, 1, 1])).eval()
    model.save_pretrained(tmp_path)
    save_processor(tmp_path)
    extractor = open_extractor(f"transformers:{tmp_path}")
    with torch.no_grad():
        expected = model(pixel_values=extractor.preprocessing(pattern(SIDE))).pooler_output
    torch.testing.assert_close(extractor.features(pattern(SIDE)), expected)
    assert extractor.record.dim == 12


def test_a_classifier_without_pooler_is_no_random_extractor(tmp_path: Path) -> None:
    """ViT classifiers are published without the pooler that ViTModel would make up."""
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**small_transformer(), image_size=SIDE, patch_size=8)).save_pretrained(tmp_path)
    save_processor(tmp_path)
    first, second = (open_extractor(f"transformers:{tmp_path}").features(pattern(SIDE)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# --- resizing ---


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """FID of few features in many dimensions: tr (Σa Σb)^½ is the nuclear norm of the centred features' product."""
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))
    covariances = (x**2).sum() + (y**2).sum() - 2 * np.linalg.norm(x @ y.T, "nuc")
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + covariances)


def test_a_resize_that_is_not_antialiased_moves_fid(random_vgg: Extractor, images: Tensor) -> None:
    """clean-fid's lesson: the same images, resized as PyTorch's bilinear does by default, look like another model's."""
    channels_first = images.permute(0, 3, 1, 2).float()

    def frechet_to_ours(*, antialias: bool) -> float:
        small = nn.functional.interpolate(channels_first, size=32, mode="bilinear", antialias=antialias)
        pixels = small.round().to(torch.uint8).permute(0, 2, 3, 1)
        return frechet(random_vgg.features(pixels).double().numpy(), ours)

    ours = random_vgg.features(images).double().numpy()
    antialiased, aliased = frechet_to_ours(antialias=True), frechet_to_ours(antialias=False)
    assert aliased > 3 * antialiased  # 18.1 against 3.3; two halves of these images are 89 apart


def test_resizes_are_stated(random_vgg: Extractor, clip_folder: Path) -> None:
    assert random_vgg.record.resize == "antialiased bicubic to 32 × 32 in float32 (Pillow, as clean-fid)"
    clip = open_extractor(f"clip:{clip_folder}").record
    assert clip.resize == "antialiased bicubic to shorter side 32, then centre crop 32 × 32 in uint8 (Pillow)"


def test_detail_finer_than_the_target_is_averaged_not_sampled(random_vgg: Extractor, clip_folder: Path) -> None:
    stripes = torch.zeros(1, 256, 256, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    for extractor in (random_vgg, open_extractor(f"clip:{clip_folder}")):
        image = extractor.preprocessing(stripes)[0, :, 4:-4, 4:-4]
        assert image.std(dim=(1, 2)).max() < 0.02, "stripes of one pixel become an even grey"


# --- digests, labels, places ---


def test_batches_do_not_matter(random_vgg: Extractor, images: Tensor) -> None:
    whole = random_vgg.features(images[:5])
    parts = torch.cat([random_vgg.features(part) for part in images[:5].split(2)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


def test_the_digest_follows_weights_and_preprocessing_not_the_file(tmp_path: Path) -> None:
    save_dinov2(tmp_path)
    digests = {"first": open_extractor(f"dinov2:{tmp_path}").record.digest}
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert open_extractor(f"dinov2:{tmp_path}").record.digest == digests["first"]
    save_processor(tmp_path, resample=2)
    digests["other resize"] = open_extractor(f"dinov2:{tmp_path}").record.digest
    state["layernorm.bias"] += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    digests["other weights"] = open_extractor(f"dinov2:{tmp_path}").record.digest
    assert len(set(digests.values())) == 3


def test_labels_never_pass_random_features_off_as_inception() -> None:
    uris = {
        "inception:/w/file.pth": "inception",
        "clip:openai/clip-vit-base-patch32": "clip",
        "rad-dino:microsoft/rad-dino": "rad_dino",
        "transformers:s3://models/Swin-T_v2/": "transformers_swin_t_v2",
        "transformers:/models/inception": "transformers_inception",
        "random-vgg": "random_vgg",
        "random-vgg:224": "random_vgg",
        "random-vgg:64": "random_vgg_64",
    }
    assert {uri: label_of(uri) for uri in uris} == uris
    assert measure_name("fid", label_of("random-vgg")) == "fid_random_vgg"
    plain = [uri for uri in uris if measure_name("fid", label_of(uri)) == "fid"]
    assert plain == ["inception:/w/file.pth"]


def test_inception_in_safetensors_is_the_same(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    state = {name: w for name, w in state.items() if not name.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "inception.safetensors")
    records = [open_extractor(f"inception:{place}").record for place in (inception_file, tmp_path)]
    assert records[0].digest == records[1].digest


# --- mistakes ---


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("incepton:w.pth", r"no feature extractor 'incepton', only inception, clip, .*; did you mean 'inception'\?"),
        ("inception", r"say inception:WEIGHTS, which is pt_inception-2015-12-05-6726825d.pth, from the releases of"),
        ("inception:/nowhere/w.pth", r"cannot load '/nowhere'.*needed is pt_inception-2015"),
        ("dinov2:/nowhere", r"cannot load '/nowhere'.*needed is a DINOv2 model"),
        ("biomedclip:/nowhere", r"cannot load '/nowhere'.*needed is a model of open_clip"),
        ("random-vgg:small", r"extractor 'random-vgg:small': 'small' is not a side in pixels, from 32 on"),
        ("random-vgg:16", r"'16' is not a side in pixels"),
    ],
)
def test_mistakes_in_a_uri_are_named(uri: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        open_extractor(uri)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    message = (
        r"another layout: the file lacks \d+ tensors such as 'Conv2d_1a.*unknown 1 .*'conv1.weight'; needed is pt_"
    )
    with pytest.raises(UserError, match=message):
        open_extractor(f"inception:{tmp_path}/weights.pth")


def test_a_model_of_another_type_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    save_dinov2(tmp_path)
    with pytest.raises(UserError, match=r"its config.json is of a 'dinov2' model, not clip; needed is a CLIP model"):
        open_extractor(f"clip:{tmp_path}")
    with pytest.raises(UserError, match=r"is of a 'clip' model, not dinov2"):
        open_extractor(f"rad-dino:{clip_folder}")
    with pytest.raises(UserError, match=r"gives no class token and no pooled output for an image alone"):
        open_extractor(f"transformers:{clip_folder}")
    save_processor(tmp_path, resample=0)
    with pytest.raises(UserError, match=r"asks for no antialiased resize"):
        open_extractor(f"dinov2:{tmp_path}")


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    save_dinov2(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["layernorm.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights lack 1 tensors such as 'layernorm.bias'"):
        open_extractor(f"dinov2:{tmp_path}")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"needed is a DINOv2 model"):
        open_extractor(f"dinov2:{tmp_path}")


def test_a_biomedclip_of_other_parts_is_refused(text_encoder_folder: Path, tmp_path: Path) -> None:
    state = save_biomedclip(tmp_path, text_encoder_folder, "max_pooler")
    with pytest.raises(UserError, match=r"hf_pooler_type 'max_pooler' is not known"):
        open_extractor(f"biomedclip:{tmp_path}")
    config = tmp_path / "open_clip_config.json"
    config.write_text(config.read_text().replace("max_pooler", "mean_pooler"))
    del state["text.proj.2.weight"]
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"they lack 'text.proj.2.weight'"):
        open_extractor(f"biomedclip:{tmp_path}")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"its tokenizer cannot be read"):
        open_extractor(f"biomedclip:{tmp_path}")
    config.unlink()
    with pytest.raises(UserError, match=r"there is no open_clip_config.json"):
        open_extractor(f"biomedclip:{tmp_path}")
