"""What SECURITY.md promises of terminals: no control character of a file or a model reaches one."""

import json
import re
import subprocess

import pytest
import safetensors.torch
import torch

import tiny_run

EVIL = "\x1b[2J\x9b31m\u202egnp\x07\x7f\r"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """model/, whose tokens, tensors and template hold control characters, and an adapter, a task and prompts of that kind."""
    folder = tmp_path_factory.mktemp("terminals")
    tiny_run.train(folder, "molora", max_steps=2)
    model = folder / "model"
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {(word if i < 6 else word + EVIL): i for word, i in vocabulary.items()}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = ("{% for m in messages %}{{ m.content }}{% if 'stop' in m.content %}"
                               "{{ raise_exception('" + EVIL + "') }}{% endif %}{% endfor %}")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({f"a{EVIL}\nforged": torch.zeros(2)}, folder / "tensors.safetensors")
    row = {"query": "red " + EVIL, "choices": ["one", "two"], "gold": 0}
    (folder / f"task{EVIL[:4]}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "red " + EVIL}) + "\n" + json.dumps({"prompt": "one"}) + "\n")
    (folder / "rows.jsonl").write_text(json.dumps({"inputs": "red", "targets": "one"}) + "\n" +
                                       json.dumps({EVIL: 1, "messages": EVIL}) + "\n")
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps({"model_type": EVIL, "architectures": [EVIL]}))
    return folder


VERBS = {
    "score": ["score", "--model", "model", "--ids", "0,7,8,9"],
    "one answer": ["generate", "--model", "model", "-p", "red", "--max_new_tokens", "8", "--raw"],
    "a file of prompts": ["generate", "--model", "model", "--prompts", "prompts.jsonl", "--max_new_tokens", "8"],
    "answers as JSON": ["generate", "--model", "model", "--prompts", "prompts.jsonl", "--max_new_tokens", "8", "--json"],
    "a template that refuses": ["generate", "--model", "model", "-p", "stop"],
    "tensors": ["inspect", "tensors.safetensors", "--tensors"],
    "tensors as JSON": ["inspect", "tensors.safetensors", "--tensors", "--json"],
    "an unknown family": ["inspect", "config"],
    "eval": ["eval", "--model", "model", "--tasks", f"task{EVIL[:4]}.jsonl"],
    "eval as JSON": ["eval", "--model", "model", "--tasks", f"task{EVIL[:4]}.jsonl", "--json"],
    "routes": ["routes", "--model", "model", "--adapter", "molora", "--tasks", f"task{EVIL[:4]}.jsonl", "-o", "page"],
    "validate": ["data", "validate", "rows.jsonl"],
    "preview": ["data", "preview", "molora.yaml", "dataset=[rows.jsonl]", "output_dir=" + EVIL],
    "a flag": ["inspect", "--" + EVIL],
}


@pytest.mark.parametrize("what", VERBS)
def test_control_characters_are_made_visible(hostile, what):
    done = subprocess.run([tiny_run.PROGRAM, *VERBS[what]], cwd=hostile, capture_output=True, timeout=60)
    said = (done.stdout + done.stderr).decode()
    assert said and not CONTROL.search(said), said
    assert "\\u001b" in said or "\\x1b" in said or what == "preview", said
    assert "\nforged" not in said
    if "--json" in VERBS[what]:
        out = done.stdout.decode()
        for text in out.splitlines() if "generate" in VERBS[what] else [out]:
            json.loads(text)


def test_an_answer_can_be_had_as_it_is(hostile):
    command = [tiny_run.PROGRAM, "generate", "--model", "model", "-p", "red", "--max_new_tokens", "8", "--raw"]
    shown = subprocess.run(command, cwd=hostile, capture_output=True, timeout=60).stdout.decode()
    raw = subprocess.run([*command, "--raw_output"], cwd=hostile, capture_output=True, timeout=60).stdout.decode()
    assert CONTROL.search(raw)
    assert CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", raw) == shown
