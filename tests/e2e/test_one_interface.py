"""What a single model can, a composition can: routing, balance losses, sentence routers; and requests that choose."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from test_compose import make_augmenting
from tiny_run import float32_only, make_run, moesaic, run, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a composition of it in `calm`, and adapters: two mixtures, a LoRA and one that routes by sentence."""
    path = tmp_path_factory.mktemp("one")
    train(path, "a3")
    train(path, "a5", num_experts=5)
    train(path, "lora", finetuning_type="lora", num_experts=None)
    train(path, "by_sentence", router={"input": "sentence"})
    make_augmenting(path / "aug")
    train(path, "aug_mixture", model_name_or_path=str(path / "model"))
    compose(path, "calm")
    (path / "task.jsonl").write_text("".join(
        json.dumps({"inputs": f"{a} is", "answer_choices": ["one", "two"], "target": "two"}) + "\n"
        for a in ("red", "cat dog", "three")))
    return path


def compose(path, name, **augmenting):
    (path / f"{name}.compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(path / "model"), "augmenting": {"model": str(path / "aug"), **augmenting},
        "connections": [{"anchor": 0, "aug": 1}], "output_dir": str(path / name)}))
    run("compose", path / f"{name}.compose.yaml")


def answers(*arguments):
    lines = run("generate", "--json", "--max_new_tokens", 6, *arguments).splitlines()
    return [json.loads(line)["ids"] for line in lines]


def test_two_mixtures_of_different_size(folder, tmp_path):
    adapters = ["--adapter", folder / "a3", "--adapter", folder / "a5"]
    results = json.loads(run("eval", "--model", folder / "model", *adapters, "--tasks", folder / "task.jsonl", "--json"))
    routing = results["routing"]["task"]
    assert {owner: {len(site["mean_prob"]) for site in sites.values()} for owner, sites in routing.items()} == {
        "a3": {3}, "a5": {5}}
    assert results["config"]["model_args"]["dtype"] == "float32"
    run("routes", "--model", folder / "model", *adapters, "--tasks", folder / "task.jsonl", "--text", "cat dog", "-o",
        tmp_path / "r")
    routes = json.loads((tmp_path / "r.json").read_text())
    assert set(routes["routers"]) == set(routes["text"]["routers"]) == {"a3", "a5"}


def test_a_composition_with_a_mixture_has_its_routing(folder):
    given = ["--model", folder / "calm", "--adapter", folder / "a3", "--tasks", folder / "task.jsonl", "--json"]
    assert set(json.loads(run("eval", *given))["routing"]["task"]) == {"a3"}


@float32_only
def test_a_new_composition_answers_as_its_anchor_with_the_same_adapter(folder):
    for adapter in ("a3", "by_sentence"):
        given = ["--adapter", folder / adapter, "-p", "cat dog", "-p", "red"]
        assert answers("--model", folder / "calm", *given) == answers("--model", folder / "model", *given)
    given = ["--adapter", folder / "by_sentence", "--tasks", folder / "task.jsonl", "--json"]
    scores = [json.loads(run("eval", "--model", folder / name, *given)) for name in ("calm", "model")]
    assert scores[0]["results"] == scores[1]["results"] and scores[0]["routing"] == scores[1]["routing"]


def test_the_balance_loss_reaches_an_augmenting_model(folder):
    # The same model beside itself, whose copy carries the mixture.
    (folder / "twin.compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(folder / "model"), "augmenting": {"model": str(folder / "model"), "adapter": str(folder / "a3")},
        "connections": [{"anchor": 0, "aug": 1}], "output_dir": str(folder / "twin")}))
    run("compose", folder / "twin.compose.yaml")
    settings = {"finetuning_type": "calm", "model_name_or_path": str(folder / "twin"), "num_experts": None,
                "moe_aux_loss_coef": 1.0, "max_steps": 4, "save_steps": 0, "logging_steps": 2}
    out = folder / "twin_trained"
    run("train", make_run(folder, output_dir=str(out), train_adapters=True, **settings))
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert all(row["aux_loss"] > 0 for row in rows)
    assert len((out / "router_stats.jsonl").read_text().splitlines()) == 2
    done = moesaic("train", make_run(folder, output_dir=str(folder / "twin_frozen"), **settings))
    assert done.returncode == 2 and "no router is trained" in done.stderr


@float32_only
def test_requests_choose_their_adapters(folder):
    prompts = [{"prompt": "cat dog", "adapters": {"a3": 1}}, {"prompt": "red", "adapters": ["lora"]},
               {"prompt": "cat dog", "adapters": {"a3": 0.4, "lora": -1.5}}, {"prompt": "one two", "adapters": {}}]
    given = ["--model", folder / "model", "--adapter", folder / "a3", "--adapter", folder / "lora"]

    def ask(rows):
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return answers(*given, "--prompts", path)

    together = ask(prompts)
    assert together == [ask([row])[0] for row in prompts]
    assert together[1] == answers("--model", folder / "model", "--adapter", folder / "lora", "-p", "red")[0]
    assert together[3] == answers("--model", folder / "model", "-p", "one two")[0]
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "cat", "adapters": {"lara": 1}}) + "\n")
    done = moesaic("generate", *given, "--prompts", folder / "prompts.jsonl")
    assert done.returncode == 2 and "prompts.jsonl:1" in done.stderr and "Did you mean 'lora'?" in done.stderr


@float32_only
def test_scales_and_low_rank_pairs_stand_together(folder):
    """y = W (x m) + B A x: their sum is the sum of what each adds to a linear, where both act on one."""
    train(folder, "ia3", finetuning_type="ia3", num_experts=None, learning_rate=0.3)
    both = ["--adapter", folder / "ia3", "--adapter", folder / "lora"]
    assert answers("--model", folder / "model", *both, "-p", "cat dog") == answers(
        "--model", folder / "model", *reversed_pairs(both), "-p", "cat dog")
    scores = [json.loads(run("score", "--model", folder / "model", *adapters, "--text", "cat dog red", "--json"))["sum"]
              for adapters in ([], both[:2], both[2:], both)]
    assert len({round(score, 4) for score in scores}) == 4


def reversed_pairs(flags):
    return flags[2:] + flags[:2]


def test_the_number_format_is_said_and_written(folder):
    done = moesaic("generate", "--model", folder / "model", "-p", "cat", "--dtype", "bfloat16", "--max_new_tokens", 1)
    assert "computing in bfloat16 on cpu (asked for)" in done.stderr + done.stdout
    printed = run("train", make_run(folder, output_dir=str(folder / "format"), max_steps=1), "bf16=true")
    resolved = yaml.safe_load((folder / "format" / "run.yaml").read_text())
    assert resolved["bf16"] in (True, False) and " on cpu: asked for)" in printed.splitlines()[0]
    card = (folder / "format" / "README.md").read_text()
    assert ("bfloat16" if resolved["bf16"] else "float32") in card


def test_a_full_run_leaves_model_folders(folder):
    out = folder / "full"
    run("train", make_run(folder, output_dir=str(out), finetuning_type="full", num_experts=None, max_steps=2,
                          save_steps=1), "--dtype", "float32")
    for model in (out, out / "checkpoint-1"):
        assert "perplexity" in run("score", "--model", model, "--text", "cat dog")
    assert not torch.equal(load_file(out / "model.safetensors")["model.embed_tokens.weight"],
                           load_file(folder / "model" / "model.safetensors")["model.embed_tokens.weight"])
