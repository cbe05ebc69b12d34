"""The Python package: the wheel that `make wheel` left, in an environment with torch alone, against the program and transformers."""

import copy
import json
import logging
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
import transformers

import test_seq2seq
import test_serve
import tiny_run
from test_install import checked

pytestmark = tiny_run.float32_only
WHEELS = tiny_run.PROGRAM.parent / "wheel"
# What `import torch` needs of the tests' own environment.
TORCH = ("torch", "torchgen", "functorch", "nvidia", "triton", "typing_extensions.py", "sympy", "mpmath", "networkx", "jinja2",
         "markupsafe", "filelock", "fsspec")


@pytest.fixture(scope="module")
def wheel():
    found = list(WHEELS.glob("*.whl"))
    assert len(found) == 1, f"{WHEELS}: got {len(found)} wheels, expected the one that `make wheel` leaves"
    return found[0]


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The python of an environment that has torch and the wheel."""
    path = tmp_path_factory.mktemp("bare") / "an environment"
    checked(sys.executable, "-m", "venv", "--without-pip", path)
    packages = next(path.glob("lib/python3*/site-packages"))
    for name in TORCH:
        of_tests = pathlib.Path(torch.__file__).parents[1] / name
        if of_tests.exists():
            (packages / name).symlink_to(of_tests)
    checked(sys.executable, "-m", "pip", "--python", path / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index",
            "--disable-pip-version-check", wheel)
    return path / "bin" / "python"


@pytest.fixture(scope="module")
def ms(bare):
    """The package, in this process."""
    sys.path.insert(0, str(next(bare.parents[1].glob("lib/python3*/site-packages"))))
    import moesaic
    return moesaic


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("python")
    tiny_run.make_run(path, initializer_range=0.3)
    tiny_run.train(path, "molora")
    tiny_run.train(path, "mov", finetuning_type="mov")
    return path


@pytest.fixture
def model(ms, folder):
    return ms.load(folder / "model", dtype="float32")


def script(bare, text, *arguments, **options):
    return subprocess.Popen([str(bare), "-c", text, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}, **options)


# --- the wheel


def test_the_wheel_is_one_for_all_and_names_no_machine(wheel):
    assert re.fullmatch(r"moesaic-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 32e6
    with zipfile.ZipFile(wheel) as archive:
        names = {re.sub(r"-[0-9a-f]{8}\.so.*|moesaic-[\d.]+\.", lambda found: ".so" if ".so" in found[0] else "", name)
                 for name in archive.namelist() if not name.endswith("/")}
        package = {str(path.relative_to(tiny_run.ROOT / "python")) for path in (tiny_run.ROOT / "python/moesaic").rglob("*")
                   if path.is_file() and "__pycache__" not in path.parts}
        assert names == package | {
            "moesaic/bin/moesaic", "moesaic/lib/libmoesaic_python.so", "moesaic.libs/libarrow.so", "moesaic.libs/libparquet.so",
            "moesaic.libs/libspdlog.so", "moesaic.libs/libfmt.so", "moesaic.libs/libyaml-cpp.so", "dist-info/METADATA",
            "dist-info/WHEEL", "dist-info/RECORD", "dist-info/entry_points.txt", "dist-info/licenses/LICENSE",
            "dist-info/licenses/THIRD_PARTY.md", "dist-info/sboms/auditwheel.cdx.json"}
        for name in archive.namelist():
            data = archive.read(name)
            assert str(tiny_run.ROOT).encode() not in data and os.path.expanduser("~/.cargo").encode() not in data, name
            assert b"PyObject_" not in data  # one file for every Python


def test_the_program_and_the_import_are_quick_to_start(bare, tmp_path):
    program = bare.parent / "moesaic"
    assert checked(program, "--version", env={}, cwd=tmp_path).startswith("moesaic ")
    checked(bare, "-c", "import sys, moesaic as ms; assert 'torch' not in sys.modules; dir(ms); ms.__version__", env={})
    answer = script(bare, "import moesaic as ms\ntry: ms.nothing\nexcept AttributeError as error: print(error)")
    assert "has no attribute 'nothing'" in answer.communicate()[0]


def test_the_page_works_as_it_stands(bare, tmp_path):
    """Every snippet of docs/python.md, one behind the other, with a tiny model in the place of SmolLM2."""
    tiny_run.make_model(tmp_path / "SmolLM2-135M-Instruct", initializer_range=0.3)
    text = (tiny_run.ROOT / "docs" / "python.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 4
    text = "\n".join(snippets).replace("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct")
    # transformers is the tests' own.
    packages = next(bare.parents[1].glob("lib/python3*/site-packages"))
    done = script(sys.executable, f"import sys; sys.path.insert(0, {str(packages)!r})\n{text}", cwd=tmp_path)
    out, error = done.communicate(timeout=300)
    assert done.returncode == 0, error
    assert "balance" in out and (tmp_path / "again" / "adapter_config.json").exists()
    assert "finished, step 20" in out and "torch.Size" in out
    assert (tmp_path / "by-hand" / "adapter_model.safetensors").exists() and (tmp_path / "reverse" / "report.html").exists()


@pytest.mark.parametrize("name", ["grow_a_mixture", "compose_two_models"])
def test_notebooks_run(bare, tmp_path, name):
    """From its first cell to its last with tiny models; what is committed has its outputs, to be read as a page."""
    import nbclient
    import nbformat
    committed = nbformat.read(tiny_run.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    text = json.dumps(outputs)
    assert len(outputs) > 5 and "100%" in text and "Traceback" not in text and "widget" not in text
    assert not {str(tiny_run.ROOT), "/tmp/"} & set(re.findall(r"/tmp/|" + re.escape(str(tiny_run.ROOT)), text))
    for model in ("model", "other"):
        tiny_run.make_model(tmp_path / model, initializer_range=0.3)
        (tmp_path / model / "chat_template.jinja").write_text(test_serve.TEMPLATE)
    for cell in committed.cells:
        cell.source = re.sub(r'"[^"]*/SmolLM2[^"]*"', '"model"', re.sub(r'"[^"]*/Qwen2[^"]*"', '"other"', cell.source))
        cell.source = cell.source.replace('"num_connections": 4', '"num_connections": 2')  # it has two blocks
        cell.source = re.sub(r"^STEPS = \d+", "STEPS = 2", cell.source, flags=re.MULTILINE)
    packages = next(bare.parents[1].glob("lib/python3*/site-packages"))
    client = nbclient.NotebookClient(committed, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"})
    assert list(tmp_path.glob("*.html")) and "100%" in json.dumps(committed.cells)


# --- texts


def test_answers_scores_and_tokens_are_the_programs(ms, folder, model):
    prompts = ["red green", "one two three cat", "blue"]
    asked = ["--model", folder / "model", "--adapter", folder / "molora", "--json", "--max_new_tokens", 7]
    lines = [json.loads(line) for line in tiny_run.run("generate", *asked, *(w for p in prompts for w in ("-p", p))).splitlines()]
    assert model.attach(folder / "molora") == "molora" and model.adapters == ["molora"]
    answers = model.generate(prompts, max_new_tokens=7)
    assert [answer.ids for answer in answers] == [line["ids"] for line in lines]
    assert [str(answer) for answer in answers] == [line["text"] for line in lines]
    assert [answer.finish_reason for answer in answers] == [line["finish_reason"] for line in lines]
    assert "".join(model.generate(prompts[1], max_new_tokens=7, stream=True)) == answers[1]
    assert model.generate(prompts[0], max_new_tokens=7, temperature=1.5, num_return_sequences=3, seed=5) != \
        model.generate(prompts[0], max_new_tokens=7, temperature=1.5, num_return_sequences=3, seed=6)
    assert model.generate(prompts[0], num_beams=2, max_new_tokens=4).score < 0
    base = model.generate(prompts, max_new_tokens=7, adapters=[])
    assert base != answers and base == model.generate(prompts, max_new_tokens=7, adapters={"molora": 0})
    told = json.loads(tiny_run.run("score", "--model", folder / "model", "--adapter", folder / "molora", "--text", prompts[1], "--json"))
    score = model.score(prompts[1])
    assert score.ids == told["ids"] and score.logprobs.tolist() == pytest.approx(told["logprobs"], abs=1e-6)
    assert score.perplexity == pytest.approx(told["perplexity"], rel=1e-6)
    told = json.loads(tiny_run.run("score", "--model", folder / "model", "--adapter", folder / "molora", "--text", "red", "--target",
                                   " green cat", "--json"))
    assert model.score("red", " green cat").sum == pytest.approx(told["sum"], abs=1e-5)
    assert model.decode(model.encode("red green")) == "red green"
    model.detach()
    assert model.adapters == [] and model.generate(prompts, max_new_tokens=7) == base


def test_prompts_are_an_adapters_own(ms, tmp_path):
    """One that was trained on plain text is asked in plain text, and with its going the model is as it was."""
    tiny_run.make_run(tmp_path, initializer_range=0.3)
    (tmp_path / "model" / "chat_template.jinja").write_text(test_serve.TEMPLATE)
    tiny_run.train(tmp_path, "plain", template="none")
    asked = ["--model", tmp_path / "model", "--max_new_tokens", 5, "--json", "-p", "red green"]
    told = {name: json.loads(tiny_run.run("generate", *asked, *more))
            for name, more in (("base", []), ("plain", ["--adapter", tmp_path / "plain"]))}
    model = ms.load(tmp_path / "model", dtype="float32")
    base = model.encode("red green")
    assert len(base) == told["base"]["prompt_tokens"] > told["plain"]["prompt_tokens"]
    model.attach(tmp_path / "plain")
    assert model.generate("red green", max_new_tokens=5).ids == told["plain"]["ids"]
    assert len(model.encode("red green")) == told["plain"]["prompt_tokens"]
    model.detach()
    assert model.encode("red green") == base
    assert ms.load(tmp_path / "plain", dtype="float32").generate("red green", max_new_tokens=5).ids == told["plain"]["ids"]


def test_evaluations_and_routes_are_the_programs(ms, folder, tmp_path):
    model = ms.load(folder / "mov", dtype="float32")
    options = ["--model", folder / "model", "--adapter", folder / "mov", "--tasks", folder / "rows.jsonl", "--limit", 6]
    told = json.loads(tiny_run.run("eval", *options, "--json"))
    result = model.evaluate(folder / "rows.jsonl", limit=6, show=False)
    assert result["results"] == told["results"] and len(result["samples"]["rows"]) == 6
    tiny_run.run("routes", *options, "--text", "red green", "-o", tmp_path / "routes")
    routes = model.routes("red green", tasks=folder / "rows.jsonl", limit=6, show=False)
    written = json.loads((tmp_path / "routes.json").read_text())
    assert routes.json["tasks"] == written["tasks"] and routes.json["text"] == written["text"]
    for weights in routes.weights.values():
        assert weights.shape[1:] == (3,) and len(weights) == len(routes.tokens)
        assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-3)  # rounded to four digits
    assert routes.page(tmp_path / "page.html").read_text() == (tmp_path / "routes.html").read_text()


# --- tensors


def test_gradients_are_transformers_and_flow_both_ways(ms, folder, model, tmp_path):
    """Logits of a batch, and the gradient of every tensor of a MoLoRA, against transformers' model and moesaic.hf."""
    from moesaic import hf
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 9]])
    with torch.no_grad():
        assert torch.allclose(model(ids), reference(ids).logits, atol=2e-5)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    padded = model(ids, mask)
    assert torch.equal(padded[0, 0], torch.zeros(padded.shape[2])) and torch.allclose(padded[1], model(ids)[1], atol=1e-5)
    assert torch.allclose(padded[0, 1:], reference(ids[:1, 1:]).logits[0], atol=2e-5)

    model.attach("molora", num_experts=3, lora_rank=2, lora_dropout=0.0)
    tensors = dict(model.named_parameters())
    assert len(tensors) == len(model.trainable()) and all(tensor.is_leaf and tensor.requires_grad for tensor in tensors.values())
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    scale = torch.tensor(2.0, requires_grad=True)  # a graph of Python's behind that of C++
    direction = torch.randn((2, 4, model.facts["vocab_size"]), generator=torch.Generator().manual_seed(2))
    (model(ids) * direction).sum().mul(scale).backward()
    mixture = hf.load(reference, model.save(tmp_path / "adapter"))
    for parameter in mixture.parameters.values():
        parameter.requires_grad_(True)
    expected = (reference(ids).logits * direction).sum()
    (2 * expected).backward()
    assert float(scale.grad) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert len(mixture.parameters) == len(tensors)
    for name, tensor in tensors.items():
        wanted = mixture.parameters[name + ".weight"].grad
        if name.endswith("lora_B"):  # kept as [E r, out], written as [E, out, r]
            wanted = wanted.transpose(1, 2).reshape(tensor.shape)
        assert torch.allclose(tensor.grad, wanted, atol=1e-4 * float(wanted.abs().max())), name
    again = dict(model.named_parameters())
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == {name: t.data_ptr() for name, t in tensors.items()}
    version = tensors[name]._version
    with torch.no_grad():
        again[name].mul_(2)
    assert tensors[name]._version > version
    assert sum(weight.numel() for weight in model.base_parameters()) == model.facts["parameters"]
    assert not any(weight.requires_grad for weight in model.base_parameters())


