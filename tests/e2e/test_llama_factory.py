"""Run files with the keys of LLaMA-Factory's examples run as they are; what can't be is refused with the reason."""

import json

import pytest
import transformers
import yaml

import tiny_run

# The keys of its examples for LoRA: supervised, with DeepSpeed and an evaluation, and on plain texts.
COMMON = dict(trust_remote_code=True, do_train=True, finetuning_type="lora", lora_rank=4, lora_target="all",
              cutoff_len=64, max_samples=20, overwrite_cache=True, preprocessing_num_workers=16,
              dataloader_num_workers=4, logging_steps=2, save_steps=500, plot_loss=True, overwrite_output_dir=True,
              save_only_model=False, report_to="none", per_device_train_batch_size=1, gradient_accumulation_steps=8,
              learning_rate=1e-3, num_train_epochs=1.0, lr_scheduler_type="cosine", warmup_ratio=0.1,
              ddp_timeout=180000000, resume_from_checkpoint=None)
EXAMPLES = {
    "sft": dict(COMMON, stage="sft", dataset="identity,questions", template="alpaca"),
    "ds3": dict(COMMON, stage="sft", dataset="questions", template="default", deepspeed="ds_z3_config.json", val_size=0.1,
                per_device_eval_batch_size=1, eval_strategy="steps", eval_steps=1, include_num_input_tokens_seen=True),
    "epochs": dict(COMMON, stage="sft", dataset="questions", template="mistral", eval_dataset="identity",
                   evaluation_strategy="epoch", save_strategy="epoch", num_train_epochs=2.0, report_to="wandb"),
    "pretrain": dict(COMMON, stage="pt", dataset="texts"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("factory")
    tiny_run.make_model(path / "model", initializer_range=0.3)
    (path / "data").mkdir()
    rows = [{"instruction": f"{a} is", "input": b, "output": a} for a in tiny_run.WORDS for b in tiny_run.WORDS[:3]]
    for name in ["identity", "questions"]:
        (path / "data" / f"{name}.json").write_text(json.dumps(rows))
    (path / "data" / "texts.json").write_text(json.dumps([{"text": f"{a} red cat"} for a in tiny_run.WORDS]))
    (path / "data" / "dataset_info.json").write_text(json.dumps({
        "identity": {"file_name": "identity.json"}, "questions": {"file_name": "questions.json"},
        "texts": {"file_name": "texts.json", "columns": {"prompt": "text"}}}))
    return path


def start(folder, example, name, *more):
    run = dict(example, model_name_or_path="model", output_dir=f"saves/{name}", bf16=tiny_run.DTYPE == "bfloat16")
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    return tiny_run.moesaic("train", f"{name}.yaml", *more, cwd=folder)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_is(folder, name):
    done = start(folder, EXAMPLES[name], name)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("passed over") == 1, done.stderr
    for key in ["trust_remote_code", "do_train", "plot_loss", "preprocessing_num_workers"]:
        assert key in done.stderr.split("passed over: ")[1].splitlines()[0]
    out = folder / "saves" / name
    assert (out / "adapter_model.safetensors").exists()
    again = yaml.safe_load((out / "run.yaml").read_text())
    assert again["dataset_dir"] == "data" and again["ddp_timeout"] == 180000000
    # The same from the file that the run leaves.
    assert tiny_run.moesaic("train", out / "run.yaml", "--dry-run", cwd=folder).returncode == 0


def test_what_they_ask_for_is_done(folder):
    for name in ["ds3", "epochs"]:
        assert start(folder, EXAMPLES[name], name).returncode == 0
    state = json.loads((folder / "saves" / "ds3" / "trainer_state.json").read_text())
    # 20 samples less 10 % of 30 rows: 2 or 3 steps of 8, each evaluated.
    assert sum("eval_loss" in row for row in state["log_history"]) == state["max_steps"]
    state = json.loads((folder / "saves" / "epochs" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [3, 5]  # 20 samples, 8 a step, 2 epochs
    assert (folder / "saves" / "epochs" / "checkpoint-3").exists()


@pytest.mark.parametrize("changes, reason", [
    (dict(stage="dpo"), "stage: got 'dpo'"), (dict(quantization_bit=4), "gradients pass through the frozen weights"),
    (dict(neftune_noise_alpha=5), "neftune_noise_alpha: got 5"), (dict(fp16=True), "float16 overflows"),
    (dict(template="qwen3"), "expected one of auto, none, alpaca, chatml, default, gemma, llama3, mistral"),
    (dict(use_dora=True), "used and merged, not trained"), (dict(template="llama3"), "no special token"),
    (dict(lr_scheduler_type="cosine_with_restarts"), "lr_scheduler_type"),
])
def test_what_would_change_the_result_is_refused(folder, changes, reason):
    for more in [["--dry-run"], []]:
        done = start(folder, dict(EXAMPLES["sft"], **changes), "refused", *more)
        assert done.returncode == 2 and reason in done.stderr, done.stderr
    assert not (folder / "saves" / "refused").exists()


def test_a_template_is_kept_and_transformers_renders_it_alike(folder):
    assert start(folder, EXAMPLES["sft"], "sft").returncode == 0
    out = folder / "saves" / "sft"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    source = (out / "chat_template.jinja").read_text()
    text = tokenizer.apply_chat_template([{"role": "system", "content": "red"}, {"role": "user", "content": "cat"},
                                          {"role": "assistant", "content": "dog"}], chat_template=source, tokenize=False)
    assert text == "red### Instruction:\ncat\n\n### Response:\ndog</s>\n\n"
    preview = tiny_run.run("data", "preview", out / "run.yaml", f"dataset_dir={folder / 'data'}",
                           f"model_name_or_path={folder / 'model'}")
    assert preview.count(" tokens, ") == 2  # one of each data set
    asked = tiny_run.moesaic("generate", "--model", "model", "--adapter", "saves/sft", "-p", "red is", "--json",
                             "--max_new_tokens", "2", cwd=folder)
    assert asked.returncode == 0, asked.stderr
    words = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert json.loads(asked.stdout)["prompt_tokens"] > words  # the default system turn is asked with, too


def test_glued_text_is_said(folder):
    run = dict(EXAMPLES["sft"])
    del run["template"]
    done = start(folder, run, "glued", "--dry-run")
    assert done.returncode == 0 and "has no chat template" in done.stderr and "alpaca, chatml" in done.stderr
    done = start(folder, dict(run, template="none"), "glued", "--dry-run")
    assert done.returncode == 0 and "has no chat template" not in done.stderr
    done = start(folder, EXAMPLES["pretrain"], "glued", "--dry-run")
    assert done.returncode == 0 and "has no chat template" not in done.stderr
