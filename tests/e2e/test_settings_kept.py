"""What a run sets is in its adapter's folder, and whoever begins with that folder has it, or is told."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import tiny_run

LAYERS = dict(layers_to_transform=[1])
RUNS = {
    "lora": dict(finetuning_type="lora", num_experts=None, lora_rank=3, lora_alpha=5, use_rslora=True,
                 rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 9}, lora_target=["q_proj", "v_proj"], **LAYERS),
    "molora": dict(finetuning_type="molora", lora_alpha=5, use_rslora=True, lora_target=".*(q_proj|up_proj)", **LAYERS,
                   router=dict(top_k=2, topk_mode="renorm", temperature=0.5, input="layer_input", jitter=0.1)),
    "ia3": dict(finetuning_type="ia3", num_experts=None, lora_target=["v_proj", "down_proj", "o_proj"],
                feedforward_modules=".*(down|o)_proj", **LAYERS),
    "mov": dict(finetuning_type="mov", num_experts={"0": 2, "1": 3}, lora_target=["k_proj", "down_proj"],
                router=dict(temperature=2.0, head_wise=False)),
    "mov-layers": dict(finetuning_type="mov", lora_target=["k_proj", "down_proj"], feedforward_modules=[], **LAYERS),
}
OF_ADAPTERS = ["finetuning_type", "num_experts", "lora_rank", "lora_alpha", "use_rslora", "rank_pattern",
               "alpha_pattern", "lora_target", "feedforward_modules", "layers_to_transform", "router", "k_site"]


def settings(folder):
    """What an adapter's folder says, the numbers and their base apart."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: v for k, v in config.items() if k != "base_model_name_or_path"}


def bare(folder, **changes):
    """A run file that says nothing of its adapter."""
    import yaml
    path = tiny_run.make_run(folder, **changes)
    run = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k not in OF_ADAPTERS or k in changes}
    path.write_text(yaml.safe_dump(run))
    return path


@tiny_run.float32_only
@pytest.mark.parametrize("name", RUNS)
def test_saved_loaded_started_and_resumed(name, tmp_path):
    first = tiny_run.train(tmp_path, "first", save_steps=4, **RUNS[name])
    model = tmp_path / "model"
    tiny_run.run("score", "--model", model, "--adapter", first, "--text", "red cat")

    started = bare(tmp_path, output_dir=str(tmp_path / "started"), adapter_name_or_path=str(first), max_steps=1,
                   save_steps=0, learning_rate=1e-12, lora_dropout=0.0)
    tiny_run.run("train", started)
    assert settings(tmp_path / "started") == settings(first)
    scores = [json.loads(tiny_run.run("score", "--model", model, "--adapter", folder, "--text", "red cat is", "--json"))
              for folder in (first, tmp_path / "started")]
    assert scores[0]["logprobs"] == pytest.approx(scores[1]["logprobs"], abs=1e-5)

    shutil.copytree(first, tmp_path / "resumed")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "resumed" / file).unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-8", ignore_errors=True)
    resumed = bare(tmp_path, output_dir=str(tmp_path / "resumed"), max_steps=8, save_steps=0, learning_rate=3e-2,
                   lora_dropout=0.0)
    tiny_run.run("train", resumed, "--resume", "auto")
    assert settings(tmp_path / "resumed") == settings(first)


def test_a_run_that_says_otherwise(tmp_path):
    first = tiny_run.train(tmp_path, "first", save_steps=4, lora_alpha=5)
    other = tiny_run.make_run(tmp_path, output_dir=str(tmp_path / "other"), adapter_name_or_path=str(first),
                              lora_alpha=50)
    done = tiny_run.moesaic("train", other)
    assert done.returncode == 2 and "lora_alpha: got 50, it has 5" in done.stderr

    again = tiny_run.make_run(tmp_path, output_dir=str(first), lora_alpha=50, cutoff_len=32, max_steps=9,
                              lora_dropout=0.0, initializer_range=0.3)
    with open(tmp_path / "rows.jsonl") as file:
        rows = file.read()
    (tmp_path / "rows.jsonl").write_text(rows.replace("dog", "cat"))
    done = tiny_run.moesaic("train", again, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    for difference in ("lora_alpha: got 50, it has 5", "cutoff_len 1024, now 32", "content"):
        assert difference in said


def test_patterns_are_tried_in_the_files_order(tmp_path):
    """Of a run file, an override, the run.yaml that a run leaves, and of PEFT, which reads the adapter."""
    run = tiny_run.make_run(tmp_path, initializer_range=0.3, finetuning_type="lora", num_experts=None, lora_rank=6, max_steps=2,
                            save_steps=0, lora_dropout=0.0, learning_rate=3e-2, lora_target=["v_proj", "q_proj", "up_proj"])
    run.write_text(run.read_text() + 'rank_pattern: {v_proj: 3, ".*_proj": 2, q_proj: 5}\n')
    tiny_run.run("train", run, 'alpha_pattern={v_proj: 1, ".*_proj": 9, q_proj: 4}')
    tiny_run.run("train", tmp_path / "out" / "run.yaml", f"output_dir={tmp_path / 'again'}")
    for folder in (tmp_path / "out", tmp_path / "again"):
        ranks = {k.split(".")[-3]: v.shape[0] for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k}
        assert ranks == {"v_proj": 3, "q_proj": 2, "up_proj": 2}
        config = json.loads((folder / "adapter_config.json").read_text())
        assert list(config["alpha_pattern"].items()) == [("v_proj", 1), (".*_proj", 9), ("q_proj", 4)]
        wrapped = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), folder)
        ids = torch.tensor([[0, 5, 7, 3, 9, 12]])
        theirs = wrapped.eval()(ids).logits[0].log_softmax(-1)
        ours = json.loads(tiny_run.run("score", "--model", tmp_path / "model", "--adapter", folder, "--ids", "0,5,7,3,9,12",
                                       "--json"))["logprobs"]
        assert ours == pytest.approx([theirs[i, ids[0, i + 1]].item() for i in range(5)], abs=1e-4)
