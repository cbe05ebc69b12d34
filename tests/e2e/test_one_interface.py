"""What a single model can, a composition can: routing, balance losses, sentence routers; requests that choose; formats."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny_run
from test_compose import make_augmenting
from tiny_run import float32_only, make_run, moesaic, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the mixtures `four` and `eight` and a `lora`; compositions of it: `calm`, and `carrying`, whose
    augmenting model carries a mixture of three."""
    path = tmp_path_factory.mktemp("mixtures")
    for name, changes in {"four": {"num_experts": 4}, "eight": {"num_experts": 8},
                          "lora": {"finetuning_type": "lora", "num_experts": 1}, "by_sentence": {"router": {"input": "sentence"}}}.items():
        tiny_run.train(path, name, **changes)
    make_augmenting(path / "aug")
    tiny_run.train(path, "three", model_name_or_path=str(path / "aug"), num_experts=3)
    (path / "compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(path / "model"), "augmenting": str(path / "aug"), "connections": [{"anchor": 0, "aug": 1},
                                                                                       {"anchor": 1, "aug": 3}],
        "output_dir": str(path / "calm")}))
    run("compose", path / "compose.yaml")
    run("compose", path / "compose.yaml", f"augmenting=[{{model: {path / 'aug'}, adapter: {path / 'three'}}}]",
        f"output_dir={path / 'carrying'}")
    (path / "task.jsonl").write_text("".join(json.dumps(
        {"inputs": f"{a} is ", "answer_choices": ["one two", "dog"], "target": "dog"}) + "\n" for a in ("red", "cat not")))
    return path


def evaluate(folder, model, *adapters):
    flags = [flag for name in adapters for flag in ("--adapter", folder / name)]
    return json.loads(run("eval", "--model", folder / model, *flags, "--tasks", folder / "task.jsonl", "--json"))


def generate(folder, model, *arguments):
    out = run("generate", "--model", folder / model, "--raw", "--json", "--max_new_tokens", 8, *arguments)
    return [json.loads(line)["ids"] for line in out.splitlines()]


def experts(sites):
    return {len(site["mean_prob"]) for site in sites.values()}


# --- routing has an owner --------------------------------------------------------------------------------------------

def test_mixtures_of_different_size_are_counted_apart(folder):
    there, back = (evaluate(folder, "model", *order)["routing"]["task"] for order in (("four", "eight"), ("eight", "four")))
    for routing in (there, back):
        assert {owner: experts(sites) for owner, sites in routing.items()} == {"four": {4}, "eight": {8}}
        for sites in routing.values():
            for site in sites.values():
                assert sum(site["mean_prob"]) == pytest.approx(1, abs=1e-4)
    alone = evaluate(folder, "model", "four")["routing"]["task"]
    # Routers of block 0 read what no adapter has changed yet.
    first = next(site for site in alone["four"] if "layers.0.self_attn.q_proj" in site)
    for routing in (there, back):
        assert routing["four"][first]["mean_prob"] == pytest.approx(alone["four"][first]["mean_prob"], abs=1e-5)


def test_routes_of_two_mixtures(folder, tmp_path):
    run("routes", "--model", folder / "model", "--adapter", folder / "four", "--adapter", folder / "eight", "--tasks",
        folder / "task.jsonl", "--text", "red dog", "-o", tmp_path / "routes")
    routes = json.loads((tmp_path / "routes.json").read_text())
    assert set(routes["routers"]) == {"four", "eight"} and routes["dtype"] == "float32"
    assert {owner: experts(sites) for owner, sites in routes["tasks"]["task"]["routers"].items()} == {"four": {4}, "eight": {8}}
    assert {len(row) for rows in routes["text"]["routers"]["eight"].values() for row in rows} == {8}


# --- mixtures in compositions ----------------------------------------------------------------------------------------

def test_routing_of_a_composition(folder, tmp_path):
    routing = evaluate(folder, "carrying", "four")["routing"]["task"]
    assert {owner: experts(sites) for owner, sites in routing.items()} == {"augmenting.0": {3}, "four": {4}}
    run("routes", "--model", folder / "carrying", "--adapter", folder / "four", "--tasks", folder / "task.jsonl",
        "--text", "red dog", "-o", tmp_path / "routes")
    routes = json.loads((tmp_path / "routes.json").read_text())
    assert set(routes["tasks"]["task"]["routers"]) == {"augmenting.0", "four"}
    assert len(routes["tasks"]["task"]["connections"]) == len(routes["text"]["connections"]) == 2


