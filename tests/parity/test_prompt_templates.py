"""Prompt templates against promptsource's own rendering, row by row: prompt, answer and choices are equal to the character.

promptsource comes from tools/requirements-test-data.txt; it asks for an older Python and for much that its rendering does
not need, so its one module is imported alone. The rows are the shared data's; where a template draws words at random, ours
must be among many of promptsource's draws.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import random
import re
import sys
import types

import pytest
import yaml

import common

DATA = pathlib.Path(os.environ.get("MOESAIC_DATA_DIR", common.ROOT.parent / "shared" / "data"))
ROWS_OF_A_SET = 120
DRAWS = 1000
# Files of raw rows and the templates made for them.
SETS = {
    "p3_train/common_gen.jsonl": "common_gen",
    "p3_train/cosmos_qa.jsonl": "cosmos_qa",
    "p3_train/ecqa.jsonl": "cos_e/v1.11",
    "p3_train/qasc.jsonl": "qasc",
    "p3_train/piqa.jsonl": "piqa",
    "p3_train/openbookqa.jsonl": "openbookqa/main",
    "p3_train/arc_easy.jsonl": "ai2_arc/ARC-Easy",
    "p3_train/boolq.jsonl": "super_glue/boolq",
    "p3_train/dbpedia_14.jsonl": "dbpedia_14",
    "p3_train/paws.jsonl": "paws/labeled_final",
    "p3_train/ag_news.jsonl": "ag_news",
    "p3_train/amazon_food.jsonl": "amazon_polarity",
    "t0_eval/anli/anli_r1_dev.jsonl": "anli",
    "t0_eval/cb/val.jsonl": "super_glue/cb",
    "t0_eval/rte/val.jsonl": "super_glue/rte",
    "t0_eval/wsc/val.jsonl": "super_glue/wsc.fixed",
    "t0_eval/wic/val.jsonl": "super_glue/wic",
    "t0_eval/copa/val.jsonl": "super_glue/copa",
    "t0_eval/winogrande/val.jsonl": "winogrande/winogrande_xl",
    "t0_eval/hellaswag/val_activitynet_heavy_1000.jsonl": "hellaswag",
}
LABELS = {"t0_eval/cb/val.jsonl": ["entailment", "contradiction", "neutral"],
          "t0_eval/rte/val.jsonl": ["entailment", "not_entailment"]}
# The shared data's rows that were rendered by Jinja2 without cuts: the file, and that of its raw rows.
RENDERED = {
    "anli_r1": "anli/anli_r1_dev.jsonl",
    "anli_r2": "anli/anli_r2_dev.jsonl",
    "anli_r3": "anli/anli_r3_dev.jsonl",
    "cb": "cb/val.jsonl",
    "rte": "rte/val.jsonl",
    "wsc": "wsc/val.jsonl",
    "wic": "wic/val.jsonl",
    "copa": "copa/val.jsonl",
    "winogrande": "winogrande/val.jsonl",
    "hellaswag_2templates": "hellaswag/val_random_1000.jsonl",
    "hellaswag_4templates": "hellaswag/val_activitynet_heavy_1000.jsonl",
}
TEMPLATES = DATA / "promptsource" / "templates"


class PromptsDriver(common.Driver):
    @staticmethod
    def executable():
        return common.BUILD / "tests" / "parity" / "prompts_driver"


@pytest.fixture(scope="module")
def driver():
    if not PromptsDriver.executable().exists():
        pytest.fail(f"{PromptsDriver.executable()} is missing: build the target prompts_driver first")
    running = PromptsDriver()
    yield running
    running.close()


@pytest.fixture(scope="module")
def promptsource():
    """promptsource.templates; what it imports and its rendering does not use may be missing."""
    package = importlib.util.find_spec("promptsource")
    if package is None:
        pytest.skip("the package promptsource is not installed: tools/setup test could not have it")
    folder = package.submodule_search_locations[0]
    stand_ins = {"pandas": types.ModuleType("pandas"), "pkg_resources": types.ModuleType("pkg_resources")}
    stand_ins["pkg_resources"].resource_filename = lambda _, name: os.path.join(folder, name)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        module = importlib.import_module("promptsource.templates")
        patch.setattr(module.env, "from_string", functools.lru_cache(None)(module.env.from_string))  # it compiles each time
        yield module


def rows_of(name):
    if not (DATA / "MANIFEST.md").exists():
        pytest.skip(f"{DATA} is not there")
    with open(DATA / name, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # As the data sets are that the templates were made for.
    for row in rows:
        if "/wsc/" in name:
            row.update(row["target"])
        if "/hellaswag/" in name:
            row["label"] = str(row["label"])
        if name in LABELS:
            row["label"] = LABELS[name].index(row["label"])
    return rows


def sample_of(name):
    rows = rows_of(name)
    return random.Random(name).sample(rows, min(ROWS_OF_A_SET, len(rows)))


def stretched(row):
    """The row with its sentences too long for a template, and separators in them."""
    return {key: (value + " |||-") * (2500 // len(value)) if isinstance(value, str) and len(value) > 30 else value
            for key, value in row.items()}


def read_templates(promptsource, path):
    """The templates of a file in its order."""
    with open(path, encoding="utf-8") as file:
        return list(promptsource.yaml.load(file, Loader=promptsource.yaml.FullLoader)["templates"].values())


def reference(template, row):
    """What T0's tasks make of a row: removeHyphen, apply, and what is left out."""
    row = {key.replace("-", "_"): value for key, value in row.items()}
    parts = template.apply(dict(row))
    if len(parts) != 2 or not parts[0]:
        return None
    choices = template.get_answer_choices_list(dict(row))
    return {"input": parts[0], "targets": [parts[1] or "<NO LABEL>"], "choices": choices or []}


