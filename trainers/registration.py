"""What a registered version carries beside its pipeline: how to serve it, what it is, and the code that made it.

MODEL/model_index.json, unet/, ...   the pipeline, as diffusers opens it
MODEL/recipe.yaml                    the experiment
MODEL/README.md                      the model card
MODEL/preview.png                    pictures of the recipe's prompts, drawn in training
MODEL/MLmodel                        the description that MLflow serves by: `mlflow models serve -m models:/NAME/1`
MODEL/serving.py, code/              trainers/serving.py and all that it imports of this project
MODEL/requirements.txt               the packages it ran with
"""

import json
import platform
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from cluster import storage
from cluster.registry import CODE_FOLDER, MODEL_FOLDER, describe_pyfunc, register
from cluster.tracking import Tracker, explained
from data_shards import Manifest
from trainers.model_source import ADAPTERS, INDEX
from trainers.recipe import MSDMRecipe, Recipe, dump_recipe
from trainers.run_folder import finished_model
from trainers.serving import SIGNATURE

CODE_PACKAGES = ("cluster", "data_shards", "trainers")
REQUIREMENTS = (
    *("accelerate", "boto3", "diffusers", "huggingface-hub", "mlflow", "numpy", "pandas", "peft", "pillow"),
    *("pyarrow", "pydantic", "pyyaml", "safetensors", "torch", "transformers", "webdataset"),
)


FIGURES = re.compile(r"fidelity/.+|[^/]+/(validation_)?loss")
"""Metrics of a run that say how good a model is; others, as mfu and grad_norm, say how its training went."""
PREVIEW = "preview.png"


def register_model(
    recipe: Recipe,
    manifest: Manifest,
    model: str,
    tracker: Tracker,
    *,
    name: str,
    artifact_folder: str = MODEL_FOLDER,
    preview: str | None = None,
) -> int:
    """Make the finished pipeline at `model` (a folder or s3:// prefix) the next version of the registered model `name`.

    Its files are the run's artifacts in `artifact_folder`. Weights go there from `model` as they are: only what lies
    beside them is written first, to a folder of its own. `preview` is a PNG file of pictures that it drew of its
    recipe's prompts, for its card.
    """
    with explained(tracker.tracking_uri):
        run = tracker.client.get_run(tracker.run_id)
    commit = run.data.tags.get("git_commit", "unknown")
    tags = {"manifest_digest": manifest.digest, "recipe": recipe.name, "family": recipe.family, "git_commit": commit}
    with finished_model(model) as pipeline, TemporaryDirectory() as temporary:
        beside = Path(temporary)
        licences = sorted(path.name for path in pipeline.glob("LICENSE*"))
        card = model_card(
            recipe,
            manifest,
            name=name,
            run_id=tracker.run_id,
            commit=commit,
            licences=licences,
            metrics=run.data.metrics,
            has_preview=preview is not None,
            is_adapter=not (pipeline / INDEX).is_file(),
        )
        if preview is not None:
            (beside / PREVIEW).write_bytes(storage.read_bytes(preview))
        (beside / "README.md").write_text(card)
        (beside / "recipe.yaml").write_text(dump_recipe(recipe))
        write_serving(beside, tracker, artifact_folder)
        return register(tracker, [pipeline, beside], name=name, tags=tags, artifact_folder=artifact_folder)


def write_serving(folder: Path, tracker: Tracker, artifact_folder: str = MODEL_FOLDER) -> None:
    """Write what MLflow needs to serve the pipeline that `folder` is uploaded beside, the weights excepted."""
    root = Path(__file__).parents[1]
    for package in CODE_PACKAGES:
        for path in (root / package).rglob("*.py"):
            target = folder / CODE_FOLDER / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(root / "trainers" / "serving.py", folder / "serving.py")
    # Builds such as 2.13.0+cpu are of one machine.
    pinned = [f"{package}=={version(package).partition('+')[0]}\n" for package in REQUIREMENTS]
    (folder / "requirements.txt").write_text("".join(pinned))
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment))
    describe_pyfunc(
        folder, code_file="serving.py", signature=SIGNATURE, tracker=tracker, artifact_folder=artifact_folder
    )


