from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.errors import UserError
from trainers.families import block_cache
from trainers.recipe import MSDMRecipe, at_absolute_paths, dump_recipe, load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_every_shipped_recipe_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert len(RECIPES) >= 3
    for path in RECIPES:
        recipe = load_recipe(str(path))
        (tmp_path / path.name).write_text(dump_recipe(recipe))
        assert load_recipe(str(tmp_path / path.name)) == recipe


def test_overrides_reach_nested_keys(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file), ["denoiser.training.learning_rate=3e-4", "data.horizontal_flip=true"])
    assert isinstance(recipe, MSDMRecipe)
    assert recipe.denoiser.training.learning_rate == 3e-4
    assert recipe.data.horizontal_flip is True


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("denoiser.training.learning_rat=1e-4", "did you mean 'learning_rate'"),
        ("denoiser.training.learning_rat=1e-4", "unknown key 'denoiser.training.learning_rat'"),
        ("dato.shards=x", "did you mean 'data'"),
        ("denoiser.noise.prediction_type=eps", "denoiser.noise.prediction_type"),
        ("vae.training.steps=many", "not 'many'"),
        ("vae.training.steps=-1", "greater than 0"),
        (
            "denoiser.noise.zero_terminal_snr=true denoiser.noise.prediction_type=epsilon",
            "needs prediction_type v_prediction",
        ),
        ("vae.training.micro_batch_size=3", "not a multiple of"),
        ("vae.architecture.block_out_channels=[8,8,8,8,8]", "latents of side 1"),
        ("cluster.num_workers=3", "x 3 workers"),
        ("cluster.num_workers=[1,3]", "x 3 workers"),
        ("cluster.num_workers=[2,1]", "num_workers [2, 1] is no range: give [fewest, most]"),
        ("cluster.num_workers=0", "greater than 0"),
        ("cluster.num_workers=[2,x]", "cluster.num_workers: [2, 'x'] is neither a number greater than 0 nor"),
        ("denoiser.architecture.cross_attention=[true]", "cross_attention has 1 levels"),
        ("fidelity.every_steps=3", "fidelity.every_steps 3 is not a multiple of checkpoint_every_steps 2"),
        ("fidelity.every_step=2", "did you mean 'every_steps'"),
        ("fidelity.num_samples=8", "missing key 'fidelity.every_steps'"),
        ("seed", "write it as key=value"),
        ("name.first=x", "'name' is a value"),
        ("sampling.prompts=[]", "sampling.prompts"),
        ("name=../evil", "name"),
        (f"name={'x' * 300}", "name"),
        ("tracking.register_as=team/polyp", "tracking.register_as: 'team/polyp' cannot name a registered model"),
        ("tracking.register_as=Crohn's", "leave out each of"),
        ("tracking.register_as=''", "it is empty"),
        ("tracking.experiment=''", "tracking.experiment: '' cannot name an experiment"),
        ("cluster.storage=gs://bucket/runs", "is neither a folder nor s3://BUCKET/PREFIX"),
        ("cluster.storage=s3:/bucket/runs", "is neither a folder nor s3://BUCKET/PREFIX"),
        ("cluster.storage=s3://", "is neither a folder nor s3://BUCKET/PREFIX"),
        ("data.shards=''", "names no place"),
        ("vae.training.learning_rate=.inf", "finite"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(recipe_file: Path, overrides: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe_file), overrides.split())
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(recipe_file: Path, recipe_document: dict[str, Any]) -> None:
    del recipe_document["data"]["shards"]
    recipe_file.write_text(yaml.safe_dump(recipe_document))
    with pytest.raises(UserError, match=r"missing key 'data\.shards'"):
        load_recipe(str(recipe_file))


@pytest.mark.parametrize("text", ["just words", "a: [1", "", "!!python/object/apply:os.system ['true']"])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        load_recipe(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_recipe(str(tmp_path / "nowhere.yaml"))


def test_a_cache_is_on_the_machines_own_disk(
    recipe_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_document["data"]["cache"] = {"folder": "cache", "max_gigabytes": 0.5}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_document))
    monkeypatch.chdir(tmp_path)
    cache = at_absolute_paths(load_recipe(str(path))).data.cache
    assert cache is not None
    assert cache.folder == str(tmp_path / "cache")
    assert block_cache(cache) is not None
    assert (tmp_path / "cache").is_dir()
    with pytest.raises(UserError, match=r"data\.cache\.folder.*no folder of a machine's own disk"):
        load_recipe(str(path), ["data.cache.folder=s3://bucket/cache"])
