"""Every recipe is a run that starts: its keys are known and its targets match a model."""

import pathlib

import pytest

from tiny_run import ROOT, make_run, moesaic

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_finds_its_sites(recipe, tmp_path):
    folder = make_run(tmp_path).parent
    result = moesaic("train", recipe, f"model_name_or_path={folder / 'model'}", f"dataset={folder / 'rows.jsonl'}",
                     "template=none", f"output_dir={tmp_path / 'unused'}", "--dry-run")
    assert result.returncode == 0, result.stderr
    method = recipe.stem.split("_")[0]
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if not line.startswith(" "))
    assert lines["method"].startswith(method)
    # The tiny model has 2 layers; every method takes its keys.
    assert "k_proj 2" in lines["sites"]
    assert int(lines["trainable"].split()[0]) > 0
    assert not pathlib.Path(tmp_path / "unused").exists(), "a dry run writes nothing"


def test_a_misspelt_key_is_named_with_the_nearest(tmp_path):
    result = moesaic("train", RECIPES[0], "lerning_rate=1", "--dry-run")
    assert result.returncode == 2
    assert "lerning_rate" in result.stderr and "did you mean 'learning_rate'" in result.stderr