def test_routers_losses_have_gradients_and_jitter_is_of_training(ms, model):
    ids = torch.tensor([[3, 4, 5, 6]])
    model.attach("mov", num_experts=3, router={"jitter": 0.5})
    logits, losses = model(ids, losses=True)
    assert set(losses) == {"balance", "z"} and float(losses["balance"].detach()) >= 1 - 1e-5
    (losses["balance"] + losses["z"]).backward()
    routers = {name: tensor for name, tensor in model.named_parameters() if name.endswith("router")}
    assert routers and any(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in routers.values())
    model.zero_grad()
    assert all(tensor.grad is None for tensor in model.parameters())
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("mov"):
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        model.eval()
    model.requires_grad_(False)
    assert not model(ids).requires_grad and not model.trainable()
    with pytest.raises(ms.UsageError, match="without a router that is trained"):
        model(ids, losses=True)


def test_numbers_may_be_given_other_memory_and_modes_are_the_callers(ms, model, tmp_path):
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        model.attach("molora", num_experts=3, lora_rank=2)
        model.detach()
        model.attach("molora", num_experts=3, lora_rank=2)
    vector = torch.randn(sum(tensor.numel() for tensor in model.parameters()), generator=torch.Generator().manual_seed(1))
    torch.nn.utils.vector_to_parameters(0.1 * vector, list(model.parameters()))
    with torch.no_grad():
        logits = model(ids)
        model.attach(model.save(tmp_path / "again"), "again")
        assert torch.allclose(model(ids, adapters=["again"]), logits, atol=1e-5)
        model.save(tmp_path / "third", "molora")
    with torch.inference_mode():
        assert torch.equal(model(ids, adapters=["molora"]), logits)


