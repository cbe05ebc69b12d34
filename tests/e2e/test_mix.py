"""LoRAs one has as the experts of a MoLoRA: mixed without training, and with their routers trained."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

import tiny_run

PARTS = {
    "a": dict(lora_rank=2, lora_alpha=6, lora_target=["q_proj", "v_proj"], seed=1),
    "b": dict(lora_rank=3, lora_alpha=3, use_rslora=True, lora_target=["q_proj", "down_proj"], seed=2,
              rank_pattern={"down_proj": 5}, layers_to_transform=[1]),
    "c": dict(lora_rank=2, lora_alpha=2, lora_target="all-linear", seed=3),
}
# What a mix's parts say themselves.
BARE = dict(finetuning_type="mix", num_experts=None, lora_rank=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and the LoRAs of PARTS."""
    path = tmp_path_factory.mktemp("mix")
    for name, keys in PARTS.items():
        tiny_run.train(path, name, finetuning_type="lora", num_experts=None, **keys)
    return path


def score(folder, *adapters):
    """Log-probabilities of a short text, with adapters beside the model."""
    flags = [word for adapter in adapters for word in ("--adapter", adapter)]
    printed = tiny_run.run("score", "--model", folder / "model", "--text", "red cat is not one blue dog", "--json", *flags)
    return json.loads(printed)["logprobs"]


def mix(out, *parts, router="uniform"):
    return tiny_run.run("mix", *parts, "-o", out, "--router", router)


def run_file(folder, name, **changes):
    parts = {"adapters": [str(folder / part) for part in "abc"]} if "adapter_name_or_path" not in changes else {}
    path = tiny_run.make_run(folder, output_dir=str(folder / name), **{**BARE, **parts, "lora_dropout": 0.0, **changes})
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if v is not None}))
    return path


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("router", ["uniform", "arrow"])
def test_mix_is_used_like_any_adapter(router, folder, tmp_path):
    printed = mix(tmp_path / "mix", *(folder / part for part in "abc"), router=router)
    assert "a MoLoRA of 3 experts" in printed
    assert f"expert 1  {folder / 'b'}: 2 of 14 sites (nothing at the others), rank 3, 5, scale 1.342, 1.732" in printed
    own = score(folder, tmp_path / "mix")
    assert own != score(folder)
    assert tiny_run.run("generate", tmp_path / "mix", "-p", "red cat", "--max_new_tokens", 4)
    assert json.loads(tiny_run.run("inspect", tmp_path / "mix", "--json"))
    alike = score(folder, *(f"{folder / part}:{1 / 3}" for part in "abc"))  # a request's weights, one for all tokens
    assert (own == pytest.approx(alike, abs=1e-4)) == (router == "uniform")


def test_mix_taken_apart_is_its_parts(folder, tmp_path):
    mix(tmp_path / "mix", folder / "a", folder / "b", folder / "c", router="arrow")
    apart = tiny_run.run("export", tmp_path / "mix", tmp_path / "apart", "--format", "peft").split()
    for part, expert in zip("abc", apart, strict=True):
        assert score(folder, expert) == pytest.approx(score(folder, folder / part), abs=1e-4)
    mix(tmp_path / "again", *apart, router="arrow")
    assert score(folder, tmp_path / "again") == pytest.approx(score(folder, tmp_path / "mix"), abs=1e-4)


def test_a_part_twice_weighs_twice(folder, tmp_path):
    mix(tmp_path / "mix", folder / "a", folder / "a", folder / "c")
    assert score(folder, tmp_path / "mix") == pytest.approx(
        score(folder, f"{folder / 'a'}:{2 / 3}", f"{folder / 'c'}:{1 / 3}"), abs=1e-4)


