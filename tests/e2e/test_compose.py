"""Composing frozen models from the command line: compose, inspect, train, generate, eval, and what goes wrong."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
import yaml

import test_seq2seq
from tiny_run import ROOT, make_run, moesaic, run


def make_augmenting(folder):
    """A smaller model that speaks another tokenizer."""
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=560, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3)).save_pretrained(folder)
    shutil.copy(ROOT / "tests" / "compose" / "golden" / "llama3.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run, with a composition of its model and another one in `calm`."""
    path = tmp_path_factory.mktemp("compose")
    make_run(path, initializer_range=0.3)
    make_augmenting(path / "aug")
    (path / "compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(path / "model"), "augmenting": str(path / "aug"), "connections": [{"anchor": 0, "aug": 1},
                                                                                       {"anchor": 1, "aug": 3}],
        "output_dir": str(path / "calm")}))
    printed = run("compose", path / "compose.yaml")
    assert "another tokenizer, aligned by word" in printed
    # Two connections: D_A D_B + D_B + 4 D_B^2, D_A = 24, D_B = 32.
    assert f"trainable  {2 * (24 * 32 + 32 + 4 * 32 * 32)} " in printed
    return path


def generate(model, *arguments):
    out = run("generate", "--model", model, "--json", "--max_new_tokens", 4, "-p", "cat dog", "-p", "red", *arguments)
    return [json.loads(line)["text"] for line in out.splitlines()]


def test_new_composition_is_its_anchor(folder):
    assert generate(folder / "calm") == generate(folder / "model")


def test_inspect(folder):
    report = json.loads(run_inspect(folder / "calm"))
    assert report["kind"] == "composition"
    assert report["augmenting"][0]["connections"] == [{"anchor": 0, "aug": 1}, {"anchor": 1, "aug": 3}]
    assert report["parameters"] == 2 * (24 * 32 + 32 + 4 * 32 * 32)


def run_inspect(path):
    done = moesaic("inspect", path, "--json")
    if done.returncode != 0:  # verbs differ in the common flags they take
        pytest.fail(done.stderr)
    return done.stdout


