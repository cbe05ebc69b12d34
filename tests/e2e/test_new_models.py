"""`moesaic train` with `init: random`: small models from nothing, with a tokenizer trained, given or found."""

import json
import shutil

import pytest
import tokenizers
import transformers
import yaml

import tiny_run

CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
          "tie_word_embeddings": False}
TRAINED = {"train": "bpe", "vocab_size": 280}


def make_run(folder, config=None, name="out", **changes):
    """A folder with config.json alone, data and a run of a new model."""
    (folder / "new").mkdir(exist_ok=True)
    (folder / "new" / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    rows = [{"inputs": f"{a} {b} ", "targets": f"{b} {a}"} for a in tiny_run.WORDS for b in tiny_run.WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"model_name_or_path": str(folder / "new"), "init": "random", "finetuning_type": "full",
           "tokenizer": TRAINED, "dataset": [str(folder / "rows.jsonl")], "per_device_train_batch_size": 8,
           "learning_rate": 1e-2, "max_steps": 6, "save_steps": 3, "output_dir": str(folder / name), **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value is not None}))
    return path


def test_a_trained_tokenizer_and_the_config_that_follows_it(tmp_path):
    out = tmp_path / "out"
    text = tiny_run.run("train", make_run(tmp_path, {"vocab_size": 9, "eos_token_id": 7}))
    assert "280 tokens, trained on 200 texts; config.json follows: vocab_size 280, bos 0, eos 1" in text
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (280, 0, 1, 2)

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape == (280, 32)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")
    ids = tokenizer("red green 12")["input_ids"]
    assert ids[0] == 0 and tokenizer.decode(ids[1:]) == "red green 12"
    assert [tokenizer.decode([i]) for i in ids[-2:]] == ["1", "2"]
    # The same answer here and in transformers.
    answer = json.loads(tiny_run.run("generate", "--model", out, "-p", "red green ", "--raw", "--max_new_tokens", 5,
                                     "--json"))
    prompt = tokenizer("red green ", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0][prompt["input_ids"].shape[1]:]
    assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_trained_as_the_tokenizers_package_trains(tmp_path):
    tiny_run.run("train", make_run(tmp_path, max_steps=1, save_steps=0))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    texts = [text for line in (tmp_path / "rows.jsonl").read_text().splitlines() for text in json.loads(line).values()]
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=280, min_frequency=2, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    ours = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert ours["model"]["vocab"] == json.loads(tokenizer.to_str())["model"]["vocab"]
    assert ours["model"]["merges"] == json.loads(tokenizer.to_str())["model"]["merges"]


def test_the_same_run_is_the_same_model_and_another_seed_another(tmp_path):
    weights = {}
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        tiny_run.run("train", make_run(tmp_path, name=name, seed=seed))
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] and weights["a"] != weights["c"]
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()


def test_resumed_it_keeps_its_tokenizer(tmp_path):
    """The data changed behind a run's back, so that a tokenizer trained again would be another one."""
    tiny_run.run("train", make_run(tmp_path, name="straight"))
    tiny_run.run("train", make_run(tmp_path, name="half"))
    shutil.rmtree(tmp_path / "half" / "checkpoint-6")
    (tmp_path / "half" / "model.safetensors").unlink()
    rows = (tmp_path / "rows.jsonl").read_text()
    run = make_run(tmp_path, name="half")
    (tmp_path / "rows.jsonl").write_text(rows.replace("red", "zzzz"))
    assert "from " + str(tmp_path / "half") + ", as the run began" in tiny_run.run("train", run, "--resume", "auto")
    straight, half = tmp_path / "straight", tmp_path / "half"
    assert (half / "tokenizer.json").read_bytes() == (straight / "tokenizer.json").read_bytes()
    (tmp_path / "rows.jsonl").write_text(rows)
    shutil.rmtree(half / "checkpoint-6")
    tiny_run.run("train", run, "--resume", "auto")
    assert (half / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_a_given_tokenizer(tmp_path):
    tiny_run.make_model(tmp_path / "model")  # 13 words
    for name, given in [("folder", tmp_path / "model"), ("file", tmp_path / "model" / "tokenizer.json")]:
        text = tiny_run.run("train", make_run(tmp_path, name=name, tokenizer=str(given)))
        assert f"13 tokens, from {given}; config.json follows: vocab_size 13, bos 0, eos 1" in text
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 13
    text = tiny_run.run("train", make_run(tmp_path, {"vocab_size": 16}, name="padded", tokenizer=str(tmp_path / "model")))
    assert "vocab_size 16" in text
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "padded").lm_head.weight.shape == (16, 32)