def damaged(folder, kind, tmp_path):
    """Part a as it may not be."""
    part = shutil.copytree(folder / "a", tmp_path / kind)
    config = json.loads((part / "adapter_config.json").read_text())
    numbers = tensors(part)
    if kind == "dora":
        config["use_dora"] = True
    elif kind == "other base":
        config["moesaic"]["base_fingerprint"] = "sha256-all:" + 64 * "0"
    elif kind == "embedding":
        numbers["base_model.model.lm_head.weight"] = numbers["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] * 1
    elif kind == "a model":
        shutil.rmtree(part)
        return folder / "model"
    (part / "adapter_config.json").write_text(json.dumps(config))
    save_file(numbers, part / "adapter_model.safetensors")
    return part


@pytest.mark.parametrize("kind, code, said", [
    ("dora", 2, "got an adapter with use_dora, expected low-rank pairs of linears alone"),
    ("embedding", 2, "got an adapter with lm_head.weight"),
    ("other base", 2, "got adapters of different bases, expected one"),
    ("a model", 3, "It looks like a whole model"),
])
def test_what_is_no_part_is_refused(kind, code, said, folder, tmp_path):
    part = damaged(folder, kind, tmp_path)
    done = tiny_run.moesaic("mix", part, folder / "b", "-o", tmp_path / "out")
    assert done.returncode == code and said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
    done = tiny_run.moesaic("train", run_file(folder, "refused", adapters=[str(part), str(folder / "b")]), "--dry-run")
    assert done.returncode == code and said in done.stderr, done.stderr


def test_bad_commands(folder, tmp_path):
    mixed = tmp_path / "mix"
    mix(mixed, folder / "a", folder / "b")
    for words, said in [
        ([folder / "a", "-o", tmp_path / "out"], "got 1 adapter, expected two or more"),
        ([folder / "a", mixed, "-o", tmp_path / "out"], "`moesaic export --format peft` writes its experts one by one"),
        ([folder / "a", folder / "b", "-o", folder / "a"], str(folder / "a")),
        ([folder / "a", folder / "b", "-o", tmp_path / "out", "--top_k", 1], "expected --router arrow"),
        ([folder / "a", folder / "b", "-o", tmp_path / "out", "--router", "arrow", "--top_k", 3], "expected 1 to 2"),
    ]:
        done = tiny_run.moesaic("mix", *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    for changes, said in [
        (dict(adapters=None), "got neither adapters nor adapter_name_or_path"),
        (dict(adapter_name_or_path=str(mixed), adapters=[str(folder / "a"), str(folder / "b")]), "got both"),
        (dict(adapter_name_or_path=str(folder / "a")), "got " + str(folder / "a") + ", an adapter of type lora"),
        (dict(finetuning_type="lora", lora_rank=2), "adapters: got"),
        (dict(lora_rank=7), "lora_rank: got 7, it has"),
        (dict(num_experts=4), "num_experts: got 4, it has 3"),
        (dict(lora_target=["q_proj"]), "lora_target: got"),
    ]:
        done = tiny_run.moesaic("train", run_file(folder, "bad", **changes), "--dry-run")
        assert done.returncode == 2 and said in done.stderr, (changes, done.stderr)


def test_other_names_of_a_base_are_a_warning(folder, tmp_path):
    part = shutil.copytree(folder / "a", tmp_path / "a")
    config = json.loads((part / "adapter_config.json").read_text())
    config["base_model_name_or_path"], config["moesaic"] = "somebody/model", {}
    (part / "adapter_config.json").write_text(json.dumps(config))
    done = tiny_run.moesaic("mix", folder / "b", part, "-o", tmp_path / "out")
    assert done.returncode == 0 and "whether these are one model their folders do not say" in done.stderr + done.stdout


def test_the_words_are_the_first_parts(folder, tmp_path):
    for name, template in [("a", "{{ messages }}"), ("b", "")]:
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    for first, other in ["ab", "ba"]:
        done = tiny_run.moesaic("mix", tmp_path / first, tmp_path / other, "-o", tmp_path / f"of_{first}")
        assert done.returncode == 0 and "was trained with another chat template" in done.stderr + done.stdout, done.stderr
        assert (tmp_path / f"of_{first}" / "chat_template.jinja").read_text() == (tmp_path / first / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def trained(folder):
    tiny_run.run("train", run_file(folder, "trained", max_steps=12, save_steps=0))
    return folder / "trained"


def test_only_routers_are_trained(folder, trained, tmp_path):
    mix(tmp_path / "mix", *(folder / part for part in "abc"))
    before, after = tensors(tmp_path / "mix"), tensors(trained)
    assert sorted(before) == sorted(after)
    changed = {name.rsplit(".", 2)[1] for name in before if not before[name].equal(after[name])}
    assert changed == {"router"}
    printed = tiny_run.run("train", run_file(folder, "planned"), "--dry-run")
    routers = sum(t.numel() for name, t in after.items() if "router" in name)
    assert f"trainable  {routers} (" in printed
    assert f"experts    {folder / 'a'}: 4 of 14 sites" in printed
    assert (trained / "router_stats.jsonl").stat().st_size > 0


def test_it_learns(folder, trained):
    losses = [row["loss"] for row in json.loads((trained / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert losses[-1] < losses[0]


def test_its_run_file_runs_again(folder, trained, tmp_path):
    tiny_run.run("train", trained / "run.yaml", f"output_dir={tmp_path / 'again'}")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (trained / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("router", [dict(), dict(logits="absolute")])
def test_checkpointing_changes_nothing(router, folder):
    """Blocks whose routers alone are trained are blocks that train."""
    runs = [run_file(folder, f"kept-{kept}", max_steps=3, save_steps=0, router=router, gradient_checkpointing=not kept,
                     overwrite_output_dir=True) for kept in (True, False)]
    for run in runs:
        tiny_run.run("train", run)
    kept, again = tensors(folder / "kept-True"), tensors(folder / "kept-False")
    for name, tensor in kept.items():
        assert tensor.allclose(again[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("router", [dict(), dict(top_k=2, topk_mode="renorm", logits="absolute", jitter=0.1)])
def test_resumed_bit_for_bit(router, folder, tmp_path):
    changes = dict(max_steps=12, save_steps=5, router=router, moe_aux_loss_coef=0.01, router_z_loss_coef=0.001)
    name = "straight-" + (router and "top" or "soft")
    tiny_run.run("train", run_file(folder, name, **changes))
    again = shutil.copytree(folder / name, folder / (name + "-again"))
    shutil.rmtree(again / "checkpoint-12", ignore_errors=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (again / file).unlink()
    tiny_run.run("train", run_file(folder, name + "-again", **changes), "--resume", "auto")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / name / "adapter_model.safetensors").read_bytes()


def test_routers_go_on_from_where_a_mix_stands(folder, tmp_path):
    """From arrows, with the settings of the mix."""
    mix(tmp_path / "mix", folder / "a", folder / "c", router="arrow")
    run = run_file(folder, "from-arrows", adapter_name_or_path=str(tmp_path / "mix"), max_steps=4, save_steps=0,
                   learning_rate=1e-12)
    tiny_run.run("train", run)
    assert score(folder, folder / "from-arrows") == pytest.approx(score(folder, tmp_path / "mix"), abs=1e-5)
    config = json.loads((folder / "from-arrows" / "adapter_config.json").read_text())
    assert config["moesaic"]["router"]["logits"] == "absolute"


def test_nothing_of_its_parts_is_overwritten(folder):
    done = tiny_run.moesaic("train", run_file(folder, "a", overwrite_output_dir=True), "--dry-run")
    assert done.returncode == 2, done.stderr
