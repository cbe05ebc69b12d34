"""Tiny sparse models through the program: what is trained in them, what is refused, and what is seen of their routers."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import tiny_run
from tiny_run import WORDS, float32_only, moesaic, run

EXPERTS = 4
KINDS = {
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=EXPERTS)),
    "qwen2_moe": (transformers.Qwen2MoeConfig, dict(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=20,
                                                    shared_expert_intermediate_size=24, mlp_only_layers=[0])),
    "granitemoeshared": (transformers.GraniteMoeSharedConfig, dict(num_local_experts=EXPERTS,
                                                                   shared_intermediate_size=24)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse")
    for name, (kind, sizes) in KINDS.items():
        tiny_run.make_model(path / name, 0.3, kind, **sizes)
    (path / "model").symlink_to(path / "mixtral")
    rows = [{"inputs": f"{a} {b} ", "targets": f"{b} {a} {a}"} for a in WORDS for b in WORDS]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "task.jsonl").write_text('{"query": "red cat", "choices": [" red", " dog"], "gold": 0}\n' * 3)
    return path


def settings(folder, name, kind="mixtral", **changes):
    return tiny_run.make_run(folder, **{"model_name_or_path": str(folder / kind), "output_dir": str(folder / name),
                                        "max_steps": 4, "save_steps": 0, "lora_dropout": 0.0, "learning_rate": 1e-2,
                                        **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_experts_is_trained_merged_and_used(folder, kind):
    name = f"lora_{kind}"
    said = run("train", settings(folder, name, kind, finetuning_type="lora", num_experts=None))
    experts = "w1" if kind != "qwen2_moe" else "gate_proj"
    assert f"{experts} " in said
    tensors = load_file(folder / name / "adapter_model.safetensors")
    assert any(".experts.3." in key and key.endswith("lora_B.weight") and t.abs().max() > 0 for key, t in tensors.items())
    merged = run("merge", folder / name, folder / f"{name}_merged")
    assert float(merged.rpartition("base + adapter: ")[2].split()[0]) < 1e-3
    asked = ["--raw", "-p", "red cat", "--max_new_tokens", 6, "--dtype", "float32"]
    assert run("generate", folder / name, *asked) == run("generate", "--model", folder / f"{name}_merged", *asked)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{name}_merged")
    assert sum(p.numel() for p in theirs.parameters()) == json.loads(
        run("inspect", folder / f"{name}_merged", "--json"))["total_parameters"]


@float32_only
@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_with_the_router_and_resume(folder, kind):
    """The router learns, with its balance loss; a run that was interrupted ends with the same bytes; transformers reads it."""
    changes = dict(finetuning_type="full", num_experts=None, moe_aux_loss_coef=0.05, save_steps=2)
    run("train", settings(folder, f"full_{kind}", kind, **changes))
    run("train", settings(folder, f"half_{kind}", kind, **changes))
    shutil.rmtree(folder / f"half_{kind}" / "checkpoint-4")
    (folder / f"half_{kind}" / "model.safetensors").unlink()
    run("train", folder / f"half_{kind}.yaml", "--resume", "auto")
    whole = (folder / f"full_{kind}" / "model.safetensors").read_bytes()
    assert (folder / f"half_{kind}" / "model.safetensors").read_bytes() == whole
    before, behind = load_file(folder / kind / "model.safetensors"), load_file(folder / f"full_{kind}" / "model.safetensors")
    assert before.keys() == behind.keys()
    routers = [key for key in before if key.endswith((".gate.weight", "router.layer.weight"))]
    assert routers and all(not torch.equal(before[key], behind[key]) for key in routers)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / f"full_{kind}").eval()
    ours = json.loads(run("score", "--model", folder / f"full_{kind}", "--text", "red cat is not one dog", "--json"))
    with torch.no_grad():
        logits = model(torch.tensor([ours["ids"]])).logits[0].log_softmax(-1)
    assert ours["logprobs"] == pytest.approx([logits[i, t].item() for i, t in enumerate(ours["ids"][1:])], abs=1e-4)


def test_what_is_refused(folder):
    def refused(name, *words, **changes):
        done = moesaic("train", settings(folder, name, **changes))
        assert done.returncode == 2, done.stderr
        for word in words:
            assert word in done.stderr
        assert not (folder / name / "adapter_model.safetensors").exists()

    refused("r1", "no router is trained", finetuning_type="lora", num_experts=None, moe_aux_loss_coef=0.1)
    refused("r2", "experts.0.w1", "it is an expert itself", "all-linear", lora_target=["q_proj", "w1"])
    tiny_run.make_model(folder / "one", 0.3, transformers.MixtralConfig, num_local_experts=3, num_experts_per_tok=1)
    refused("r3", "num_experts_per_tok: got 1", "no gradient", kind="one", finetuning_type="full", num_experts=None)
    broken = shutil.copytree(folder / "mixtral", folder / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_local_experts": 5}))
    done = moesaic("generate", "--model", broken, "-p", "red")
    assert done.returncode == 3 and "experts.4.w1.weight" in done.stderr, done.stderr


def test_mixtures_leave_experts_alone(folder):
    for method in ("molora", "mov"):
        said = run("train", settings(folder, method, "qwen2_moe", finetuning_type=method, k_site="output"))
        names = load_file(folder / method / "adapter_model.safetensors")
        assert names and not any(".experts." in key for key in names), said
        assert any("shared_expert" in key for key in names)


def test_routers_are_seen(folder):
    run("routes", "--model", folder / "qwen2_moe", "--tasks", folder / "task.jsonl", "--text", "red cat one", "-o",
        folder / "routes")
    seen = json.loads((folder / "routes.json").read_text())
    assert list(seen["tasks"]["task"]["routers"]["base"]) == ["model.layers.1.mlp.gate"]
    assert json.loads(run("inspect", folder / "mixtral", "--json"))["active_parameters"] < 44256
    printed = run("eval", "--model", folder / "mixtral", "--tasks", folder / "task.jsonl")
    assert "acc" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_int8_answers(folder, kind):
    assert run("generate", "--model", folder / kind, "--quantize", "int8", "--raw", "-p", "red cat", "--max_new_tokens", 4)


def test_a_composition_of_sparse_models(folder):
    (folder / "compose.yaml").write_text(yaml.safe_dump({
        "anchor": str(folder / "mixtral"), "augmenting": [{"model": str(folder / "granitemoeshared")}],
        "output_dir": str(folder / "composition")}))
    run("compose", folder / "compose.yaml")
    run("train", settings(folder, "joined", "composition", finetuning_type="calm", num_experts=None))
    assert run("generate", "--model", folder / "joined", "--raw", "-p", "red cat", "--max_new_tokens", 4) is not None
    run("routes", "--model", folder / "joined", "--text", "red cat", "-o", folder / "of_both")
    assert set(json.loads((folder / "of_both.json").read_text())["text"]["routers"]) == {"anchor", "augmenting.0"}