def draw(promptsource, template, row):
    """The same, with words drawn anew: Jinja2 draws among constants when it compiles."""
    promptsource.env.from_string.cache_clear()
    return reference(template, row)


def assert_rendered(promptsource, driver, path, rows):
    """How many (row, template) were compared exactly."""
    templates = read_templates(promptsource, path)
    answer = driver.call(templates=str(path), rows=[json.dumps(row) for row in rows])
    assert answer["names"] == [template.name for template in templates]
    compared = 0
    for row, rendered in zip(rows, answer["rendered"]):
        for template, ours in zip(templates, rendered):
            where = (str(path), template.name, row)
            if re.search(r"\|\s*choice\b", template.jinja):
                assert any(ours == draw(promptsource, template, row) for _ in range(DRAWS)), where
                continue
            assert ours == reference(template, row), where
            compared += ours is not None
    return compared


@pytest.fixture(scope="module")
def compared():
    return {}


@pytest.mark.parametrize("name", SETS)
def test_equals_promptsource(promptsource, driver, compared, name):
    rows = sample_of(name)
    rows += map(stretched, rows[:4])
    prompts = assert_rendered(promptsource, driver, TEMPLATES / SETS[name] / "templates.yaml", rows)
    assert prompts >= len(rows)
    compared[name] = len(rows)


def test_there_were_enough(compared):
    if len(compared) < len(SETS):
        pytest.skip("not all sets were compared")
    assert sum(compared.values()) >= 2000 and len(compared) >= 20


@pytest.mark.parametrize("name", RENDERED)
def test_equals_rows_that_were_rendered_before(driver, name):
    raw = rows_of("t0_eval/" + RENDERED[name])
    raw = {row.get("ind", i): row for i, row in enumerate(raw)}
    with open(DATA / "p3_rendered" / "eval" / f"{name}.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    rows = sorted({line["row"] for line in lines})
    folder = RENDERED[name].split("/")[0]
    path = TEMPLATES / next(SETS[known] for known in SETS if known.startswith(f"t0_eval/{folder}/")) / "templates.yaml"
    answer = driver.call(templates=str(path), rows=[json.dumps(raw[row]) for row in rows])
    ours = {(row, template): made for row, rendered in zip(rows, answer["rendered"])
            for template, made in zip(answer["names"], rendered)}
    compared = 0
    for line in lines:
        if line["template"] == "Randomized prompts template":
            continue
        made = ours[line["row"], line["template"]]
        assert made == {"input": line["inputs"], "targets": [line["target"]], "choices": line["answer_choices"]}, line
        compared += 1
    assert compared >= 100


def test_every_template_of_the_package_is_read(promptsource, driver):
    files = sorted(pathlib.Path(promptsource.TEMPLATES_FOLDER_PATH).rglob("templates.yaml"))
    counts = [len(driver.call(templates=str(path), rows=[])["names"]) for path in files]
    assert counts == [path.read_text(encoding="utf-8").count(": !Template\n") for path in files]
    assert len(files) > 250 and sum(counts) > 2000


def test_the_recipe_names_the_mixture_of_t0(promptsource, driver):
    """38 data sets and 313 templates: arXiv 2110.08207's training mixture."""
    recipe = yaml.safe_load((common.ROOT / "recipes" / "t0" / "t0.yaml").read_text())
    files = [pathlib.Path(promptsource.TEMPLATES_FOLDER_PATH) / each["name"] / "templates.yaml" for each in recipe["dataset"]]
    counts = [len(driver.call(templates=str(path), rows=[])["names"]) for path in files]
    assert len(set(files)) == 38 and sum(counts) == 313