def test_training_generation_and_evaluation(folder):
    run_file = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "calm"), num_experts=None,
                        learning_rate=1e-2, max_steps=200, save_steps=100, logging_steps=1,
                        output_dir=str(folder / "trained"), lr_scheduler_type="constant")
    printed = run("train", run_file)
    assert "method     calm" in printed
    log = [json.loads(line) for line in (folder / "trained" / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert generate(folder / "trained") != generate(folder / "model")
    # One answer does not depend on its neighbour or on being streamed.
    assert generate(folder / "trained", "--batch_size", 1) == generate(folder / "trained")

    tasks = folder / "task.jsonl"
    tasks.write_text("".join(json.dumps({"inputs": f"{a} {b}", "answer_choices": [f"{b} {b} {b}", f"{b} {a} {a}"],
                                         "target": f"{b} {a} {a}"}) + "\n"
                             for a in ("red", "cat", "is") for b in ("dog", "one", "two", "not")))
    results = json.loads(run("eval", "--model", folder / "trained", "--tasks", tasks, "--json"))
    before = json.loads(run("eval", "--model", folder / "calm", "--tasks", tasks, "--json"))
    accuracy = [r["results"]["task"]["acc,none"] for r in (before, results)]
    assert accuracy[1] > accuracy[0] and accuracy[1] > 0.8, accuracy

    resumed = run("train", run_file, "max_steps=202", "--resume", "auto")
    assert "step 202" in resumed


def test_from_final_state_to_final_state(folder):
    """Connections behind the norms, of the newest state alone, that read at every position the text so far."""
    keys = ["connections=[{anchor: 0, aug: 1}, {anchor: final, aug: final, reads: newest}]", "align=text",
            "norm=standard", "cross_position=recency", "output_scale=0.5"]
    printed = run("compose", folder / "compose.yaml", *keys, f"output_dir={folder / 'final'}")
    assert "aligned by text" in printed and "final state -> anchor final state, the newest alone" in printed
    # D_A D_B + D_B + 4 D_B^2 and a slope for each of the anchor's heads; D_A D_B + D_B.
    heads = json.loads((folder / "final" / "calm_config.json").read_text())["num_heads"]
    assert f"trainable  {24 * 32 + 32 + 4 * 32 * 32 + heads + 24 * 32 + 32} " in printed
    assert generate(folder / "final") == generate(folder / "model")
    run_file = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "final"), num_experts=None,
                        learning_rate=1e-2, max_steps=60, save_steps=30, logging_steps=1,
                        output_dir=str(folder / "trained_final"), lr_scheduler_type="constant", warmup_ratio=0.0)
    run("train", run_file)
    log = [json.loads(line) for line in (folder / "trained_final" / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    trained = folder / "trained_final"
    assert generate(trained) != generate(folder / "model")
    assert generate(trained, "--batch_size", 1) == generate(trained)
    # What it knows of its inputs is kept: a run that was cut is the run that wasn't.
    weights = safetensors.torch.load_file(trained / "calm_model.safetensors")
    assert weights["connections.1.input_deviation"].std() > 0
    shutil.rmtree(trained)
    run("train", run_file, "max_steps=30")
    run("train", run_file, "--resume", "auto")
    resumed = safetensors.torch.load_file(trained / "calm_model.safetensors")
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    printed = run("routes", "--model", trained, "--text", "cat dog red", "-o", folder / "final_read")
    routes = json.loads((folder / "final_read.json").read_text())
    assert routes["structure"]["connections"][1] == {"augmenting": 0, "anchor": "final", "aug": "final", "reads": "newest"}

    carrying = [*keys, f"augmenting={{model: {folder / 'aug'}, adapter: {folder / 'aug_lora'}}}"]
    run("train", make_run(folder, finetuning_type="lora", model_name_or_path=str(folder / "aug"), num_experts=None,
                          lora_rank=2, max_steps=1, save_steps=0, output_dir=str(folder / "aug_lora")))
    run("compose", folder / "compose.yaml", *carrying, f"output_dir={folder / 'final_carrying'}")
    done = moesaic("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "final_carrying"),
                                     output_dir=str(folder / "unused"), num_experts=None), "train_adapters=true")
    assert done.returncode == 2 and "augmenting[0] carries an adapter and has align text" in done.stderr


def test_the_encoder_of_a_t5(folder):
    """It reads prompts, and nothing of answers: what is made, trained, asked and refused."""
    test_seq2seq.make_model(folder / "t5")
    keys = [f"augmenting={folder / 't5'}", "connections=[{anchor: 0, aug: 0}, {anchor: 1, aug: 1}]"]
    printed = run("compose", folder / "compose.yaml", *keys, f"output_dir={folder / 'with_t5'}")
    assert "(t5, 2 blocks of width 32), another tokenizer, aligned by word, mask prefix" in printed
    assert generate(folder / "with_t5") == generate(folder / "model")
    assert json.loads(run_inspect(folder / "with_t5"))["augmenting"][0]["mask"] == "prefix"
    trained = folder / "trained_t5"
    run("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "with_t5"), num_experts=None,
                          learning_rate=1e-2, max_steps=200, save_steps=0, logging_steps=1, output_dir=str(trained),
                          lr_scheduler_type="constant"))
    log = [json.loads(line) for line in (trained / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert generate(trained) != generate(folder / "model")
    assert generate(trained, "--batch_size", 1) == generate(trained)

    def score(model, *flags):
        return json.loads(run("score", "--model", model, "--text", "red cat", "--json", *flags))["logprobs"]

    # The anchor reads a text without a prompt alone; behind a prompt no logarithm depends on what follows.
    assert score(trained) == score(folder / "model")
    target = score(trained, "--target", "dog one not")
    assert target != score(folder / "model", "--target", "dog one not")
    assert score(trained, "--target", "dog one is")[:2] == pytest.approx(target[:2], abs=1e-5)

    for change, says in (("mask=causal", "mask: got 'causal', expected prefix"), ("align=token", "align: got 'token'"),
                         ("connections=[{anchor: 0, aug: 2}]", "aug 2")):
        done = moesaic("compose", folder / "compose.yaml", *keys, change, f"output_dir={folder / 'refused'}")
        assert done.returncode == 2 and says in done.stderr


def test_a_t5_that_reads_a_decoder(folder):
    """The anchor's decoder is connected, whatever reads beside it: made, trained, asked, scored, looked at, refused."""
    test_seq2seq.make_model(folder / "t5_anchor")
    keys = [f"anchor={folder / 't5_anchor'}", "connections=[{anchor: 0, aug: 0}, {anchor: 1, aug: 1}]", "num_heads=2"]
    printed = run("compose", folder / "compose.yaml", *keys, f"output_dir={folder / 'of_t5'}")
    assert "(t5, 2 blocks of width 32" in printed
    assert generate(folder / "of_t5") == generate(folder / "t5_anchor")
    trained = folder / "trained_of_t5"
    settings = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "of_t5"), num_experts=None,
                        learning_rate=1e-2, max_steps=100, save_steps=50, logging_steps=1, output_dir=str(trained),
                        lr_scheduler_type="constant", template="none")
    run("train", settings)
    log = [json.loads(line) for line in (trained / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert generate(trained) != generate(folder / "of_t5")
    assert generate(trained, "--batch_size", 1) == generate(trained)
    target = json.loads(run("score", "--model", trained, "--text", "red cat", "--target", "dog one not", "--json"))
    shorter = json.loads(run("score", "--model", trained, "--text", "red cat", "--target", "dog one is", "--json"))
    assert shorter["logprobs"][:2] == pytest.approx(target["logprobs"][:2], abs=1e-5)
    (folder / "t5_task.jsonl").write_text('{"query": "red cat", "choices": ["red", "dog"], "gold": 0}\n' * 3)
    run("routes", "--model", trained, "--tasks", folder / "t5_task.jsonl", "-o", folder / "t5_read")
    assert json.loads((folder / "t5_read.json").read_text())["structure"]["anchor"]["blocks"] == 2
    done = moesaic("train", settings, "dropout_rate=0.1", f"output_dir={folder / 'refused'}")
    assert done.returncode == 2 and "dropout_rate: got 0.1" in done.stderr
    done = moesaic("compose", folder / "compose.yaml", *keys[:1], "connections=[{anchor: final, aug: 0}]",
                   f"output_dir={folder / 'refused'}")
    assert done.returncode == 2 and "got anchor final, expected a block of the decoder's" in done.stderr


def test_models_that_carry_adapters(folder):
    """An anchor with a LoRA, an augmenting model of random numbers: frozen, trained along, with and without a cache."""
    base = dict(num_experts=None, lora_rank=2, max_steps=20, learning_rate=1e-2, save_steps=0)
    run("train", make_run(folder, finetuning_type="lora", output_dir=str(folder / "lora"), **base))
    printed = run("compose", folder / "compose.yaml", f"anchor={{model: {folder / 'model'}, adapter: {folder / 'lora'}}}",
                  f"augmenting=[{{model: {folder / 'aug'}, init: random, seed: 5}}]", f"output_dir={folder / 'carrying'}")
    assert "adapter" in printed and "random numbers of seed 5" in printed
    assert generate(folder / "carrying") == generate(folder / "model", "--adapter", folder / "lora")
    assert generate(folder / "calm", "--adapter", folder / "lora") == generate(folder / "carrying")
    shutil.rmtree(folder / "lora")  # the composition has its own copy

    losses = {}
    for name, keys in {"cached": [], "computed": ["state_cache_gib=0"], "on_disk": [f"state_cache_dir={folder / 'states'}"],
                       "together": ["train_adapters=true"]}.items():
        out = folder / f"carrying_{name}"
        printed = run("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "carrying"),
                                        logging_steps=1, output_dir=str(out), num_train_epochs=3, num_experts=None,
                                        learning_rate=1e-2, save_steps=0, max_steps=None), *keys)
        assert ("trained too" if name == "together" else "frozen") in printed
        losses[name] = [json.loads(line)["loss"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert losses["cached"] == losses["computed"] == losses["on_disk"]
    assert losses["together"] != losses["cached"] and losses["together"][-1] < losses["together"][0]
    assert any((folder / "states").iterdir())
    changed, frozen = (safetensors.torch.load_file(folder / f"carrying_{name}" / "adapters" / "anchor" /
                                                   "adapter_model.safetensors") for name in ("together", "cached"))
    assert any(not torch.equal(changed[name], frozen[name]) for name in frozen)

    dry = run("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "carrying"),
                                output_dir=str(folder / "unused"), num_experts=None), "--dry-run")
    assert "trained tensors" in dry and "state cache" in dry
    done = moesaic("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "carrying"),
                                     output_dir=str(folder / "unused"), num_experts=None), "--dry-run",
                   "state_cache_gib=-1")
    assert done.returncode == 2 and "state_cache_gib must not be negative" in done.stderr
    done = moesaic("train", make_run(folder, finetuning_type="lora", output_dir=str(folder / "unused"), lora_rank=2,
                                     num_experts=None), "train_adapters=true")
    assert done.returncode == 2 and "expected finetuning_type calm" in done.stderr


def test_a_changed_model_is_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copytree(folder / "aug", tmp_path / "aug")
    shutil.copytree(folder / "calm", tmp_path / "calm")
    run("inspect", tmp_path / "calm")
    torch.manual_seed(9)
    make_augmenting(tmp_path / "aug")
    config = json.loads((tmp_path / "aug" / "config.json").read_text())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config, "vocab_size": 561})).save_pretrained(
        tmp_path / "aug")
    shutil.rmtree(tmp_path / "model")
    done = moesaic("generate", "--model", tmp_path / "calm", "-p", "cat")
    assert done.returncode == 3
    assert "anchor" in done.stderr and "does not exist" in done.stderr
    assert "augmenting[0]" in done.stderr and "hash" in done.stderr