def test_what_is_dropped_ends(bare, folder):
    """A stream that nobody began, and a model whose tensors are held, in the order that once stood still."""
    done = script(bare, """
import sys, moesaic as ms, torch
model = ms.load(sys.argv[1], dtype="float32")
model.attach("mov", num_experts=2)
held = list(model.parameters())
stream = model.generate("red", max_new_tokens=50, stream=True)
del model, stream
with torch.inference_mode():
    model = ms.load(sys.argv[1], dtype="float32")
    model.attach("molora", num_experts=2)
del model
""", folder / "model")
    error = done.communicate(timeout=60)[1]
    assert done.returncode == 0, error


def test_an_encoder_decoder_takes_borders(ms, tmp_path):
    test_seq2seq.make_model(tmp_path / "t5")
    model = ms.load(tmp_path / "t5", dtype="float32")
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", dtype=torch.float32)
    source, target = [5, 6, 7, 1], [8, 9, 4]
    logits = model.ragged(torch.tensor(source + target), torch.tensor([0, 7]), [[4]])
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([source]), labels=torch.tensor([target + [1]])).logits[0]
    assert torch.allclose(logits[-len(expected):], expected, atol=2e-5)
    with pytest.raises(ms.UsageError, match="ragged"):
        model(torch.tensor([source]))


