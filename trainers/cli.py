"""The commands `medsynth train` and `medsynth generate`."""

import shlex
import signal
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress as ProgressBar

from trainers.recipe import load_recipe
from trainers.watch import Watch, summarize

console = Console(highlight=False)


def train(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file or s3:// URI.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: a.b=value. May be given several times.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="Name of the run; a run of this name that was stopped goes on.")
    ] = None,
) -> None:
    """Train a model from a recipe, record it in MLflow and register it.

    medsynth train recipes/msdm-demo.yaml --set denoiser.training.learning_rate=3e-4 --set cluster.num_workers=2
    """
    # Ray takes seconds to import, and a wrong recipe should not have to wait for it.
    loaded = load_recipe(recipe, overrides or [])
    from trainers.launch import RunStopped, train_recipe

    name = run or f"{loaded.name}-{datetime.now():%Y%m%d-%H%M%S}"
    changes = " ".join(f"--set {shlex.quote(change)}" for change in overrides or [])
    command = f"medsynth train {shlex.quote(recipe)} {changes} --run {name}".replace("  ", " ")
    console.print(
        f"Run [bold]{name}[/] with {loaded.cluster.num_workers} workers; to resume it: {command}",
        soft_wrap=True,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is being interrupted: save first
    try:
        with Watch(console) as watch:
            trained = train_recipe(
                loaded,
                name,
                on_progress=watch.show,
                on_stop_requested=lambda: watch.say("Stopping: saving the state. Ctrl-C again to give up on it."),
            )
    except RunStopped:
        console.print(f"Stopped and saved. To go on: {command}", soft_wrap=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        console.print(f"Given up; the latest checkpoint is kept. To go on: {command}", soft_wrap=True)
        raise typer.Exit(130) from None
    summarize(console, trained, loaded.sampling.prompts[-1])


def generate(
    model: Annotated[str, typer.Option(help="models:/NAME/VERSION, models:/NAME@ALIAS, runs:/ID/model, or a folder.")],
    prompt: Annotated[str, typer.Option(help="What the pictures should show.")],
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
    negative_prompt: Annotated[str, typer.Option(help="What they should not show.")] = "",
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="Weight of the prompt; 1 is none. Default: the model's own.")
    ] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps. Default: the model's own.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at a time.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Draw pictures from a trained model.

    medsynth generate --model models:/msdm-demo/1 --prompt "Generate an image with a large polyp." --out pictures
    """
    from trainers.generate import generate as draw

    with ProgressBar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Drawing", total=num_images)
        paths = draw(
            model,
            prompt,
            out,
            negative_prompt=negative_prompt,
            num_images=num_images,
            batch_size=batch_size,
            seed=seed,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            device=device,
            on_progress=lambda done: bar.update(task, completed=done),
        )
    console.print(f"{len(paths)} pictures in {out}: {paths[0].name} to {paths[-1].name}")