def test_config_json_itself_and_dry_run_and_preview(tmp_path):
    run = make_run(tmp_path, model_name_or_path=str(tmp_path / "new" / "config.json"))
    assert "280 tokens, trained" in tiny_run.run("train", run, "--dry-run")
    assert not (tmp_path / "out").exists()
    preview = tiny_run.run("data", "preview", run, "-n", 1)
    assert "<bos>" in preview and "<eos>" in preview


def test_a_new_model_as_augmenting_model_and_in_eval(tmp_path):
    tiny_run.run("train", make_run(tmp_path))
    tiny_run.make_model(tmp_path / "model")
    compose = tmp_path / "compose.yaml"
    compose.write_text(yaml.safe_dump({"anchor": str(tmp_path / "model"), "augmenting": str(tmp_path / "out"),
                                       "align": "mixed", "output_dir": str(tmp_path / "composition")}))
    assert "another tokenizer, aligned by mixed" in tiny_run.run("compose", compose)
    for model in ["out", "composition"]:
        text = tiny_run.run("eval", "--model", tmp_path / model, "--tasks", tmp_path / "rows.jsonl", "--limit", 3,
                            "--max_gen_toks", 4, "--json")
        assert json.loads(text)["results"]


@pytest.mark.parametrize("changes,config,code,message", [
    ({"init": None}, {}, 2, "expected random and full"),
    ({"finetuning_type": "lora"}, {}, 2, "expected random and full"),
    ({"tokenizer": {"train": "bpe", "vocab_size": 258}}, {}, 2, "expected at least 259"),
    ({"tokenizer": {"train": "unigram", "vocab_size": 300}}, {}, 2, "expected bpe"),
    ({"tokenizer": {"train": "bpe"}}, {}, 2, "'vocab_size' is missing"),
    ({"tokenizer": {"vocab_size": 300}}, {}, 2, "'train' is missing"),
    ({"tokenizer": {"train": "bpe", "size": 300}}, {}, 2, "tokenizer.size"),
    ({"tokenizer": 7}, {}, 2, "expected a folder, a file or"),
    ({"tokenizer": "nowhere"}, {}, 3, "nowhere: no such file"),
    ({"tokenizer": None}, {"vocab_size": 300}, 3, "no tokenizer found"),
    ({}, {"hidden_size": 0}, 3, "hidden_size"),
])
def test_mistakes_are_named(changes, config, code, message, tmp_path):
    done = tiny_run.moesaic("train", make_run(tmp_path, config, **changes))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_config(tmp_path):
    tiny_run.make_model(tmp_path / "model")
    done = tiny_run.moesaic("train", make_run(tmp_path, {"vocab_size": 12}, tokenizer=str(tmp_path / "model")))
    assert done.returncode == 3 and "vocab_size of 12, expected at least the 13 tokens" in done.stderr
    shutil.copy(tmp_path / "model" / "tokenizer.json", tmp_path / "new")
    done = tiny_run.moesaic("train", make_run(tmp_path, {"vocab_size": 12}, tokenizer=None))
    assert done.returncode == 3 and "expected at least the 13 tokens of the tokenizer beside it" in done.stderr


def test_a_file_in_the_place_of_a_folder_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    done = tiny_run.moesaic("data", "keys", tmp_path / "file")
    assert done.returncode == 3 and "Not a directory" in done.stderr and "defect" not in done.stderr


def test_data_keys(tmp_path):
    tiny_run.run("data", "keys", tmp_path / "a", "--test_rows", 5)
    tiny_run.run("data", "keys", tmp_path / "b", "--test_rows", 5, "--seed", 7)
    names = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.json*")}
    assert names == {"dataset_info.json", "kv_sub.jsonl", "num_math.jsonl", "kv_math.jsonl", "test/kv_sub.jsonl",
                     "test/num_math.jsonl", "test/kv_math.jsonl", "held_in/kv_sub.jsonl", "held_in/kv_math.jsonl"}
    assert (tmp_path / "a" / "kv_sub.jsonl").read_text() != (tmp_path / "b" / "kv_sub.jsonl").read_text()
    for name in ["kv_sub", "num_math", "kv_math"]:
        assert "0 damaged" in tiny_run.run("data", "validate", tmp_path / "a" / f"{name}.jsonl")