# --- moesaic.hf


@pytest.mark.parametrize("form", ["plain", "concat"])
@pytest.mark.parametrize("method", ["molora", "mov"])
def test_hf_reads_what_was_trained(ms, folder, tmp_path, method, form):
    """Logits, of a left-padded batch too, and 64 tokens with and without cache; written again, the same numbers."""
    from moesaic import hf
    own = ms.load(folder / method, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    plain = model(torch.tensor([[3, 4, 5]])).logits.detach()
    mixture = hf.load(model, folder / method, form)
    ids, mask = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 3]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        ours = own(ids, mask)
        assert (plain - ours[0, 2:]).abs().max() > 0.1
        assert torch.allclose(logits[mask.bool()], ours[mask.bool()], atol=5e-5)
        routes = own.routes("red green blue", apply_chat_template=False)
        model(torch.tensor([own.encode("red green blue", raw=True)]))
        for site, weights in hf.routes(model).items():
            rows = weights[0] if weights.dim() == 3 else weights[0].mean(1)
            assert torch.allclose(rows, routes.weights[site], atol=1e-3), site
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        padded = hf.losses(model)
    own.requires_grad_(True)
    real = own(ids, mask, losses=True)[1]
    for name in padded:
        assert float(padded[name]) == pytest.approx(float(real[name]), rel=1e-4)
    prompt = own.encode("red green", raw=True)
    expected = own.generate("red green", max_new_tokens=64, raw=True).ids
    for cache in (True, False):
        made = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=64, do_sample=False,
                              use_cache=cache)[0, len(prompt):].tolist()
        assert made == expected
    hf.save(model, tmp_path / "again")
    again = ms.load(folder / "model", dtype="float32")
    again.attach(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids, mask), ours)
    with pytest.raises(ValueError, match="has a mixture already"):
        hf.attach(model, "mov")
    assert mixture.parameters and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{"lora_target": r".*layers\.0\.self_attn\.q_proj"}, {"layers_to_transform": [1]},
                                     {"use_rslora": True, "num_experts": {"0": 2, "1": 1}}])
