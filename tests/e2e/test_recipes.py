"""Every recipe is a run that starts, and every command that a recipe's header, README or docs give is one that works.

The commands are run as they stand, block by block, by bash. What stands in for the world around them:
- the model files that they name are folders of a tiny random model (MODELS);
- `moesaic` and `build/moesaic` call the program with `SHORTER` behind the words of a training, so that it is short;
- files that a reader brings or a tool of tools/study writes are tiny ones of the same names (`make_workspace`, `stand_in`);
- in a form ("moesaic eval --model M [--limit N]") optional parts are left out, of alternatives the first is taken, and
  the words in capitals are files of these names, or of FORM_WORDS.
A block whose words can't be run here is in NOT_RUN with the cause.
"""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

import test_seq2seq
from test_serve import Server
from tiny_run import DTYPE, PROGRAM, ROOT, WORDS, make_model, make_run, moesaic, train

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.md"))]

MODELS = [".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
          ".cache/models/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf", "M"]
T5_MODELS = ["models/t5-xl-lm-adapt", "models/t5-large-lm-adapt"]
SHORTER = ("max_steps=2 save_steps=0 per_device_train_batch_size=2 max_batch_tokens=0 gradient_accumulation_steps=1 "
           "overwrite_output_dir=true")
FORM_WORDS = {"FILE": "rows.jsonl", "TEXT": "'red cat'", "PATH": "M", "DIR": "M"}
FRESH_WORDS = {"OUT", "FOLDER"}  # a new folder each time
NOT_RUN = {
    "moesaic VERB": "no command, but the form of all",
    "moesaic convert": "needs a checkpoint of google-deepmind/calm: tests/parity/test_calm.py makes and converts them",
    "build/moesaic eval --model .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf --tasks runs/first-mixture":
        "names its task files by TASK and ...: docs/study is a record",
    "build/moesaic demo calm --ablations": "half an hour: test_compose.py runs it in miniature",
    "python tools/study": "whole studies: test_studies.py runs them",
    "make ": "sets up and builds: this test runs what was built",
    "ninja ": "builds",
    "torchrun ": "launchers that are not here but for torchrun, under which test_ranks.py trains",
    "moesaic eval ADAPTER --suite t0": "needs the sets and templates of T0: tests/parity/test_t0.py asks the suite over some",
    "tools/models ": "fetches models: tests/e2e/test_after_training.py runs it on packages of its own",
    ".venv/bin/python tests/docs_test.py": "a test of its own",
}


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


def test_two_models_are_joined_and_trained(tmp_path):
    folder = make_run(tmp_path).parent
    recipes = ROOT / "recipes" / "two_models"
    joined = moesaic("compose", recipes / "compose.yaml", f"anchor={folder / 'model'}", f"augmenting={folder / 'model'}",
                     f"output_dir={tmp_path / 'joined'}")
    assert joined.returncode == 0, joined.stderr
    own = [f"model_name_or_path={tmp_path / 'joined'}", f"dataset={folder / 'rows.jsonl'}", "template=none"]
    done = moesaic("train", recipes / "composition.yaml", *own, f"output_dir={tmp_path / 'out'}", "--dry-run")
    assert done.returncode == 0 and "method     calm" in done.stdout, done.stderr
    # A recipe of experts says how it becomes one without.
    molora = moesaic("train", ROOT / "recipes" / "molora_smollm2.yaml", *own, "finetuning_type=calm", "--dry-run",
                     f"output_dir={tmp_path / 'out'}")
    assert molora.returncode == 2 and "calm, which has no experts" in molora.stderr
    assert "num_experts=null" in molora.stderr and "molora mixes" not in molora.stderr
    done = moesaic("train", ROOT / "recipes" / "molora_smollm2.yaml", *own, "finetuning_type=calm", "num_experts=null",
                   f"output_dir={tmp_path / 'out'}", "--dry-run")
    assert done.returncode == 0, done.stderr


def test_a_misspelt_key_is_named_with_the_nearest(tmp_path):
    result = moesaic("train", RECIPES[0], "lerning_rate=1", "--dry-run")
    assert result.returncode == 2
    assert "lerning_rate" in result.stderr and "did you mean 'learning_rate'" in result.stderr


def not_run(command):
    return next((cause for start, cause in NOT_RUN.items() if command.startswith(start)), None)


