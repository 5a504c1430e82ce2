"""What `medsynth evaluate` and `medsynth promote` both ask of an evaluation, as options of the command line."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.terminal import ask
from trainers.drawing_settings import BATCH_SIZE, GUIDANCE_SCALE, NUM_INFERENCE_STEPS, SEED, TRUE_CFG_SCALE

if TYPE_CHECKING:  # help need not wait for what an evaluation imports
    from trainers.evaluate import Request

Splits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Whose captions and images to compare with; may be given several times. Default: all but train.",
    ),
]
NumSamples = Annotated[
    int,
    typer.Option(
        min=16,
        metavar="N",
        help="Images to draw. Fewer than 250 seldom show that few are copies.",
    ),
]
ImagesPerPrompt = Annotated[int, typer.Option(min=1, metavar="N", help="Diversity is measured among those.")]
Extractors = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND",
        help="What turns images into features, KIND or KIND:WEIGHTS; may be given several times, the first decides "
        "on copies. Kinds: inception, clip, biomedclip, dinov2, rad-dino, radimagenet, transformers, random-vgg. "
        "Default: random-vgg, which needs no weights.",
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(min=GUIDANCE_SCALE.low, max=GUIDANCE_SCALE.high, metavar="N", help="Default: the model's own."),
]
TrueCFGScale = Annotated[
    float | None,
    typer.Option(min=TRUE_CFG_SCALE.low, max=TRUE_CFG_SCALE.high, metavar="N", help="FLUX. Default: the model's own."),
]
NumInferenceSteps = Annotated[
    int | None,
    typer.Option(
        min=NUM_INFERENCE_STEPS.low, max=NUM_INFERENCE_STEPS.high, metavar="N", help="Default: the model's own."
    ),
]
Sampler = Annotated[
    str | None, typer.Option(help="MSDM: ddpm, ddim or dpm-solver++. FLUX: euler. Default: the model's own.")
]
Precision = Annotated[str | None, typer.Option(help="MSDM: fp32 or bf16. Default: fp32.")]
Seed = Annotated[
    int,
    typer.Option(min=SEED.low, metavar="N", help="The same seed draws the same images of the same prompts."),
]
BatchSize = Annotated[
    int, typer.Option(min=BATCH_SIZE.low, max=BATCH_SIZE.high, metavar="N", help="Images drawn at a time.")
]
Workers = Annotated[int, typer.Option(min=1, metavar="N", help="Ray actors that draw and look; 1 needs no Ray.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser first, a minute or more: for thousands of images.")
]
Cache = Annotated[
    str | None, typer.Option(help="Where features of real images are kept. Default: features/ beside the evaluation.")
]


def check_model(uri: str, *, may_be_images: bool = False) -> None:
    """Raise UserError, before PyTorch is imported, if there is no such model."""
    from trainers.model_source import check_name

    check_name(uri, may_be_images=may_be_images)
    ask(uri)
    if uri.startswith("models:/"):
        from cluster.registry import RegisteredModel

        RegisteredModel.of(uri)


def check_asked(data: str, extractors: Sequence[str] | None) -> None:
    """Raise UserError, before PyTorch is imported, for shards that are not there and for an unknown extractor."""
    from data_shards.manifest import Manifest
    from trainers.fidelity.extractor_uris import kind_of

    for uri in extractors or ():
        kind_of(uri)
    ask(data)
    Manifest.load(data)


def request_of(
    data: str,
    *,
    splits: Sequence[str] | None,
    num_samples: int,
    images_per_prompt: int,
    extractors: Sequence[str] | None,
    seed: int,
    batch_size: int,
    compile: bool,
    **settings: float | str | None,
) -> "Request":
    """The evaluation that the options ask for; `settings` are those of drawing, None where the model's own hold."""
    from trainers.evaluate import Request

    return Request(
        shards=data,
        splits=tuple(splits) if splits else None,
        num_samples=num_samples,
        images_per_prompt=images_per_prompt,
        seed=seed,
        extractors=tuple(extractors or ("random-vgg",)),
        settings={name: value for name, value in settings.items() if value is not None},
        batch_size=batch_size,
        compile=compile,
    )
