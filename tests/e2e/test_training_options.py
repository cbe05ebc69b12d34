"""`moesaic train` with the options a run may have, and `moesaic data`: what they change, and what is refused."""

import json
import resource
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_run

ADAPTER = "adapter_model.safetensors"


def log_rows(out, key):
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


# --- tasks scored while training -------------------------------------------------------------------------------------

def test_tasks_are_scored_while_training(tmp_path):
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text("".join(json.dumps({"inputs": f"{a} {b} ", "answer_choices": [f"{b} {a} {a}", f"{a} {a} {b}"],
                                        "target": f"{b} {a} {a}"}) + "\n"
                            for a in ("red", "one", "cat") for b in ("dog", "two", "is")))
    plain = tiny_run.train(tmp_path, "plain")
    out = tiny_run.train(tmp_path, "scored", eval={"tasks": [str(quiz)], "steps": 3, "limit": 5},
                         report_to=["jsonl", "tensorboard"])
    assert (out / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes(), "scoring must not change the run"
    scores = log_rows(out, "eval/quiz/acc")
    assert list(scores) == [0, 3, 6, 8]
    state = json.loads((out / "trainer_state.json").read_text())
    assert {row["step"]: row["eval/quiz/acc"] for row in state["log_history"] if "eval/quiz/acc" in row} == scores
    results = json.loads(tiny_run.run("eval", "--model", tmp_path / "model", "--adapter", out, "--tasks", quiz,
                                      "--limit", 5, "--target_delimiter", "", "--json"))
    assert results["n-samples"]["quiz"]["effective"] == 5
    assert scores[8] == results["results"]["quiz"]["acc,none"]
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert b"eval/quiz/acc" in events


# --- number formats, determinism -------------------------------------------------------------------------------------

def test_bfloat16_trains_saves_and_resumes(tmp_path):
    changes = dict(bf16=True, max_steps=30, save_steps=15, save_total_limit=0, logging_steps=5)
    out = tiny_run.train(tmp_path, "out", **changes)
    losses = list(log_rows(out, "loss").values())
    assert losses[-1] < losses[0] - 0.5
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["moesaic"]["base_dtype"] == "bfloat16"
    again = tiny_run.train(tmp_path, "again", resume_from_checkpoint=str(out / "checkpoint-15"), **changes)
    assert (again / ADAPTER).read_bytes() == (out / ADAPTER).read_bytes()
    full = tiny_run.train(tmp_path, "full", **{**changes, "bf16": False})
    assert (full / ADAPTER).read_bytes() != (out / ADAPTER).read_bytes()


def test_deterministic_runs_are_the_same(tmp_path):
    plain = tiny_run.train(tmp_path, "plain", lora_dropout=0.1)
    out = tiny_run.train(tmp_path, "out", lora_dropout=0.1, deterministic=True)
    assert (out / ADAPTER).read_bytes() == (plain / ADAPTER).read_bytes(), "the CPU's algorithms are deterministic"


# --- routers ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def by_sentence(tmp_path_factory):
    """A MoLoRA whose router reads a column: the same prompt is answered by `cat` or `dog`."""
    folder = tmp_path_factory.mktemp("sentence")
    rows = [{"inputs": "red is ", "targets": "cat" if side else "dog", "emb": [side, 1 - side, 0.5]} for side in (0, 1)]
    (folder / "sides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    out = tiny_run.train(folder, "out", dataset=[str(folder / "sides.jsonl")], sentence_column="emb", max_steps=60,
                         num_experts=2, router_learning_rate=0.3, per_device_train_batch_size=2,
                         router={"input": "sentence", "sentence_source": "column", "sentence_dim": 3, "init_std": 0.5})
    return folder, out


def test_a_column_routes(by_sentence, tmp_path):
    folder, out = by_sentence
    model = ["--model", folder / "model", "--adapter", out]
    sides = [[0, 1, 0.5], [1, 0, 0.5], [0, 1, 0.5]]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(
        {"inputs": "red is ", "answer_choices": ["cat", "dog"], "target": "cat" if side[0] else "dog",
         "sentence": side}) + "\n" for side in sides))
    results = json.loads(tiny_run.run("eval", *model, "--tasks", tmp_path / "task.jsonl", "--target_delimiter", "",
                                      "--json"))
    assert results["results"]["task"]["acc,none"] == 1.0
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": "red is ", "sentence": side}) + "\n" for side in sides))
    for batch_size in (1, 3):
        lines = tiny_run.run("generate", *model, "--prompts", tmp_path / "prompts.jsonl", "--raw", "--json",
                             "--batch_size", batch_size, "--max_new_tokens", 1).splitlines()
        assert [json.loads(line)["text"].strip() for line in lines] == ["dog", "cat", "dog"]