def test_routers_in_augmenting_models_are_balanced(folder):
    def calm(name, *keys):
        return moesaic("train", make_run(folder, finetuning_type="calm", model_name_or_path=str(folder / "carrying"),
                                         num_experts=None, learning_rate=1e-2, max_steps=4, save_steps=0, logging_steps=1,
                                         lora_dropout=0.0, output_dir=str(folder / name)), *keys)
    done = calm("balanced", "train_adapters=true", "moe_aux_loss_coef=1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (folder / "balanced" / "train_log.jsonl").read_text().splitlines()]
    # E sum_e f_e p_e is at least about 1 for each of the routers, which are averaged or added.
    assert len(rows) == 4 and all(row["aux_loss"] > 0.5 for row in rows)
    stats = [json.loads(line) for line in (folder / "balanced" / "router_stats.jsonl").read_text().splitlines()]
    assert len(stats) == 4 and all(1 / 3 <= row["max_load"] <= 1 and len(row["layers"]) > 0 for row in stats)
    assert not (folder / "refused").exists()
    done = calm("refused", "moe_aux_loss_coef=1")  # the adapters stay frozen
    assert done.returncode == 2 and "no router is trained" in done.stderr


def test_a_coefficient_needs_a_router(folder):
    done = moesaic("train", make_run(folder, finetuning_type="lora", num_experts=1, output_dir=str(folder / "unused")),
                   "moe_aux_loss_coef=0.1")
    assert done.returncode == 2 and "no router is trained" in done.stderr
    assert not (folder / "unused").exists()


@float32_only
def test_a_sentence_router_beside_a_composition(folder):
    """An untrained composition is its anchor, whatever stands beside it."""
    adapter = ["--adapter", folder / "by_sentence"]
    prompts = ["-p", "red cat is", "-p", "dog"]
    answers = generate(folder, "calm", *adapter, *prompts)
    assert answers == generate(folder, "model", *adapter, *prompts) != generate(folder, "model", *prompts)
    calm, model = (evaluate(folder, name, "by_sentence") for name in ("calm", "model"))
    assert calm["results"] == model["results"] and calm["routing"] == model["routing"]


# --- the request as a router -----------------------------------------------------------------------------------------

REQUESTS = [("red cat", {"four": 1}), ("dog is", {"lora": 0.5}), ("red cat", ["eight", "lora"]), ("not one", {}),
            ("two", {"four": 0.25, "eight": 1.5, "lora": -1}), ("red cat", None)]


@float32_only
@pytest.mark.parametrize("model", ["model", "calm"])
def test_every_prompt_chooses_its_adapters(folder, model, tmp_path):
    rows = [{"prompt": text} if chosen is None else {"prompt": text, "adapters": chosen} for text, chosen in REQUESTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attached = [flag for name in ("four", "eight", "lora") for flag in ("--adapter", folder / name)]
    expected = []
    for text, chosen in REQUESTS:
        chosen = ["four", "eight", "lora"] if chosen is None else chosen  # all that are attached
        weights = {name: 1 for name in chosen} if isinstance(chosen, list) else chosen
        flags = [flag for name, weight in weights.items() for flag in ("--adapter", f"{folder / name}:{weight}")]
        expected += generate(folder, model, *flags, "-p", text)
    for batch_size in (1, 3, 8):
        assert generate(folder, model, *attached, "--prompts", tmp_path / "prompts.jsonl", "--batch_size",
                        batch_size) == expected
    assert len({tuple(ids) for ids in expected}) > 3, "the choice must matter"


@pytest.mark.parametrize("chosen, message", [
    ({"fuor": 1}, "fuor"), ({"lora": "much"}, "expected numbers"), (["lora", 7], "expected names"), ("lora", "a list of names")])
def test_requests_that_can_not_be(folder, chosen, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red"}\n' + json.dumps({"prompt": "red", "adapters": chosen}) + "\n")
    done = moesaic("generate", "--model", folder / "model", "--adapter", folder / "four", "--adapter", folder / "lora",
                   "--prompts", tmp_path / "prompts.jsonl")
    assert done.returncode == 2 and message in done.stderr and "prompts.jsonl:2" in done.stderr
    if chosen == {"fuor": 1}:
        assert "four" in done.stderr and "lora" in done.stderr and "Did you mean 'four'?" in done.stderr


@float32_only
def test_scales_and_low_rank_pairs_stand_together(folder):
    tiny_run.train(folder, "ia3", finetuning_type="ia3", num_experts=1, learning_rate=0.3)
    both = ["--adapter", folder / "ia3", "--adapter", folder / "lora"]
    scores = [json.loads(run("score", "--model", folder / "model", *adapters, "--text", "cat dog red", "--json"))["sum"]
              for adapters in ([], both[:2], both[2:], both, both[2:] + both[:2])]
    assert len({round(score, 4) for score in scores}) == 4 and scores[3] == pytest.approx(scores[4], abs=1e-4)


# --- number formats --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_format_is_said_and_written(folder, dtype, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "rows.jsonl", tmp_path)
    printed = run("train", make_run(tmp_path, max_steps=1, save_steps=0), "--dtype", dtype)
    assert f"{dtype} on cpu: asked for" in printed.splitlines()[0]
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["bf16"] is (dtype == "bfloat16")
    assert f"in {dtype};" in (tmp_path / "out" / "README.md").read_text()

    flags = ["--model", folder / "model", "--dtype", dtype, "--json"]
    done = moesaic("generate", *flags, "-p", "red", "--max_new_tokens", 1)
    assert f"computing in {dtype} on cpu (asked for)" in done.stderr and json.loads(done.stdout)["dtype"] == dtype
    assert json.loads(run("score", *flags, "--text", "red cat"))["dtype"] == dtype
    done = moesaic("eval", *flags, "--tasks", folder / "task.jsonl")
    assert f"computing in {dtype} on cpu (asked for)" in done.stderr
    assert json.loads(done.stdout)["config"]["model_args"]["dtype"] == dtype


def test_scores_are_float32_unless_told_otherwise_and_training_says_why(folder):
    assert json.loads(run("score", "--model", folder / "model", "--text", "red cat", "--json"))["dtype"] == "float32"
    assert evaluate(folder, "model")["config"]["model_args"]["dtype"] == "float32"
    printed = run("train", make_run(folder, output_dir=str(folder / "unused")), "--dry-run", "--dtype", "auto")
    assert "this CPU multiplies it faster" in printed or "this CPU has no fast bfloat16" in printed


def test_a_full_run_leaves_model_folders(folder):
    out = folder / "full"
    run("train", make_run(folder, output_dir=str(out), finetuning_type="full", num_experts=None, max_steps=2,
                          save_steps=1), "--dtype", "float32")
    for model in (out, out / "checkpoint-1"):
        assert "perplexity" in run("score", "--model", model, "--text", "cat dog")
    assert not torch.equal(load_file(out / "model.safetensors")["model.embed_tokens.weight"],
                           load_file(folder / "model" / "model.safetensors")["model.embed_tokens.weight"])