def test_hf_writes_again_what_it_read(ms, folder, tmp_path, changes):
    from moesaic import hf
    tiny_run.train(folder, tmp_path / "trained", **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    hf.load(model, tmp_path / "trained")
    again, own, ids = hf.save(model, tmp_path / "again"), ms.load(folder / "model", dtype="float32"), torch.tensor([[3, 4, 5, 6]])
    own.attach(again)
    with torch.no_grad():
        assert torch.allclose(own(ids), model(ids).logits, atol=5e-5)
        assert torch.equal(own(ids), ms.load(tmp_path / "trained", dtype="float32")(ids))


def test_hf_leaves_the_model_as_it_was(ms, folder, tmp_path):
    from moesaic import hf
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    names, ids = [name for name, _ in model.named_modules()], torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    for wrong in (dict(num_experts=[2]), dict(num_experts=0), dict(layers=[99]), dict(targets=["o_proj"]), dict(k_site="post"),
                  dict(num_experts=3, router={"top_k": 9}), dict(router={"topk_mode": "renrom"}), dict(router={"logits": "abs"}),
                  dict(router={"input": "tokens"}), dict(router={"type": "top_k"}), dict(router={"temperature": 0})):
        with pytest.raises(ValueError, match="got"):
            hf.attach(model, "mov", **wrong)
        assert [name for name, _ in model.named_modules()] == names
    mixture = hf.attach(model, "mov", num_experts=3)
    model.save_pretrained(tmp_path / "checkpoint")  # as a Trainer does: no tensor stands twice
    mask = torch.tensor([[0, 1, 1]])
    model(ids, mask)
    by_place, routes = hf.losses(model), hf.routes(model)
    model(ids, attention_mask=mask)
    assert by_place == hf.losses(model) == hf.losses(model) and routes.keys() == hf.routes(model).keys()
    model(ids)
    assert by_place != hf.losses(model)
    mixture.remove()
    assert [name for name, _ in model.named_modules()] == names and torch.equal(model(ids).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="no router"):
        hf.attach(model, "mov", num_experts=1)
        model(ids)
        hf.losses(model)


def test_hf_begins_as_the_model_trains_and_tells_what_does_not_fit(ms, folder, tmp_path):
    from moesaic import hf

    def fresh():
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5, 6]])
    for method in ("mov", "molora"):
        model = fresh()
        with torch.no_grad():
            before = model(ids).logits
        mixture = hf.attach(model, method, num_experts=[2, 1], lora_rank=2, router={"top_k": 1, "topk_mode": "renorm"})
        assert torch.allclose(model(ids).logits, before, atol=1e-6)
        optimizer = torch.optim.AdamW(mixture.parameters.values(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(ids, labels=ids).loss + 0.01 * hf.losses(model)["balance"]
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0]
        own = ms.load(folder / "model", dtype="float32")
        own.attach(hf.save(model, tmp_path / method))
        with torch.no_grad():
            assert torch.allclose(own(ids), model(ids).logits, atol=5e-5)
    for what, call in {
            "expected 'mov' or 'molora'": lambda: hf.attach(fresh(), "lora"),
            "expected some of": lambda: hf.attach(fresh(), "mov", targets=["k_pro"]),
            "no mixture": lambda: hf.routes(fresh()),
            "expected 'plain' or 'concat'": lambda: hf.attach(fresh(), "mov", form="fused")}.items():
        with pytest.raises(ValueError, match=what):
            call()
    small = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight: no such site"):
        hf.load(small, folder / "molora")


# --- runs


def keys_of(folder, name, **changes):
    import yaml
    return {**yaml.safe_load(tiny_run.make_run(folder, output_dir=str(folder / name)).read_text()), "max_steps": 6,
            "save_steps": 3, **changes}


def test_a_run_is_the_programs_to_the_byte(ms, folder, tmp_path):
    tiny_run.run("train", tiny_run.make_run(folder, output_dir=str(tmp_path / "program")), "max_steps=6", "save_steps=3")
    before = (torch.initial_seed(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), torch.is_grad_enabled(),
              list(logging.getLogger().handlers), torch.get_rng_state())
    run = ms.train(keys_of(folder, "unused", output_dir=str(tmp_path / "python")), show=False)
    assert run.status == "finished" and run.step == 6 and len(run.history) == 6 and run.result["steps"] == 6
    assert run.log and "method     molora" in run.plan and repr(run).endswith(f"finished, step 6, loss {run.loss:.4f}>")
    after = (torch.initial_seed(), torch.get_num_threads(), signal.getsignal(signal.SIGINT), torch.is_grad_enabled(),
             list(logging.getLogger().handlers), torch.get_rng_state())
    assert before[:-1] == after[:-1] and torch.equal(before[-1], after[-1])
    name = "adapter_model.safetensors"
    assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "program" / name).read_bytes()
    by_file = ms.train(tmp_path / "program" / "run.yaml", output_dir=str(tmp_path / "file"), show=False)
    assert (by_file.output_dir / name).read_bytes() == (tmp_path / "program" / name).read_bytes()
    assert by_file.model(dtype="float32").adapters == ["file"]