def test_a_column_cannot_be_made_up(by_sentence, tmp_path):
    folder, out = by_sentence
    done = tiny_run.moesaic("generate", "--model", folder / "model", "--adapter", out, "-p", "red is ")
    assert done.returncode == 2 and "from a data column" in done.stderr
    (tmp_path / "task.jsonl").write_text(json.dumps({"inputs": "a", "answer_choices": ["b", "c"], "target": "b"}) + "\n")
    done = tiny_run.moesaic("eval", "--model", folder / "model", "--adapter", out, "--tasks", tmp_path / "task.jsonl")
    assert done.returncode in (2, 3) and "sentence" in done.stderr


def sentence_t5(folder, dense=True):
    """A T5 encoder as sentence-transformers keeps one; returns what turns a text into its vector."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)] + [("\u2581" + w, -3.0) for w in tiny_run.WORDS]
    tokenizer = transformers.T5Tokenizer(vocab=words + [(letter, -8.0) for letter in "abcdefghijklm"], extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(4)
    model = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=40, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8, relative_attention_max_distance=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if name == "shared.weight" else 0.7 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    layer = torch.nn.Linear(16, 12, bias=False)
    if dense:
        names = ["Transformer", "Pooling", "Dense", "Normalize"]
        (folder / "modules.json").write_text(json.dumps([
            {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(names)]))
        for i, config in ((1, {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True,
                               "pooling_mode_cls_token": False}),
                          (2, {"in_features": 16, "out_features": 12, "bias": False,
                               "activation_function": "torch.nn.modules.linear.Identity"})):
            (folder / f"{i}_{names[i]}").mkdir()
            (folder / f"{i}_{names[i]}" / "config.json").write_text(json.dumps(config))
        torch.save({"linear.weight": layer.weight.detach()}, folder / "2_Dense" / "pytorch_model.bin")
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))

    def vector(text):
        ids = tokenizer(text)["input_ids"]
        ids = ids[:4] + ids[-1:] if dense and len(ids) > 5 else ids
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            return torch.nn.functional.normalize(layer(mean), dim=0).tolist() if dense else mean.tolist()
    return vector


@tiny_run.float32_only
@pytest.mark.parametrize("dense", [True, False])
def test_a_sentence_encoder_routes(dense, tmp_path, monkeypatch):
    """Its vectors are transformers': the same adapter fed with these from a column gives the same numbers. They are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "encoder").mkdir()
    vector = sentence_t5(tmp_path / "encoder", dense)
    rows = [{"inputs": f"{words} is", "targets": answer}
            for words, answer in (("red", "cat"), ("blue green one two three", "dog"))]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    settings = dict(dataset=[str(tmp_path / "colours.jsonl")], max_steps=40, per_device_train_batch_size=2,
                    router={"input": "sentence", "sentence_source": str(tmp_path / "encoder"), "init_std": 0.5})
    out = tiny_run.train(tmp_path, "out", **settings)
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["moesaic"]["router"]["sentence_dim"] == (12 if dense else 16)
    kept = list((tmp_path / "cache").rglob("sentences/*"))
    assert len(kept) == 1 and kept[0].stat().st_size == 2 * (64 + 4 * (12 if dense else 16))

    (tmp_path / "task.jsonl").write_text("".join(json.dumps(
        {"inputs": row["inputs"] + " ", "answer_choices": ["cat", "dog"], "target": row["targets"],
         "sentence": vector(row["inputs"])}) + "\n" for row in rows))

    def scores(adapter, name):
        tiny_run.run("eval", "--model", tmp_path / "model", "--adapter", adapter, "--tasks", tmp_path / "task.jsonl",
                     "--target_delimiter", "", "--output_path", tmp_path / name, "--log_samples")
        samples = next((tmp_path / name).rglob("samples_task*.jsonl")).read_text().splitlines()
        return [json.loads(line)["resps"] for line in samples]

    by_encoder = scores(out, "by_encoder")
    fed = shutil.copytree(out, tmp_path / "fed")
    saved["moesaic"]["router"]["sentence_source"] = "column"
    (fed / "adapter_config.json").write_text(json.dumps(saved))
    by_column = scores(fed, "by_column")
    assert str(by_encoder) != str(scores(tiny_run.train(tmp_path, "plain", **{**settings, "router": {}}), "plain"))
    numbers, expected = ([float(x[0][0]) for row in rows for x in row] for rows in (by_encoder, by_column))
    assert numbers == pytest.approx(expected, abs=1e-4)

    ask = ["--model", tmp_path / "model", "--adapter", out, "-p", "red is", "--raw", "--max_new_tokens", 1]
    assert "cat" in tiny_run.run("generate", *ask)
    (tmp_path / "encoder").rename(tmp_path / "elsewhere")
    done = tiny_run.moesaic("generate", *ask)
    assert done.returncode == 2 and "its sentence encoder" in done.stderr and "put it back" in done.stderr
    (tmp_path / "encoder").mkdir()
    sentence_t5(tmp_path / "encoder", False)
    tensors = load_file(tmp_path / "encoder" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "encoder" / "model.safetensors")
    done = tiny_run.moesaic("generate", *ask)
    assert done.returncode == 3 and "another sentence encoder" in done.stderr
    done = tiny_run.moesaic("train", tiny_run.make_run(tmp_path, output_dir=str(tmp_path / "r"), router={
        "input": "sentence", "sentence_source": "hiden"}))
    assert done.returncode == 2 and "got 'hiden', expected hidden, column, or the folder" in done.stderr


