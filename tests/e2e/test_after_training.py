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