def model_card(
    recipe: Recipe,
    manifest: Manifest,
    *,
    name: str,
    run_id: str,
    commit: str,
    licences: list[str],
    metrics: Mapping[str, float],
    has_preview: bool = False,
    is_adapter: bool = False,
) -> str:
    """README.md of a version, in the form of Mitchell et al. (2019), "Model Cards for Model Reporting".

    `licences` are the files beside the weights that a pretrained model came with.
    """
    samples = sum(shard.num_samples for shard in manifest.shards)
    training = manifest.split("train")
    of_data = ", ".join(f"{licence or 'not stated'} ({count} images)" for licence, count in manifest.licences.items())
    base = recipe.text_encoder.pretrained if isinstance(recipe, MSDMRecipe) else recipe.pretrained
    begun_with = "text encoder" if isinstance(recipe, MSDMRecipe) else "whole pipeline"
    of_weights = f"see {', '.join(licences)} beside this file" if licences else f"those of `{base}`"
    figures = [f"| {key} | {value:.6g} |" for key, value in sorted(metrics.items()) if FIGURES.fullmatch(key)]
    front = yaml.safe_dump({"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["medical"]})
    return f"""---
{front}---
# {name}

A {recipe.family.upper()} text-to-image model of {manifest.name} images at {recipe.data.resolution} × \
{recipe.data.resolution} pixels. Every picture it draws is synthetic.
{_pictures(recipe) if has_preview else ""}
## Intended use
Research on synthetic medical images: augmentation, teaching, study of generative models. Not for diagnosis, nor for any
decision about a patient, and not as evidence of what a finding looks like.

## How it was made
- recipe `{recipe.name}`, whole in `recipe.yaml`; seed {recipe.seed}
- begun with: {begun_with} of `{base}`
- code: medsynth {version("medsynth")}, commit `{commit}`, in `{CODE_FOLDER}/`
- MLflow run `{run_id}`

## Data
- `{manifest.name}`: {samples} images, of which {sum(shard.num_samples for shard in training)} trained it; \
digest `{manifest.digest}`
- split: {manifest.split_rule}

## Licences
- of the data: {of_data}
- of the weights it began with: {of_weights}; what was made from them may be bound by both

## Figures
{_table(figures)}

How good its pictures are is measured by evaluations: MLflow runs below the run that trained it, each with its report.
`medsynth evaluate` makes them, and this sets them beside another version's:
```
medsynth compare models:/{name}/VERSION models:/{name}/OTHER_VERSION
```

## Limits
- It knows the captions' words and the images of one data set; of others it invents.
- A model may repeat images it was trained on. `medsynth promote` measures how often, and writes the figures and
  what was decided to this version's tags.
- Rare findings are drawn worse than frequent ones, and whatever bias the data have, its pictures have.

## How to open it
```
medsynth generate --model models:/{name}/VERSION --prompt "..." --out pictures
mlflow models serve -m models:/{name}/VERSION --env-manager local
curl 127.0.0.1:5000/invocations -H 'Content-Type: application/json' \\
  -d '{{"dataframe_records": [{{"prompt": "...", "seed": 0}}]}}'      # PNG in base64
```
In Python, from a folder:
```
mlflow artifacts download -u models:/{name}/VERSION -d model
```
```python
{_python(recipe, is_adapter=is_adapter)}
```
"""


def _pictures(recipe: Recipe) -> str:
    prompts = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(recipe.sampling.prompts, start=1))
    return f"""
![Pictures of the prompts below, in their order]({PREVIEW})

Drawn at the end of training, all synthetic, row by row:

{prompts}
"""


def _python(recipe: Recipe, *, is_adapter: bool) -> str:
    """Code that opens the model in the folder `model` and draws a picture, without medsynth being installed."""
    prompt = json.dumps(recipe.sampling.prompts[0], ensure_ascii=False)  # a text of Python too
    draw = f'pipeline({prompt}).images[0].save("picture.png")'
    if isinstance(recipe, MSDMRecipe):
        return f"""import sys
from diffusers import DiffusionPipeline

sys.path.insert(0, "model/{CODE_FOLDER}")  # its class, of medsynth: look at it before you trust it
pipeline = DiffusionPipeline.from_pretrained("model", custom_pipeline="model", trust_remote_code=True)
{draw}"""
    if is_adapter:
        return f"""from diffusers import FluxPipeline

pipeline = FluxPipeline.from_pretrained("{recipe.pretrained}")
pipeline.load_lora_weights("model", weight_name="{ADAPTERS}")
{draw}"""
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("model")
{draw}"""


def _table(rows: list[str]) -> str:
    if not rows:
        return "None was recorded when it was registered."
    return "\n".join(["The last of each in training:", "", "| metric | value |", "|---|---|", *rows])