def blocks(page):
    """The fenced blocks of a page that call the program, each as a list of commands (a heredoc is one)."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        lines, heredoc = [], None
        for line in block.replace("\\\n", "").splitlines():
            if heredoc:
                lines[-1] += "\n" + line
                heredoc = None if line == heredoc else heredoc
            elif line.strip():
                lines.append(line)
                begun = re.search(r"<<(\w+)$", line)
                heredoc = begun and begun.group(1)
        if any(re.match(r"(build/)?moesaic ", line) for line in lines):
            yield lines


def spans(text):
    """Commands with arguments that stand in a sentence: `moesaic data skills runs/demo/data`."""
    found = [span.split() for span in re.findall(r"`((?:build/)?moesaic [^`]+)`", text)]
    return [" ".join(words) for words in found if len(words) > 2 + (words[1] in {"data", "demo"})]


def plain(form, fresh):
    """A form of docs/cli.md as a command."""
    command = re.split(r" {3,}", form)[0]
    while re.search(r"\[[^\[\]]*\]", command):
        command = re.sub(r" ?\[[^\[\]]*\]", "", command)
    command = re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", command)
    command = re.sub(r"(\S+)\|\S+", r"\1", command)
    for word, meaning in FORM_WORDS.items():
        command = re.sub(rf"(?<![\w/.]){word}(?![\w/.])", meaning, command)
    if command.startswith("moesaic routes"):
        command = command.replace("ADAPTER", "MIXTURE")
    for word in FRESH_WORDS:
        command = re.sub(rf"(?<![\w/.]){word}(?![\w/.])", lambda _: f"{word}{next(fresh)}", command)
    return command


def make_workspace(folder):
    """A folder with all that commands name before they have written anything."""
    make_model(folder / "model", initializer_range=0.3, num_hidden_layers=30, max_position_embeddings=4096)
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    test_seq2seq.make_model(folder / "t5")
    for target, names in [("model", MODELS), ("t5", T5_MODELS)]:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(folder / target)
    rows = "".join(json.dumps({"inputs": f"{a} {b} ", "targets": f"{b} {a}"}) + "\n" for a in WORDS for b in WORDS)
    for name in ["rows.jsonl", "my.jsonl", "more.jsonl"]:
        (folder / name).write_text(rows)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "build").mkdir()
    for name in ["build/moesaic", "bin/moesaic"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"""#!/bin/bash
echo "+ moesaic $*" >&2
case "$1 $2" in
  "train --keys") set -- "$@" ;;
  train*) set -- "$@" {SHORTER} ;;
  "demo calm") set -- "$@" --fraction 0.01 --test_rows 8 ;;
esac
[[ " $* " == *" --threads "* ]] || set -- "$@" --threads 1
exec {PROGRAM} "$@"
""")
        (folder / name).chmod(0o755)
    # LLaMA-Factory's registry, where its run files look for it.
    (folder / "data").mkdir()
    (folder / "data" / "chat.json").write_text(json.dumps(
        [{"instruction": f"{a} is not", "input": "", "output": b} for a in WORDS for b in WORDS[:4]]))
    (folder / "data" / "dataset_info.json").write_text(json.dumps(
        {"identity": {"file_name": "chat.json"}, "questions": {"file_name": "chat.json"}}))
    # What the forms of docs/cli.md name.
    run_file = {"model_name_or_path": "M", "dataset": ["rows.jsonl"], "template": "none", "output_dir": "out",
                "bf16": DTYPE == "bfloat16"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file))
    common = {**run_file, "max_steps": 2, "save_steps": 0, "per_device_train_batch_size": 2}
    common.pop("output_dir")
    (folder / "study.yaml").write_text(yaml.safe_dump(
        {"output_dir": "study", "run": common, "methods": {"mov": {"finetuning_type": "mov"}}}))
    train(folder, "A", finetuning_type="lora", num_experts=None)
    train(folder, "MIXTURE")
    train(folder, "ADAPTER", finetuning_type="lora", num_experts=None, template="auto")
    for name, run in [("mo", "ADAPTER"), ("lora", "A")]:
        shutil.copytree(folder / run, folder / "runs" / name)
    (folder / "config.yaml").write_text("{anchor: M, augmenting: M, num_connections: 2, output_dir: composed}\n")
    (folder / "moe.yaml").write_text("{base_model: M, method: copy, num_experts: 2}\n")
    (folder / "composition.yaml").write_text("{anchor: M, augmenting: M, num_connections: 2, output_dir: COMPOSITION}\n")
    assert moesaic("compose", "composition.yaml", cwd=folder).returncode == 0
    choices = [{"inputs": f"{a} is", "answer_choices": WORDS[:2], "target": WORDS[0]} for a in WORDS[:3]]
    (folder / "folder").mkdir()
    for name in ["a.jsonl", "folder/c.jsonl"]:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "red cat", "answer": "#### 2"}) + "\n")
    (folder / "my_task.yaml").write_text(yaml.safe_dump({
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "inputs", "doc_to_choice": WORDS[:2],
        "doc_to_target": "{{ 0 }}", "metric_list": [{"metric": "acc"}]}))
    (folder / "b.json").write_text(json.dumps({"Definition": ["red cat"], "Positive Examples": [], "Instances": [
        {"id": "1", "input": "red", "output": ["cat"]}]}))
    (folder / "file.jsonl").write_text(json.dumps({"prompt": "red cat"}) + "\n")
    (folder / "TASKS").mkdir()
    (folder / "TASKS" / "task1.json").write_text(json.dumps(
        {"Categories": ["Question Answering"], "Definition": ["red cat"],
         "Instances": [{"id": str(i), "input": "red", "output": ["cat"]} for i in range(40)]}))
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def workspace(template, tmp_path):
    return copy(template, tmp_path / "here")


def copy(template, folder):
    return pathlib.Path(shutil.copytree(template, folder, symlinks=True))


def write_raw_rows(data, prompts):
    """Raw rows and two prompt templates for them, one of which leaves half of them out."""
    data.mkdir(parents=True)
    (data / "rows.jsonl").write_text("".join(json.dumps({"a-b": a, "label": i % 2}) + "\n" for i, a in enumerate(WORDS)))
    prompts.mkdir(parents=True)
    (prompts / "templates.yaml").write_text("""templates:
  1: !Template {name: choose, jinja: "{{a_b}} is ||| {{answer_choices[label]}}", answer_choices: one ||| two,
                metadata: !TemplateMetadata {original_task: true}}
  2: !Template {name: 'yes', jinja: "{% if label %}not {{a_b}} ||| cat{% endif %}"}
