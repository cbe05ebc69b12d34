"""`moesaic routes` of a composition: what the anchor reads, as JSON and a page; and converting a released checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_compose import folder  # noqa: F401  a fixture: a composition in `calm` of `model` and `aug`
from tiny_run import moesaic, run


@pytest.fixture
def tasks(folder):
    path = folder / "reading.jsonl"
    path.write_text("".join(json.dumps({"inputs": f"{a} is", "answer_choices": ["one", "two"], "target": "two"}) + "\n"
                            for a in ("red", "cat", "dog")))
    return path


def test_text_and_tasks(folder, tasks):
    printed = run("routes", "--model", folder / "calm", "--text", "cat dog red", "--tasks", tasks, "-o", folder / "out" / "read")
    assert "0: 1 -> 0" in printed and "0: 3 -> 1" in printed
    routes = json.loads((folder / "out" / "read.json").read_text())
    assert routes["structure"]["connections"] == [{"augmenting": 0, "aug": 1, "anchor": 0}, {"augmenting": 0, "aug": 3, "anchor": 1}]
    assert routes["tasks"]["reading"]["questions"] == 3
    # A new composition adds nothing, wherever it looks.
    assert [c["added"] for c in routes["tasks"]["reading"]["connections"]] == [0, 0]
    assert all(0 < c["entropy_share"] <= 1 for c in routes["tasks"]["reading"]["connections"])
    text = routes["text"]
    stream = text["streams"][0]
    assert stream["visible"] == sorted(stream["visible"]) and stream["visible"][-1] == len(stream["tokens"])
    for connection in text["connections"]:
        assert len(connection["weights"]) == routes["structure"]["num_heads"]
        for head in connection["weights"]:
            assert [len(row) for row in head] == stream["visible"]
            assert all(abs(sum(row) - 1) < 1e-2 for row in head if row)
    page = (folder / "out" / "read.html").read_text()
    assert page.startswith("<!doctype html>") and '"visible"' in page


def test_a_text_alone_is_enough_and_nothing_is_not(folder):
    run("routes", "--model", folder / "calm", "--text", "cat", "-o", folder / "text")
    assert json.loads((folder / "text.json").read_text())["tasks"] == {}
    done = moesaic("routes", "--model", folder / "calm")
    assert done.returncode == 2 and "--tasks is missing; give tasks, a --text, or both" in done.stderr
    done = moesaic("routes", "--model", folder / "model", "--text", "cat")
    assert done.returncode == 2 and "--adapter is missing" in done.stderr


def test_convert_then_look_inside(folder, tmp_path):
    width = json.loads((folder / "model" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(1)
    hook = {"proj.weight": (width, width), "proj.bias": (width,), "cross_attention.in_proj_weight": (3 * width, width),
            "cross_attention.in_proj_bias": (3 * width,), "cross_attention.out_proj.weight": (width, width),
            "cross_attention.out_proj.bias": (width,), "post_attention_layernorm.weight": (width,)}
    tensors = {f"cross_attention_hooks.0.{name}": torch.randn(shape) for name, shape in hook.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "calm", "num_connections": 1, "num_heads": 2}))
    bases = ["--anchor", folder / "model", "--augmenting", folder / "model"]
    done = moesaic("convert", tmp_path, tmp_path / "calm")
    assert done.returncode == 3
    assert "--anchor" in done.stderr and "--augmenting" in done.stderr
    run("convert", tmp_path, tmp_path / "calm", *bases)
    ours = load_file(tmp_path / "calm" / "calm_model.safetensors")
    assert torch.equal(ours["connections.0.v_proj.weight"],
                       tensors["cross_attention_hooks.0.cross_attention.in_proj_weight"][2 * width:])
    # Without a mask every position sees all.
    run("routes", "--model", tmp_path / "calm", "--text", "cat dog red", "-o", tmp_path / "full")
    stream = json.loads((tmp_path / "full.json").read_text())["text"]["streams"][0]
    assert set(stream["visible"]) == {len(stream["tokens"])}
    done = moesaic("generate", "--model", tmp_path / "calm", "-p", "cat")
    assert done.returncode == 2 and "positions see the future" in done.stderr
    run("convert", tmp_path, tmp_path / "causal", *bases, "--mask", "causal")
    run("generate", "--model", tmp_path / "causal", "-p", "cat", "--max_new_tokens", 2)

    tensors.pop("cross_attention_hooks.0.proj.bias")
    tensors["cross_attention_hooks.1.proj.bias"] = torch.zeros(3)
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    done = moesaic("convert", tmp_path, tmp_path / "damaged", *bases)
    assert done.returncode == 3 and not (tmp_path / "damaged").exists()
    assert "missing (1):\n    cross_attention_hooks.0.proj.bias\n" in done.stderr
    assert "unexpected (1):\n    cross_attention_hooks.1.proj.bias" in done.stderr