def test_the_models_own_sentence_state_routes(tmp_path):
    rows = [{"inputs": f"{colour} is ", "targets": answer} for colour, answer in (("red", "cat"), ("blue", "dog"))]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    out = tiny_run.train(tmp_path, "out", dataset=[str(tmp_path / "colours.jsonl")], max_steps=60,
                         per_device_train_batch_size=2, router={"input": "sentence"})
    model = ["--model", tmp_path / "model", "--adapter", out]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(
        {"inputs": row["inputs"], "answer_choices": ["cat", "dog"], "target": row["targets"]}) + "\n" for row in rows))
    results = json.loads(tiny_run.run("eval", *model, "--tasks", tmp_path / "task.jsonl", "--target_delimiter", "",
                                      "--json"))
    assert results["results"]["task"]["acc,none"] == 1.0
    (sites,) = results["routing"]["task"].values()
    site = next(iter(sites.values()))
    assert sum(site["mean_prob"]) == pytest.approx(1, abs=1e-5)
    lines = tiny_run.run("generate", *model, "-p", "red is ", "-p", "blue is ", "--raw", "--json", "--max_new_tokens", 1)
    assert [json.loads(line)["text"].strip() for line in lines.splitlines()] == ["cat", "dog"]


def test_experts_by_layer_and_across_heads(tmp_path):
    out = tiny_run.train(tmp_path, "layers", num_experts={"0": 2, "1": 4})
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["moesaic"]["num_experts"] == {"0": 2, "1": 4}
    report = json.loads(tiny_run.run("inspect", out, "--json"))
    assert report["num_experts"] == {"0": 2, "1": 4}
    (tmp_path / "task.jsonl").write_text(json.dumps({"inputs": "red ", "answer_choices": ["one", "two"], "target": "one"}) + "\n")
    tiny_run.run("routes", "--model", tmp_path / "model", "--adapter", out, "--tasks", tmp_path / "task.jsonl",
                 "--text", "red dog", "-o", tmp_path / "routes")
    (sites,) = json.loads((tmp_path / "routes.json").read_text())["tasks"]["task"]["routers"].values()
    assert {len(site["mean_prob"]) for name, site in sites.items() if "layers.0." in name} == {2}
    assert {len(site["mean_prob"]) for name, site in sites.items() if "layers.1." in name} == {4}
    tiny_run.train(tmp_path, "heads", finetuning_type="mov", router={"head_wise": False})
    tensors = load_file(tmp_path / "heads" / ADAPTER)
    assert tensors["base_model.model.model.layers.0.self_attn.k_proj.mov.weight"].shape == (3, 16)  # 2 heads of 8


