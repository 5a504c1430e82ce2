"""The report: what it says, that it needs nothing beside it, and how a real browser shows it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.conftest import DATA
from tests.trainers.evaluations import extractor, made_evaluation, measure, neighbour
from trainers.evaluate import missing_alignment
from trainers.fidelity.evaluation import Evaluation, Neighbour
from trainers.fidelity.measures import measure_features, memorization_measures
from trainers.fidelity.report import (
    CopyPair,
    FeatureMap,
    PromptRow,
    feature_map,
    few_for_copies,
    public,
    repeat_command,
    write_report,
)

HOSTILE = "<script>alert(1)</script> & a \"large\" 'polyp' {{ 7 * 6 }}"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def real_image(number: int) -> bytes:
    return sorted((DATA / "colonoscopy" / "images").glob("*.jpg"))[number].read_bytes()


def generated_image(number: int) -> bytes:
    """Not generated, but as generated images come: small PNGs."""
    png = io.BytesIO()
    picture = Image.open(io.BytesIO(real_image(number))).resize((96, 96)).filter(ImageFilter.GaussianBlur(2))
    picture.save(png, "PNG")
    return png.getvalue()


def some_map(num_generated: int = 60) -> FeatureMap:
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(40, 8)), rng.normal(size=(num_generated, 8))
    return feature_map("inception", real.astype(np.float32), generated.astype(np.float32))


def prompt_rows() -> list[PromptRow]:
    return [
        PromptRow("a large polyp", [generated_image(i) for i in range(4)], [real_image(i) for i in range(4)]),
        PromptRow(HOSTILE, [generated_image(5)], []),
    ]


def copy_pairs(neighbours: tuple[Neighbour, ...]) -> list[CopyPair]:
    return [CopyPair(generated_image(found.sample), real_image(found.sample), found) for found in neighbours]


def page(folder: Path, evaluation: Evaluation, **changes: Any) -> str:
    out = folder / "report.html"
    contents: dict[str, Any] = {"prompts": [], "pairs": [], "feature_map": None}
    write_report(evaluation, **(contents | changes), out=str(out))
    return out.read_text()


def text_of(markup: str) -> str:
    """What a reader sees of the body, tags left out and spaces run together."""
    body = markup.partition("<body>")[2]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_what_a_reader_must_be_told_is_told(tmp_path: Path) -> None:
    evaluation = made_evaluation()
    markup = page(tmp_path, evaluation)
    text = text_of(markup)
    for said in (
        "Evaluation · 24 November 2026, 20:07 UTC msdm-medvqa-gi 3",
        "Not for diagnosis",
        "models:/msdm-medvqa-gi/3 msdm, 123,456,789 parameters digest mmmmmmmmmmmm run rrrrrrrrrrrr",
        "medvqa-gi, test · 500 images digest dddddddddddd",
        "1,000 at 256 × 256 · seed 0 0.42 s an image on NVIDIA H100",
        "guidance_scale 4.0 num_inference_steps 50",
        "1,000 images were drawn for 4 different prompts with seed 0, and compared with 500 real images",
        "In figures: FID 23.4 (21.9 to 24.9); CLIP score 28.13 (27.95 to 28.30); Recall (inception) 0.431",
        "FID Fréchet distance of Gaussians (Heusel et al. 2017) ↓ 23.4 21.9 to 24.9 inception 1,000 500",
        "↑ 28.13 27.95 to 28.30 clip 1,000 –",
        "a small polyp 250 120 0.66 0.50",
        "inception , 2,048 dimensions From inception.safetensors Resizing to 299 x 299, bicubic, antialiased",
        f"Digest {evaluation.extractors['inception'].digest}",
        f"Model digest {'m' * 64} Data digest {'d' * 64}",
        "medsynth 0.1.0, commit 0123456789ab",
        "12.5 GPU-hours, each of one NVIDIA H100, 9.1 kWh",
        repeat_command(evaluation),
    ):
        assert said in text, said
    assert "<title>msdm-medvqa-gi 3 · evaluation</title>" in markup


def test_the_command_repeats_the_evaluation() -> None:
    assert repeat_command(made_evaluation()) == (
        "medsynth evaluate models:/msdm-medvqa-gi/3 --data s3://data/medvqa-gi --split test --num-samples 1000 "
        "--extractor inception.safetensors --extractor clip.safetensors --seed 0 --images-per-prompt 2 "
        "--batch-size 8 --guidance-scale 4.0 --num-inference-steps 50"
    )
    of_folder = made_evaluation(generation=None)
    assert "--seed" not in repeat_command(of_folder)


def test_what_is_said_of_intervals_is_how_they_were_taken(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    halves = measure_features("random_vgg", features[:20], features[20:], seed=0, num_bootstrap=4)
    text = text_of(page(tmp_path, made_evaluation(measures=halves)))
    assert "With 95 % intervals by half samples without replacement." in text
    assert "bootstrap" not in text
    copies, _ = memorization_measures("random_vgg", features, features[:20], features[20:], ["k"] * 20, seed=0)
    text = text_of(page(tmp_path, made_evaluation(measures=halves | copies)))
    assert "by half samples without replacement and the exact method of Clopper and Pearson (1934)." in text


def test_where_neither_less_nor_more_is_better_the_best_is_named(tmp_path: Path) -> None:
    nearer = measure(0.4, (0.3, 0.5), better=None, chance=0.5)
    markup = page(tmp_path, made_evaluation(measures={"nearer_to_training_inception": nearer}))
    assert "0.40 0.5 is best 0.30 to 0.50" in text_of(markup)
    assert 'title="lower is better"' not in markup


def test_no_path_of_somebodys_machine_is_on_the_page(tmp_path: Path) -> None:
    home = "/home/somebody/study"
    evaluation = made_evaluation()
    markup = page(
        tmp_path,
        made_evaluation(
            model=evaluation.model.model_copy(update={"uri": f"{home}/runs/first"}),
            reference=evaluation.reference.model_copy(update={"shards": f"file://{home}/shards/"}),
            extractors={"inception": extractor("inception").model_copy(update={"uri": f"inception:{home}/w.pth"})},
        ),
    )
    assert "somebody" not in markup
    assert "medsynth evaluate first --data shards --split test" in text_of(markup)
    assert "--extractor inception:w.pth" in text_of(markup)


@pytest.mark.parametrize("uri", ["models:/m/3", "runs:/abc/model", "s3://data/set", "random-vgg:64", "shards", "a/b"])
def test_names_that_hold_anywhere_stay(uri: str) -> None:
    assert public(uri) == uri


def test_settings_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    drawn = made_evaluation().generation
    assert drawn is not None
    settings = {"negative_prompt": "", "guidance_scale": 4.0}
    text = text_of(page(tmp_path, made_evaluation(generation=drawn.model_copy(update={"settings": settings}))))
    assert "negative_prompt" not in text
    assert "guidance_scale 4.0" in text


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.1, 0.3), "The images show their prompts more often than by chance: Caption alignment (dinov2) 0.20"),
        ((-0.1, 0.5), "That the images show what their prompts ask for cannot be told from chance"),
        ((-0.3, -0.1), "The images show something else than their prompts more often than by chance"),
        (None, "was not measured: no prompt is the caption of 10 real images or more, but not of all."),
    ],
)
def test_a_word_on_whether_prompts_are_obeyed(tmp_path: Path, interval: tuple[float, float] | None, said: str) -> None:
    name = "caption_alignment_dinov2"
    value = sum(interval) / 2 if interval else 0.0
    measures = {name: measure(value, interval, better="higher", extractor="dinov2")} if interval else {}
    missing = {} if interval else missing_alignment("dinov2", {}, ["a polyp"])
    text = text_of(page(tmp_path, made_evaluation(measures=measures, missing=missing)))
    assert said in text


@pytest.mark.parametrize(
    ("high", "num_generated", "said"),
    [
        (0.206, 16, "16 images are too few to tell whether more than 5 % are copies: up to 20.6 % may be: draw 230."),
        (0.0123, 300, None),
    ],
)
def test_too_few_images_for_copies_are_told(high: float, num_generated: int, said: str | None) -> None:
    rate = measure(0.0, (0.0, high), num_generated=num_generated, chance=0.01)
    told = list(few_for_copies(made_evaluation(measures={"copy_rate_inception": rate})))
    assert told == ([said] if said else [])


def test_limits_are_told_only_where_they_hold(tmp_path: Path) -> None:
    few = text_of(page(tmp_path, made_evaluation()))
    assert "FID was taken on no more images (500) than its features have dimensions (2,048)" in few
    assert "published FID" not in few

    measures = {"fid_random_vgg": measure(5.0, extractor="random_vgg", num_generated=9000, num_real=9000)}
    many = text_of(
        page(tmp_path, made_evaluation(measures=measures, extractors={"random_vgg": extractor("random_vgg")}))
    )
    assert "FID (random_vgg) was not taken on Inception features: set it beside no published FID." in many
    assert "no more images" not in many
    assert "FID (random_vgg) Fréchet distance of Gaussians (Heusel et al. 2017) ↓ 5.00 – random_vgg" in many


@pytest.mark.parametrize(
    ("num_suspicious", "num_training_images", "said"),
    [
        (0, 2000, "None of the 1,000 images comes nearer to one of the 2,000 training images"),
        (1, 2000, "1 of the 1,000 images comes nearer to one of the 2,000 training images"),
        (3, 2000, "3 of the 1,000 images come nearer"),
        (64, 2000, "At least 64 of the 1,000 images come nearer"),
        (0, 0, "Copies of training images were not looked for."),
    ],
)
def test_suspicious_samples_are_counted(
    tmp_path: Path, num_suspicious: int, num_training_images: int, said: str
) -> None:
    reference = made_evaluation().reference.model_copy(update={"num_training_images": num_training_images})
    found = tuple(neighbour(i, is_suspicious=True) for i in range(num_suspicious))
    text = text_of(page(tmp_path, made_evaluation(reference=reference, neighbours=found)))
    assert text.count(said) == 2  # in the verdict and over the pairs


def test_suspicious_pairs_come_before_the_others(tmp_path: Path) -> None:
    found = tuple(neighbour(i, is_suspicious=i == 1) for i in range(3))
    text = text_of(page(tmp_path, made_evaluation(neighbours=found), pairs=copy_pairs(found)))
    places = [text.index(f"Training train-000{i}") for i in (1, 0, 2)]
    assert places == sorted(places)
    assert "“" not in text  # quotation marks are the style sheet's
    assert "a small polyp Distance 0.0200 · nearer than held-out images usually come" in text


def test_captions_and_names_are_text_never_markup(tmp_path: Path) -> None:
    evaluation = made_evaluation(
        HOSTILE,
        samples=({"prompt": HOSTILE},),
        classes=({"caption": HOSTILE, "num_generated": 1, "num_real": 1, "precision": 1, "recall": 1},),
        neighbours=({"sample": 0, "key": HOSTILE, "distance": 0.1, "is_suspicious": True},),
    )
    markup = page(tmp_path, evaluation, prompts=prompt_rows(), pairs=copy_pairs(evaluation.neighbours))
    assert "<script" not in markup
    assert "{{ 7 * 6 }}" in markup
    assert text_of(markup).count(HOSTILE) >= 4
    inside_attributes = re.findall(r'alt="([^"]*)"', markup)
    assert any(html.unescape(alt).endswith(HOSTILE) for alt in inside_attributes)


def test_nothing_is_asked_from_anywhere(tmp_path: Path) -> None:
    found = (neighbour(0, is_suspicious=True),)
    markup = page(tmp_path, made_evaluation(), prompts=prompt_rows(), pairs=copy_pairs(found), feature_map=some_map())
    sources = re.findall(r'\b(?:src|href|srcset|data|action|poster)="([^"]*)"', markup)
    assert len(sources) > 10
    assert all(source.startswith("data:") for source in sources), sources
    assert not re.search(r"url\(|@import|https?://|<link rel=\"stylesheet", markup)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in markup


def test_an_evaluation_of_a_folder_without_anything_optional(tmp_path: Path) -> None:
    bare = made_evaluation(
        model={"uri": "pictures", "name": "pictures", "digest": "f" * 64},
        generation=None,
        measures={},
        classes=(),
        extractors={},
        training={},
    )
    text = text_of(page(tmp_path, bare))
    assert "1,000 images were given, and compared with 500 real images" in text
    assert "Nothing was measured." in text
    assert "None" not in text.replace("None of the", "")
    for left_out in ("By caption", "Feature map", "Training device", "In figures"):
        assert left_out not in text


def inlined(markup: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/\w+;base64,([^"]*)"', markup)]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_large_images_are_made_small_and_small_ones_left_as_they_are(tmp_path: Path) -> None:
    frame = Image.open(io.BytesIO(real_image(0))).convert("RGB")
    small = [encoded(frame.resize((256, 200)), "PNG"), encoded(frame.resize((64, 256)), "JPEG")]
    large = [
        encoded(frame.resize((1024, 512)), "PNG"),
        encoded(frame.resize((257, 100)), "JPEG"),
        encoded(frame.resize((512, 512)).convert("P"), "PNG"),
        encoded(frame.resize((512, 512)).convert("RGBA"), "PNG"),
    ]
    shown = inlined(page(tmp_path, made_evaluation(), prompts=[PromptRow("x", small, large)]))
    assert shown[:2] == small
    thumbnails = [Image.open(io.BytesIO(image)) for image in shown[2:]]
    assert [(image.format, image.size) for image in thumbnails] == [
        ("JPEG", (256, 128)),
        ("JPEG", (256, 100)),
        ("JPEG", (256, 256)),
        ("JPEG", (256, 256)),
    ]
    expected = np.asarray(frame.resize((256, 128), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(thumbnails[0], dtype=float) - expected).mean() < 4  # of 255


def test_a_photograph_stays_upright(tmp_path: Path) -> None:
    frame = Image.open(io.BytesIO(real_image(0))).convert("RGB").resize((600, 300))
    exif = Image.Exif()
    exif[0x0112] = 6  # held a quarter turn: to be shown 300 wide and 600 high
    turned = encoded(frame, "JPEG", exif=exif)
    (shown,) = inlined(page(tmp_path, made_evaluation(), prompts=[PromptRow("x", [turned], [])]))
    assert Image.open(io.BytesIO(shown)).size == (128, 256)


def test_a_page_of_many_large_pairs_can_still_be_sent(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)  # no image compresses worse
    png = encoded(Image.fromarray(noise), "PNG", compress_level=1)
    found = tuple(neighbour(i, is_suspicious=False) for i in range(4))
    markup = page(tmp_path, made_evaluation(), pairs=[CopyPair(png, png, near) for near in found])
    assert len(inlined(markup)) == 8
    assert len(markup) * 16 < 10_000_000  # were there 64 pairs


def test_an_image_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither PNG nor JPEG: it begins with b'GIF89a'"):
        page(tmp_path, made_evaluation(), prompts=[PromptRow("x", [b"GIF89a"], [])])
    assert not (tmp_path / "report.html").exists()


def test_the_map_shows_the_directions_in_which_real_features_vary() -> None:
    rng = np.random.default_rng(0)
    spread = np.array([0.1, 9.0, 0.1, 3.0, 0.1])
    real = (rng.normal(size=(500, 5)) * spread).astype(np.float32)
    generated = real + np.array([50, 0, 0, 0, 0], np.float32)  # apart only where the real ones hardly vary
    found = feature_map("x", real, generated)
    assert found.real.shape == (500, 2)
    assert sum(found.explained) == pytest.approx((81 + 9) / (81 + 9 + 0.03), abs=0.01)
    assert np.std(found.real, axis=0) == pytest.approx([9, 3], rel=0.1)
    assert np.abs(found.generated - found.real).max() < 3


def test_a_map_of_many_points_draws_some_and_says_so(tmp_path: Path) -> None:
    markup = page(tmp_path, made_evaluation(), feature_map=some_map(num_generated=4000))
    assert "40 of 40 real and 1,500 of 4,000 generated images are drawn." in text_of(markup)
    points = re.findall(r'<circle class="(\w+)" cx="([\d.]+)" cy="([\d.]+)"', markup)
    kinds = [kind for kind, _, _ in points]
    assert (kinds.count("real"), kinds.count("generated")) == (40, 1500)
    height = float(re.findall(r'viewBox="0 0 1000 ([\d.]+)"', markup)[0])
    assert all(0 < float(x) < 1000 and 0 < float(y) < height for _, x, y in points)


# --- in a real browser ---

# Frames of a phone's and a desktop's width; a script outside the report looks at what the browser made of it.
PROBE = """<!doctype html><body><pre id="seen"></pre>
<iframe srcdoc="{phone}" width="400" height="800"></iframe>
<iframe srcdoc="{desktop}" width="1280" height="800"></iframe>
<script>
onload = () => {{
  const seen = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, root = page.documentElement;
    return {{
      width: root.clientWidth,
      scrollWidth: root.scrollWidth,
      images: [...page.images].map(image => image.naturalWidth),
      requests: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
      columns: page.defaultView.getComputedStyle(page.querySelector(".sides")).gridTemplateColumns.split(" ").length,
    }};
  }});
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script>"""


def browse(phone: str, desktop: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """What a browser sees of the pages in the two frames, and the messages on its console."""
    assert CHROMIUM is not None
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(phone=html.escape(phone), desktop=html.escape(desktop)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1800,900", "--enable-logging=stderr"]
    done = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout)
    assert found is not None, done.stderr
    messages = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(found[1])), messages


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on PATH")
def test_a_browser_shows_all_of_it_and_asks_for_nothing(tmp_path: Path) -> None:
    found = tuple(neighbour(i, is_suspicious=i < 1) for i in range(3))
    evaluation = made_evaluation("a-model-with-a-very-long-name-" * 4, neighbours=found)
    rows = prompt_rows()
    markup = page(tmp_path, evaluation, prompts=rows, pairs=copy_pairs(found), feature_map=some_map())
    (phone, desktop), messages = browse(markup, markup, tmp_path)
    assert messages == []
    assert phone["scrollWidth"] == phone["width"]
    assert desktop["scrollWidth"] == desktop["width"]
    assert 380 <= phone["width"] <= 400
    assert (phone["columns"], desktop["columns"]) == (1, 2)
    for seen in (phone, desktop):
        assert len(seen["images"]) == 4 + 4 + 1 + 2 * len(found)
        assert min(seen["images"]) >= 96
        assert seen["requests"] == []

    # The same eyes do see what is too wide, and a request: stopped by the page's policy, and made without it.
    address = "http://127.0.0.1:9/x.png"
    wrong = markup.replace("<main>", f'<main><img src="{address}"><p style="width: 500px">wide</p>', 1)
    without_policy = wrong.replace("Content-Security-Policy", "ignored")
    (phone, desktop), messages = browse(wrong, without_policy, tmp_path)
    assert any("violates" in message and "Content Security Policy" in message for message in messages), messages
    assert phone["scrollWidth"] > phone["width"]
    assert min(phone["images"]) == 0
    assert desktop["requests"] == [address]