@pytest.mark.parametrize("overrides, message", [
    (["num_head=2"], "did you mean 'num_heads'"),
    (["num_heads=5"], "num_heads: got 5"),
    (["connections=[{anchor: 9, aug: 0}]"], "anchor 9"),
    (["num_connections=2"], "both num_connections and connections"),
    (["connections=[{anchor: last, aug: 0}]"], "got \"last\", expected a block's number or final"),
    (["connections=[{anchor: 0, aug: 0, read: newest}]"], "unknown key 'read'"),
    (["output_scale=-1"], "output_scale: got -1"),
    (["mask=half"], "'half'"),
    (["align=letters"], "'letters'"),
    (["augmenting=null"], "'augmenting' is missing"),
])
def test_wrong_keys(folder, overrides, message):
    done = moesaic("compose", folder / "compose.yaml", *overrides, f"output_dir={folder / 'unused'}")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (folder / "unused").exists()


def test_other_folders_are_not_written_into(folder):
    done = moesaic("compose", folder / "compose.yaml", f"output_dir={folder / 'aug'}")
    assert done.returncode == 2 and "is read from" in done.stderr
    assert not (folder / "aug" / "calm_config.json").exists()
    run_file = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "calm"), num_experts=None,
                        max_steps=1, output_dir=str(folder / "aug"))
    done = moesaic("train", run_file)
    assert done.returncode == 2 and "holds config.json" in done.stderr
    (folder / "done").mkdir()
    (folder / "done" / "run.yaml").touch()
    done = moesaic("compose", folder / "compose.yaml", f"output_dir={folder / 'done'}")
    assert done.returncode == 2 and "holds run.yaml" in done.stderr


