"""One conversation from file to loss to answer: whatever template, tools and special tokens a run had are there again."""

import json

import pytest
import tokenizers
import torch
import transformers

import tiny_run
from tiny_run import moesaic, run

CHATML = ("{%- if tools %}{{- 'TOOLS ' + (tools | tojson) + '\\n' }}{%- endif %}{%- for m in messages %}"
          "{{- '<|im_start|>' + m.role + '\\n' + m.content }}{%- for c in m.tool_calls or [] %}{{- 'CALL ' + (c | tojson) }}"
          "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
ROWS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"role": "user", "content": "it"}, {"role": "assistant", "content": "is"}], "tools": TOOLS}]


def make_model(folder, **tokenizer_config):
    """A random Llama of one token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(special + alphabet), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    return folder


def tokens(text):
    for special in ("<|im_start|>", "<|im_end|>"):
        text = text.replace(special, "#")
    return len(text.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` without a template, `named` with two of them, `run` an adapter of `model` trained with CHATML."""
    path = tmp_path_factory.mktemp("conversations")
    make_model(path / "model")
    make_model(path / "named", chat_template=[{"name": "default", "template": CHATML},
                                              {"name": "tool_use", "template": "TOOL-USE:" + CHATML}])
    (path / "chatml.jinja").write_text(CHATML)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run("train", write_run(path, "run", model_name_or_path=str(path / "model"), template=str(path / "chatml.jinja")))
    return path


def write_run(path, name, **keys):
    file = path / f"{name}.json"
    file.write_text(json.dumps({"dataset": str(path / "rows.jsonl"), "finetuning_type": "lora", "lora_rank": 2, "max_steps": 1, "save_steps": 1,
                                "output_dir": str(path / name), "bf16": False, **keys}))
    return file


def ask(*arguments):
    return json.loads(run("generate", "--json", "--max_new_tokens", 1, *arguments).splitlines()[0])["prompt_tokens"]


PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_an_adapter_brings_its_own_template(folder):
    assert (folder / "run" / "chat_template.jinja").read_text() == CHATML
    assert ask("--model", folder / "model", "-p", "hi") == 2
    assert ask("--model", folder / "model", "--adapter", folder / "run", "-p", "hi") == tokens(PROMPT)
    assert ask("--model", folder / "model", "--adapter", folder / "run" / "checkpoint-1", "-p", "hi") == tokens(PROMPT)
    run("train", write_run(folder, "more", model_name_or_path=str(folder / "named"), adapter_name_or_path=str(folder / "run")))
    assert (folder / "more" / "chat_template.jinja").read_text() == CHATML
    # It wins over its base's.
    assert ask("--model", folder / "named", "--adapter", folder / "run", "-p", "hi") == tokens(PROMPT)


def test_the_template_goes_on_with_merge_and_export(folder):
    for verb in ("merge", "export"):
        run(verb, "--model", folder / "model", "--adapter", folder / "run", folder / verb)
        assert ask("--model", folder / verb, "-p", "hi") == tokens(PROMPT)
        assert transformers.AutoTokenizer.from_pretrained(folder / verb).chat_template == CHATML


def test_all_weights_keep_the_template_they_were_trained_with(folder):
    run("train", write_run(folder, "full", model_name_or_path=str(folder / "model"), template=str(folder / "chatml.jinja"),
                           finetuning_type="full"))
    assert ask("--model", folder / "full", "-p", "hi") == tokens(PROMPT)


def test_named_templates_are_chosen_and_carried_on(folder):
    out = run("data", "preview", write_run(folder, "preview", model_name_or_path=str(folder / "named")), "-n", "2")
    assert out.count("TOOL-USE:TOOLS") == 1
    assert out.count("hi<|im_end|>") == 1
    run("export", "--model", folder / "named", folder / "exported")
    templates = transformers.AutoTokenizer.from_pretrained(folder / "exported").chat_template
    assert templates == {"default": CHATML, "tool_use": "TOOL-USE:" + CHATML}
    run("train", write_run(folder, "named_run", model_name_or_path=str(folder / "named")))
    assert transformers.AutoTokenizer.from_pretrained(folder / "named_run").chat_template == templates
    out = run("data", "preview", write_run(folder, "preview", model_name_or_path=str(folder / "named"), template="tool_use"))
    assert "TOOL-USE:<|im_start|>" in out