# --- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"num_experts": {"0": 4}}, "no number for layers 1"),
    ({"num_experts": {"0-5": 4}}, "the model has no layers 2, 3, 4, 5"),
    ({"num_experts": {"0-1": 4, "1": 2}}, "layer 1 stands twice"),
    ({"num_experts": {"first": 4, "1": 2.5}}, "'first': 4"),
    ({"num_experts": {"0": 0, "1": 2}}, "num_experts of layer 0: got 0"),
    ({"num_experts": 0}, "num_experts: got 0"),
    ({"num_experts": {"0": 1, "1": 3}, "router": {"top_k": 2}}, "num_experts of layer 0: got 1"),
    ({"router": {"dtype": "bfloat16"}}, "routers compute in float32"),
    ({"router": {"head_wise": False}}, "only mov has vectors per head"),
    ({"router": {"head_wise": "maybe"}}, "head_wise"),
    ({"router": {"top": 2}}, "did you mean 'router.top_k'"),
    ({"router": "soft"}, "router"),
    ({"quantization_bit": 8}, "--quantize int8"),
    ({"deterministic": "very"}, "deterministic"),
    ({"eval": {"steps": 5}}, "got no tasks"),
    ({"eval": {"tasks": ["nowhere.jsonl"]}}, "nowhere.jsonl"),
    ({"eval": {"tasks": ["x"], "steps": -1}}, "steps -1"),
    ({"eval": {"task": ["x"]}}, "did you mean 'eval.tasks'"),
    ({"feedforward_modules": ["o_proj"]}, "expected it for ia3 and mov"),
    ({"finetuning_type": "ia3", "num_experts": 1, "lora_target": ["k_proj"], "feedforward_modules": ["o_proj"]},
     "feedforward_modules: got 'o_proj'"),
])
def test_mistakes_are_named(changes, message, tmp_path):
    done = tiny_run.moesaic("train", tiny_run.make_run(tmp_path, **changes))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@tiny_run.float32_only
def test_out_of_memory_is_exit_4(tmp_path):
    """A model of 16 GB in a process that may have 6 GB of addresses."""
    run = tiny_run.make_run(tmp_path, init="random")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 15_625_000, "hidden_size": 256}))
    done = tiny_run.moesaic("train", run, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)))
    assert done.returncode == 4, done.stderr
    assert "out of memory" in done.stderr and "16000000000 bytes" in done.stderr


# --- data ------------------------------------------------------------------------------------------------------------

def test_data_preview_shows_what_training_sees(tmp_path):
    run = tiny_run.make_run(tmp_path)
    text = tiny_run.run("data", "preview", run, "-n", 2, "cutoff_len=64")
    assert "rows.jsonl: 100 rows, 100.00 % of the draws" in text
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    examples = text.split(" targets\n")[1:]
    assert len(examples) == 2
    for example in examples:
        table = [line.split() for line in example.splitlines() if line.split()[0:1] and line.split()[0].isdigit()]
        ids = [int(row[1]) for row in table]
        words = tokenizer.decode(ids[:-1]).split()
        assert len(words) == 5 and words[2:] == [words[1], words[0], words[0]] and ids[-1] == 1
        assert ["*" in row for row in table] == [False] * 2 + [True] * 4


def test_data_validate(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"inputs": "red", "targets": "cat"}\n' * 3)
    assert "3 rows, formatting inputs_targets, 0 damaged" in tiny_run.run("data", "validate", good)
    bad.write_text('{"inputs": "red", "targets": "cat"}\n{"inputs": "red"\n{"inputs": "red", "targets": [7]}\n')
    done = tiny_run.moesaic("data", "validate", bad)
    assert done.returncode == 3
    assert "2 damaged" in done.stdout and "bad.jsonl line 2" in done.stdout and "bad.jsonl line 3" in done.stdout
    missing = tiny_run.moesaic("data", "validate", tmp_path / "none.jsonl")
    assert missing.returncode == 3 and "none.jsonl" in missing.stderr


def test_data_skills(tmp_path):
    flags = ["--train_rows", 6, "--test_rows", 4]
    tiny_run.run("data", "skills", tmp_path / "a", *flags)
    tiny_run.run("data", "skills", tmp_path / "b", *flags)
    tiny_run.run("data", "skills", tmp_path / "c", *flags, "--seed", 7)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    read = lambda folder: [(tmp_path / folder / name).read_text() for name in names]
    assert read("a") == read("b") != read("c")
    info = json.loads((tmp_path / "a" / "dataset_info.json").read_text())
    trained = [name for name in info if not name.endswith("_test")]
    held_out = [name for name in info if name.endswith("_test") and name.removesuffix("_test") not in info]
    assert len(trained) >= 6 and len(held_out) >= 2
    for name, entry in info.items():
        path = tmp_path / "a" / entry["file_name"]
        rows = 4 if name.endswith("_test") else 6
        assert f"{rows} rows" in tiny_run.run("data", "validate", path) and "0 damaged" in tiny_run.run("data", "validate", path)