def test_compositions_are_no_members(folder):
    done = moesaic("compose", folder / "compose.yaml", f"anchor={folder / 'calm'}", f"output_dir={folder / 'unused'}")
    assert done.returncode == 3 and "is a composition; expected a single model" in done.stderr
    done = moesaic("generate", "--model", folder / "model", "--adapter", folder / "calm", "-p", "cat")
    assert done.returncode == 3 and "give it as the model" in done.stderr


def test_preview_shows_what_the_anchor_reads(folder):
    run_file = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "calm"), num_experts=None,
                        output_dir=str(folder / "preview"))
    printed = run("data", "preview", run_file, "-n", 1)
    assert printed == run("data", "preview", run_file, "-n", 1, f"model_name_or_path={folder / 'model'}",
                          "finetuning_type=lora")
    assert '"</s>"' in printed


def test_a_dry_run_refuses_what_training_refuses(folder):
    run("compose", folder / "compose.yaml", "mask=full", f"output_dir={folder / 'full'}")
    run_file = make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "full"), num_experts=None,
                        output_dir=str(folder / "dry"))
    for flags in ([], ["--dry-run"]):
        done = moesaic("train", run_file, *flags)
        assert done.returncode == 2 and "mask full" in done.stderr


def test_kept_states_of_other_shapes_are_computed_again(folder):
    def losses(name):
        run("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "calm"), num_experts=None,
                              max_steps=3, save_steps=0, logging_steps=1, output_dir=str(folder / name)),
            f"state_cache_dir={folder / 'replaced_states'}")
        return [json.loads(line)["loss"] for line in (folder / name / "train_log.jsonl").read_text().splitlines()]

    fresh = losses("fresh")
    files = list((folder / "replaced_states").iterdir())
    assert files
    for file in files:
        safetensors.torch.save_file({"0": torch.zeros(1, 1)}, file)
    assert losses("replaced") == fresh


def test_a_new_composition_scores_as_its_anchor(folder):
    scores = [run("score", "--model", folder / name, "--text", "cat dog red", "--json") for name in ("calm", "model")]
    assert scores[0] == scores[1]


def test_training_names_what_does_not_fit(folder):
    done = moesaic("train", make_run(folder, output_dir=str(folder / "wrong")), f"model_name_or_path={folder / 'calm'}")
    assert done.returncode == 2 and "finetuning_type" in done.stderr


def test_the_experiment_in_miniature(tmp_path):
    """`moesaic demo calm` for a few steps: every stage runs and the table has its shape."""
    out = run("demo", "calm", "--fraction", 0.01, "--test_rows", 8, "--ablations", "--json", "--output_dir", tmp_path,
              "--seed", 3)
    results = json.loads(out)  # nothing but JSON on standard output
    table, errors = results["table"], results["standard_error"]
    assert {name: row.keys() for name, row in errors.items()} == {name: row.keys() for name, row in table.items()}
    assert set(table) >= {"augmenting", "anchor", "composition"}
    assert all(set(row) == {"KV-SUB", "NUM-MATH", "KV-MATH"} for row in table.values())
    assert (tmp_path / "results.json").exists()
    run("generate", "--model", tmp_path / "composition", "--max_new_tokens", 4, "-p", "1 + 2 =")