def test_a_loop_in_python_is_a_run(ms, folder, tmp_path):
    """Three steps over all rows: the same losses by torch.optim.AdamW on the same start."""
    rows = [{"inputs": "red green ", "targets": "blue cat"}, {"inputs": "one ", "targets": "two three"}]
    keys = keys_of(folder, "unused", dataset=[{"rows": rows}], output_dir=str(tmp_path / "run"), lora_dropout=0.0, max_steps=3,
                   save_steps=0, per_device_train_batch_size=2, gradient_accumulation_steps=1, lr_scheduler_type="constant",
                   warmup_ratio=0.0, max_grad_norm=0.0, prompt_eos=True)
    run = ms.train(keys, show=False)
    written = list((tmp_path / "run").glob("rows-*.jsonl"))
    assert [json.loads(line) for line in written[0].read_text().splitlines()] == rows
    assert str(written[0]) in (tmp_path / "run" / "run.yaml").read_text()  # it can be repeated
    model = ms.load(folder / "model", dtype="float32")
    model.attach("molora", num_experts=3, lora_rank=2, seed=keys.get("seed", 42))
    optimizer = torch.optim.AdamW(model.parameters(), lr=keys["learning_rate"], weight_decay=0.0)
    ids, offsets, labels = [], [0], []
    for row in rows:
        prompt = model.encode(row["inputs"], raw=True)
        answer = model._native.answer_ids(row["targets"]) + [model.facts["eos_ids"][0]]
        labels += [(len(ids) + len(prompt) + i - 1, token) for i, token in enumerate(answer)]
        ids += prompt + answer
        offsets.append(len(ids))
    places, targets = (torch.tensor(column) for column in zip(*labels))
    for row in run.history:
        logits = model.ragged(torch.tensor(ids), torch.tensor(offsets))
        loss = torch.nn.functional.cross_entropy(logits[places], targets)
        assert float(loss) == pytest.approx(row["loss"], abs=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = ms.load(run.output_dir, dtype="float32").state_dict()
    for name, tensor in model.named_parameters():
        assert torch.allclose(tensor, trained[name], atol=2e-4), name
    saved = model.save(tmp_path / "saved")
    tiny_run.run("generate", "--model", folder / "model", "--adapter", saved, "-p", "red")
    with pytest.raises(ms.UsageError, match="expected a new"):
        model.save(tmp_path / "saved")


def test_a_run_beside_others_can_be_watched_and_stopped(ms, folder, tmp_path):
    run = ms.train(keys_of(folder, "unused", output_dir=str(tmp_path / "run"), max_steps=100000), wait=False)
    while run.step < 3:
        time.sleep(0.01)
    assert run.status == "running" and run.loss > 0
    run.stop()
    run.wait(show=False)
    assert run.status == "interrupted" and (run.output_dir / f"checkpoint-{run.result['steps']}").is_dir()
    more = ms.train(keys_of(folder, "unused", output_dir=str(run.output_dir), max_steps=100000,
                            resume_from_checkpoint="auto"), wait=False)
    while not more.history:
        more.step
        time.sleep(0.01)
    assert more.history[0]["step"] == run.result["steps"] + 1
    more.stop()
    more.wait(show=False)


def test_a_run_in_the_background_tells_its_end(ms, folder, tmp_path):
    run = ms.train(keys_of(folder, "unused", output_dir=str(tmp_path / "run"), max_steps=2, save_steps=0), wait=False)
    for _ in range(600):
        if run.status != "running":
            break
        time.sleep(0.05)
    assert run.status == "finished" and len(run.history) == 2 and run.result["steps"] == 2 and run.log
    # A folder called as a method is a folder; rows and paths go with a run file, too.
    rows = [{"inputs": "red ", "targets": "cat"}]
    more = ms.train(run.output_dir / "run.yaml", output_dir=tmp_path / "molora", dataset=[{"rows": rows}], max_steps=1, show=False)
    model = ms.load(folder / "model", dtype="float32")
    assert model.attach(more.output_dir) == "molora" and model.facts["adapters"][0]["num_experts"] == 3
    failed = ms.train(keys_of(folder, "unused", output_dir=str(tmp_path / "failed"), learning_rate=1e30, max_grad_norm=0.0), wait=False)
    for _ in range(2):
        with pytest.raises(ms.DataError):
            failed.wait(show=False)
    assert failed.status == "failed"
    with pytest.raises(ms.UsageError, match="max_step"):
        ms.train({**keys_of(folder, "unused", output_dir=str(tmp_path / "wrong"), dataset=[{"rows": rows}]), "max_step": 1})
    assert not (tmp_path / "wrong").exists()
    assert "molora" in ms.plan(keys_of(folder, "unused", output_dir=str(tmp_path / "planned"), dataset=[{"rows": rows}]))
    assert not (tmp_path / "planned").exists()


@pytest.mark.parametrize("work", ["train", "generate", "nothing more"])
def test_ctrl_c_ends_what_runs(bare, folder, tmp_path, work):
    text = f"""
import json, sys, moesaic as ms
model = ms.load(sys.argv[1], dtype="float32")
print("ready", flush=True)
if {work!r} == "train":
    print(ms.train(json.loads(sys.argv[2])).status)
elif {work!r} == "generate":
    try:
        for _ in range(100000): model.generate("red", max_new_tokens=5000)
    except KeyboardInterrupt:
        print("interrupted", model.generate("red", max_new_tokens=1) is not None)
else:
    run = ms.train(json.loads(sys.argv[2]), wait=False)   # the process ends while it runs
    while run.step < 2: pass
"""
    keys = keys_of(folder, "unused", output_dir=str(tmp_path / "run"), max_steps=100000)
    process = script(bare, text, folder / "model", json.dumps(keys))
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(1200):  # until it trains
            if work != "train" or (tmp_path / "run" / "train_log.jsonl").exists():
                break
            time.sleep(0.05)
        if work != "nothing more":
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, error
    if work == "train":
        assert out == "interrupted\n" and list((tmp_path / "run").glob("checkpoint-*"))
    elif work == "generate":
        assert out == "interrupted True\n"


# --- what can't be


def test_mistakes_are_told_in_the_programs_words(ms, folder, model, tmp_path):
    assert issubclass(ms.UsageError, ValueError) and issubclass(ms.FormatError, ms.DataError)
    ids = torch.tensor([3, 4, 5])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for kind, message, call in (
            (ms.UsageError, "no such file or folder", lambda: ms.load(tmp_path / "nothing")),
            (ms.FormatError, "config.json", lambda: ms.load(tmp_path / "broken")),
            (ms.UsageError, "int4", lambda: ms.load(folder / "model", quantize="int4")),
            (ms.UsageError, "'float64': expected", lambda: ms.load(folder / "model", dtype=torch.float64)),
            (ms.UsageError, "NaN|nan", lambda: model.generate("red", temperature=float("nan"))),
            (ms.UsageError, "finite", lambda: model.attach(folder / "molora", scale=float("inf"))),
            (ms.ShapeError, "row of zeros", lambda: model(ids[None], torch.zeros(1, 3))),
            (ms.ShapeError, r"borders\[0\]: got 99", lambda: model.ragged(ids, [0, 3], [[99]])),
            (ms.UsageError, "unknown key 'num_expert', did you mean 'num_experts'", lambda: model.attach("mov", num_expert=3)),
            (ms.UsageError, "moe_aux_loss_coef", lambda: model.attach("mov", num_experts=3, moe_aux_loss_coef=0.1)),
            (ms.UsageError, "expected a method", lambda: model.attach("movv")),
            (ms.UsageError, "matches no|q_pro.*q_proj", lambda: model.attach("molora", lora_target=["q_pro"])),
            (ms.UsageError, "there is none", lambda: model.detach()),
            (ms.UsageError, "nobody", lambda: model.generate("red", adapters=["nobody"])),
            (ms.UsageError, "temperature", lambda: model.generate("red", temperature=-1)),
            (ms.UsageError, "several answers", lambda: model.generate(["red", "green"], stream=True)),
            (ms.ShapeError, "ids: got float32", lambda: model.ragged(ids.float(), torch.tensor([0, 3]))),
            (ms.ShapeError, "ids: got int64 of shape 1 x 3", lambda: model.ragged(ids[None], torch.tensor([0, 3]))),
            (ms.ShapeError, "offsets: got 0 99", lambda: model.ragged(ids, torch.tensor([0, 99]))),
            (ms.ShapeError, "offsets", lambda: model.ragged(ids, torch.tensor([0, 2, 2, 3]))),
            (ms.ShapeError, "offsets", lambda: model.ragged(ids, torch.tensor([0]))),
            (ms.ShapeError, "borders", lambda: model.ragged(ids, torch.tensor([0, 3]), [[1], [1]])),
            (ms.ShapeError, "attention_mask", lambda: model(ids[None], torch.ones(1, 2))),
            (ms.DataError, "vocabulary", lambda: model.ragged(torch.tensor([3, -1]), torch.tensor([0, 2]))),
            (ms.DataError, "vocabulary", lambda: model.ragged(torch.tensor([3, 10**6]), torch.tensor([0, 2]))),
            (ms.UsageError, "at least 2", lambda: model.score("red")),
            (ms.UsageError, "expected tasks or a suite", lambda: model.evaluate()),
            (ms.UsageError, "no router", lambda: model.routes("red")),
            (ms.UsageError, "unknown key: 'max_step'", lambda: ms.train({"max_step": 1})),
            (ms.UsageError, "output_dir", lambda: ms.train({"dataset": [{"rows": []}]})),
            (ms.UsageError, "copied or pickled", lambda: copy.deepcopy(model)),
            (ms.UsageError, "copied or pickled", lambda: pickle.dumps(model))):
        with pytest.raises(kind, match=message) as raised:
            call()
        assert not re.match(r"\[\w+\]", str(raised.value))
    assert model.adapters == []  # nothing half attached
    with pytest.raises(TypeError):
        model.generate("red", max_tokens=3)


def test_one_thread_at_a_time(ms, folder, model):
    stream = model.generate("red " * 20, max_new_tokens=40, temperature=1.0, stream=True)
    next(stream)
    stream.close()  # waits until the model is free
    model.score("red green")
    from moesaic._native import Job
    job = Job(model._native.generate([model.encode("red " * 20)] * 3000, json.dumps({"max_new_tokens": 40, "batch_size": 1})))
    with pytest.raises(ms.UsageError, match="at work"):
        model.score("red green")
    job.finish()
    model.score("red green")
    outcomes = []

    def work():
        for _ in range(50):
            try:
                outcomes.append(model.ragged(torch.tensor([3, 4]), torch.tensor([0, 2])).shape[0])
            except ms.UsageError:
                outcomes.append("at work")
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readers = [threading.Thread(target=lambda: [model.adapters for _ in range(300)]) for _ in range(2)]
    for thread in readers:  # what there is may be asked at any time
        thread.start()
    for _ in range(30):
        model.detach(model.attach("mov", num_experts=2))
    for thread in readers:
        thread.join()
    assert len(outcomes) == 200 and set(outcomes) <= {2, "at work"} and 2 in outcomes