""")


def stand_in(command, folder):
    """Rows of their names for the data sets of a recipe that a tool of tools/study would write."""
    named = re.search(r"(?:train|preview) (recipes/\S+\.yaml)", command)
    recipe = yaml.safe_load((ROOT / named.group(1)).read_text()) if named else {}
    data = folder / recipe.get("dataset_dir", ".")
    if data.exists():
        return
    data.mkdir(parents=True)
    names = [each["name"] if isinstance(each, dict) else each for each in recipe["dataset"]]
    info = {name: {"file_name": name} for name in names if not name.endswith(".jsonl")}
    if all(isinstance(each, dict) and "prompts" in each for each in recipe["dataset"]):
        for each in recipe["dataset"]:
            write_raw_rows(data / each["name"], data / each["prompts"] / each["name"])
        return
    for name in names:
        shutil.copy(folder / "rows.jsonl", data / name)
    for name in info:
        (data / name).rename(data / (name + ".jsonl"))
        info[name] = {"file_name": name + ".jsonl", "formatting": "inputs_targets"}
    (data / "dataset_info.json").write_text(json.dumps(info))


@contextlib.contextmanager
def serving(commands, folder):
    """Starts the servers among `commands`, on free ports, and gives the others with those in the place of 8000."""
    servers, others = [], []
    for command in commands:
        if not re.match(r"(build/)?moesaic serve ", command):
            others.append(command.replace("localhost:8000", f"localhost:{servers[-1].port}") if servers else command)
            continue
        words = shlex.split(command, comments=True)[2:]
        port = [words.index("--port")] if "--port" in words else []
        servers.append(Server(*[word for i, word in enumerate(words) if i not in [*port, *(at + 1 for at in port)]], cwd=folder))
        servers[-1].__enter__()
    try:
        yield others, len(servers)
    finally:
        for server in servers:
            server.__exit__()


def shell(commands, folder):
    """Runs what can be run here; each command must succeed."""
    with serving(commands, folder) as (others, ran):
        return ran + run_in_turn(others, folder)


def run_in_turn(commands, folder):
    ran = 0
    for command in commands:
        if not_run(command.strip()) or (command.startswith("curl ") and not shutil.which("curl")):
            continue
        stand_in(command, folder)
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"})
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        ran += "+ moesaic" in done.stderr
    return ran


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.stem)
def test_the_commands_of_a_page(page, template, tmp_path):
    ran = 0
    forms = page.name == "cli.md"
    fresh = iter(range(1000))
    folder = tmp_path / "page"
    if not forms:
        copy(template, folder)
    for i, block in enumerate(blocks(page)):
        # A page tells one story; each block of forms stands for itself.
        if forms:
            folder = copy(template, tmp_path / str(i))
            block = [plain(line, fresh) for line in block]
        ran += shell(block, folder)
    assert ran > 0 or all(not_run(line.strip()) for block in blocks(page) for line in block)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "recipes").rglob("*.yaml"))],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_in_its_sentences(page, template, tmp_path):
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        text = "\n".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    fresh = iter(range(1000))
    commands = [plain(span, fresh) for span in spans(text) if "..." not in span]
    if commands:
        shell(commands, copy(template, tmp_path / "page"))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*_smollm2.yaml")), ids=lambda path: path.stem)
def test_a_recipe_trains_on_the_data_its_header_makes(recipe, workspace):
    assert shell(spans(recipe.read_text()), workspace) >= 1
    assert shell([f"moesaic train recipes/{recipe.name}"], workspace) == 1
    assert (workspace / "runs" / recipe.stem / "adapter_config.json").exists()
