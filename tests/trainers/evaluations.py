"""Evaluations made by hand, for tests of what is done with them."""

from typing import Any

from trainers.fidelity.evaluation import (
    ClassMeasure,
    Evaluation,
    ExtractorRecord,
    Generation,
    Measure,
    ModelRecord,
    Neighbour,
    Reference,
    SampleRecord,
    TrainingCost,
)

PROMPTS = ("a large polyp", "a small polyp", "a polyp", "a clean colon")


def measure(value: float, interval: tuple[float, float] | None = None, **changes: Any) -> Measure:
    """A Fréchet distance on Inception features, unless changed."""
    known: dict[str, Any] = {
        "better": "lower",
        "extractor": "inception",
        "num_generated": 1000,
        "num_real": 500,
        "about": "Fréchet distance of Gaussians (Heusel et al. 2017)",
    }
    return Measure(value=value, interval=interval, **(known | changes))


def extractor(label: str, dim: int = 2048) -> ExtractorRecord:
    return ExtractorRecord(
        uri=f"{label}.safetensors", digest=f"{label:0<64}", dim=dim, resize="to 299 x 299, bicubic, antialiased"
    )


def made_evaluation(name: str = "msdm-medvqa-gi 3", **changes: Any) -> Evaluation:
    """One whole evaluation; `changes` replace fields."""
    known: dict[str, Any] = {
        "created": "2026-11-24T20:07:44+00:00",
        "medsynth_version": "0.1.0",
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "model": ModelRecord(
            uri="models:/msdm-medvqa-gi/3",
            name=name,
            digest="m" * 64,
            family="msdm",
            num_parameters=123_456_789,
            run_id="r" * 32,
        ),
        "reference": Reference(
            shards="s3://data/medvqa-gi",
            name="medvqa-gi",
            digest="d" * 64,
            splits=("test",),
            num_images=500,
            num_training_images=2000,
        ),
        "generation": Generation(
            seed=0,
            settings={"guidance_scale": 4.0, "num_inference_steps": 50},
            images_per_prompt=2,
            batch_size=8,
            resolution=256,
            device="NVIDIA H100",
            seconds_per_image=0.42,
        ),
        "samples": tuple(SampleRecord(prompt=PROMPTS[i % len(PROMPTS)]) for i in range(1000)),
        "measures": {
            "fid": measure(23.41, (21.93, 24.88)),
            "kid": measure(0.01234, (0.0112, 0.0135), about="Unbiased MMD, cubic kernel (Bińkowski et al. 2018)"),
            "precision_inception": measure(
                0.712, (0.69, 0.734), better="higher", about="Improved precision (Kynkäänniemi et al. 2019)"
            ),
            "recall_inception": measure(
                0.431, (0.398, 0.46), better="higher", about="Improved recall (Kynkäänniemi et al. 2019)"
            ),
            "clip_score": measure(
                28.13,
                (27.95, 28.3),
                better="higher",
                extractor="clip",
                num_real=0,
                about="100 x cosine of image and prompt (Hessel et al. 2021)",
            ),
            "copy_rate_inception": measure(
                0.002, (0.0, 0.005), num_real=2000, about="Share nearer to the training set than held-out images"
            ),
        },
        "classes": (
            ClassMeasure(caption="a large polyp", num_generated=250, num_real=130, precision=0.74, recall=0.41),
            ClassMeasure(caption="a small polyp", num_generated=250, num_real=120, precision=0.66, recall=0.5),
        ),
        "extractors": {"inception": extractor("inception"), "clip": extractor("clip", 512)},
        "training": TrainingCost(gpu_hours=12.5, device="NVIDIA H100", energy_kwh=9.1),
    }
    return Evaluation.model_validate(known | changes)


def neighbour(sample: int, *, is_suspicious: bool) -> Neighbour:
    return Neighbour(
        sample=sample, key=f"train-{sample:04d}", distance=0.01 * (sample + 1), is_suspicious=is_suspicious
    )