def test_prompts_files_give_tools_and_nothing_unknown(folder):
    file = folder / "prompts.jsonl"
    file.write_text(json.dumps({"messages": ROWS[1]["messages"][:1], "tools": TOOLS}))
    assert ask("--model", folder / "named", "--prompts", file) == tokens(
        "TOOL-USE:TOOLS " + json.dumps(TOOLS) + "\n<|im_start|>user\nit<|im_end|>\n<|im_start|>assistant\n")
    for bare in ([TOOLS[0]["function"]], []):
        file.write_text(json.dumps({"prompt": "it", "tools": bare}))
        assert ask("--model", folder / "named", "--prompts", file) == tokens(
            ("TOOL-USE:TOOLS " + json.dumps(TOOLS) + "\n" if bare else "") +
            "<|im_start|>user\nit<|im_end|>\n<|im_start|>assistant\n")
    file.write_text(json.dumps({"prompt": "it", "tool": TOOLS}))
    failed = moesaic("generate", "--model", folder / "named", "--prompts", file)
    assert failed.returncode == 3 and "unknown key 'tool', did you mean 'tools'?" in failed.stderr


def test_evaluation_asks_with_the_rows_tools(folder):
    run("eval", "--model", folder / "named", "--tasks", folder / "rows.jsonl", "--apply_chat_template", "--max_gen_toks", 1,
        "--log_samples", "--output_path", folder / "results")
    samples = "".join(path.read_text() for path in (folder / "results").rglob("samples*.jsonl"))
    assert samples.count("TOOL-USE:TOOLS") == 1


def test_a_prompt_and_its_raw_answer_meet_without_a_blank(tmp_path):
    """SentencePiece-style tokenizers put a blank in front of a text, but not in front of an answer."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "▁", "2", "+", "=", "4", "▁2", "▁4"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("▁", "2"), ("▁", "4")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tiny_run.make_model(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt": "2+2=", "response": "4"}, {"prompt": "<s>2+2=", "response": "4</s>"})))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "<s>2+2=4</s>"}))
    for name, count in (("rows.jsonl", 2), ("texts.jsonl", 1)):
        out = run("data", "preview", write_run(tmp_path, "run", model_name_or_path=str(tmp_path / "model"), template="none",
                                               dataset=str(tmp_path / name)), "-n", count)
        assert out.count('"4"') == out.count('"<s>"') == out.count('"</s>"') == count


def test_a_run_without_a_template_is_asked_without_one(tmp_path):
    """`template: none` is remembered in the folder, for whatever is done with it."""
    make_model(tmp_path / "model", chat_template=CHATML)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"inputs": "hi", "targets": "ho"}) + "\n")
    path = write_run(tmp_path, "run", model_name_or_path=str(tmp_path / "model"), template="none", save_steps=1, max_steps=2)
    run("train", path)

    def prompt_tokens(folder):
        line = run("generate", "--model", tmp_path / "model", "--adapter", folder, "-p", "hi", "--json", "--max_new_tokens", 1)
        return json.loads(line)["prompt_tokens"]

    folder = tmp_path / "run"
    assert prompt_tokens(folder) == prompt_tokens(folder / "checkpoint-1") == tokens("hi")
    write_run(tmp_path, "run", model_name_or_path=str(tmp_path / "model"), template="none", save_steps=1, max_steps=4)
    run("train", path, "--resume", "auto")
    assert prompt_tokens(folder) == tokens("hi")

    (tmp_path / "task.jsonl").write_text(json.dumps({"query": "hi", "choices": ["ho", "hu"], "gold": 0}) + "\n")
    done = moesaic("eval", "--model", tmp_path / "model", "--adapter", folder, "--tasks", tmp_path / "task.jsonl",
                   "--apply_chat_template")
    assert done.returncode == 2 and "no chat template" in done.stderr
    run("merge", "--model", tmp_path / "model", "--adapter", folder, tmp_path / "merged")
    line = run("generate", "--model", tmp_path / "merged", "-p", "hi", "--json", "--max_new_tokens", 1)
    assert json.loads(line)["prompt_tokens"] == tokens("hi")
    run("export", "--adapter", folder, "--format", "peft", tmp_path / "peft")
    assert prompt_tokens(tmp_path / "peft") == tokens("hi")
    # A run that begins with it goes on in its words.
    again = write_run(tmp_path, "again", model_name_or_path=str(tmp_path / "model"), template="auto", max_steps=1,
                      adapter_name_or_path=str(folder / "checkpoint-4"))
    run("train", again)
    assert prompt_tokens(tmp_path / "again") == tokens("hi")
