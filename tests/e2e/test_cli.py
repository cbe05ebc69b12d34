"""The program as its users meet it: every verb that runs a model, on tiny random models, right and wrong inputs."""

import csv
import json
import os
import pathlib
import re
import subprocess

import peft
import pytest
import tokenizers
import torch
import transformers

import tiny_run

CHAT_TEMPLATE = ("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} </s> {% endfor %}"
                 "{% if add_generation_prompt %}[assistant] {% endif %}")
WORDS = "red green blue one two three cat dog is not the a yes no maybe when who".split()


def moesaic(*arguments, stdin=None):
    done = subprocess.run([str(tiny_run.PROGRAM), *map(str, tiny_run.with_dtype(arguments))], capture_output=True, text=True, timeout=300,
                          input=stdin, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode >= 0, f"killed by signal {-done.returncode}: {done.stderr}"
    return done


def run(*arguments, stdin=None):
    done = moesaic(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done


def make_model(folder, vocabulary=len(WORDS) + 6, layers=2, seed=0):
    """Weights large enough that the best token is clearly the best."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
        tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the model `model`, its tokenizer and chat template, and a PEFT LoRA `lora`."""
    path = tmp_path_factory.mktemp("cli")
    model = make_model(path / "model")
    names = ["<s>", "</s>", "<unk>", "[user]", "[assistant]", "[system]", *WORDS]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                                unk_token="<unk>", chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(path / "model")
    torch.manual_seed(1)
    adapter = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16,
                                                         target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapter.save_pretrained(path / "lora")
    return path


@pytest.fixture(scope="module")
def reference(folder):
    return (transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval(),
            transformers.AutoTokenizer.from_pretrained(folder / "model"))


def logprobs(model, ids):
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [table[i, ids[i + 1]].item() for i in range(len(ids) - 1)]


# --- the frame -------------------------------------------------------------------------------------------------------

def test_version_and_help():
    assert re.match(r"moesaic \d+\.\d+\.\d+", run("--version").stdout)
    assert "generate" in run("--help").stdout
    assert "--adapter" in run("generate", "--help").stdout


@pytest.mark.parametrize("arguments, says", [
    ([], "Usage"),
    (["genrate"], "unknown command 'genrate'. Did you mean 'generate'?"),
    (["generate", "--modle", "x", "-p", "hi"], "unknown flag '--modle'. Did you mean '--model'?"),
    (["generate", "--temp", "1", "-p", "x"], "unknown flag '--temp'. Did you mean '--temperature'?"),
    (["fly"], "unknown command 'fly'. See"),
    (["generate", "-p", "hi"], "--model is required"),
    (["generate", "{f}/model", "--model", "{f}/lora", "-p", "hi"], "got two models"),
    (["generate", "--model", "{f}/model"], "give either -p TEXT or --prompts FILE"),
    (["generate", "--model", "{f}/nothing", "-p", "hi"], "nothing: no such file or folder"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--top_p", "2", "--temperature", "-1"], "top_p: got 2"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--num_beams", "2", "--temperature", "1"], "a beam draws nothing"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--length_penalty", "2"], "length_penalty: got 2"),
    (["chat", "--model", "{f}/model", "--num_beams", "2"], "unknown flag '--num_beams'"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--raw", "--system", "x"], "need a chat template"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--dtype", "int3"], "int3"),
    (["generate", "--model", "{f}/model", "-p", "hi", "--log-level", "loud"], "loud"),
    (["generate", "--model", "{f}/model", "--adapter", "{f}/none", "-p", "hi"], "none' is no folder"),
    (["generate", "--model", "{f}/model", "--adapter", "{f}/lora:much", "-p", "hi"], "the scale behind ':' is no number"),
    (["score", "--model", "{f}/model"], "exactly one of --text"),
    (["score", "--model", "{f}/model", "--ids", "3"], "at least 2 are needed"),
    (["eval", "--model", "{f}/model", "--tasks", "{f}/no.jsonl"], "no such file or folder"),
    (["eval", "--model", "{f}/model", "--tasks", "{f}/t.jsonl", "--batch_size", "many"], "expected a number from 1 to 4096 or auto"),
    (["routes", "--model", "{f}/model", "--text", "cat"], "--adapter is missing"),
    (["inspect"], "give a file or folder"),
    (["inspect", "{f}/nothing"], "no such file or folder"),
    (["inspect", "--model", "{f}/model"], "--method is missing"),
    (["inspect", "--model", "{f}/model", "--method", "lora", "--lora_target", "q_prj"], "Did you mean 'q_proj'?"),
])
def test_wrong_usage(folder, arguments, says):
    done = moesaic(*[argument.replace("{f}", str(folder)) for argument in arguments])
    assert done.returncode == 2, done.stderr
    assert says in done.stderr + (done.stdout if not arguments else "")


def test_damaged_files_are_exit_3(folder, tmp_path):
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"]:
        (tmp_path / name).write_bytes((folder / "model" / name).read_bytes())
    weights = (folder / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    done = moesaic("generate", "--model", tmp_path, "-p", "red")
    assert done.returncode == 3 and "model.safetensors" in done.stderr
    (tmp_path / "broken.jsonl").write_text('{"prompt": "red"}\n{"prompt": 7}\n')
    done = moesaic("generate", "--model", folder / "model", "--prompts", tmp_path / "broken.jsonl")
    assert done.returncode == 3 and "broken.jsonl:2" in done.stderr


def test_adapter_of_another_model_is_refused(folder, tmp_path):
    make_model(tmp_path / "deep", layers=3)
    for file in (folder / "model").glob("*token*"):
        (tmp_path / "deep" / file.name).write_bytes(file.read_bytes())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deep")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    done = moesaic("generate", "--model", folder / "model", "--adapter", tmp_path / "lora", "-p", "red")
    assert done.returncode == 3
    assert "model.layers.2.self_attn.q_proj" in done.stderr


# --- generate, chat, score -------------------------------------------------------------------------------------------

def test_generate_is_what_transformers_generates(folder, reference):
    model, tokenizer = reference
    prompt = "the red cat is"
    ids = tokenizer(prompt)["input_ids"]
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids):].tolist()
    line = json.loads(run("generate", "--model", folder / "model", "-p", prompt, "--raw", "--json", "--max_new_tokens", 20).stdout)
    assert line["ids"] == theirs
    assert line["prompt_tokens"] == len(ids)
    assert line["finish_reason"] == ("stop" if theirs[-1] == 1 else "length")
    streamed = run("generate", "--model", folder / "model", "-p", prompt, "--raw", "--max_new_tokens", 20)
    assert streamed.stdout == line["text"] + "\n"
    assert re.search(r"new tokens/s", streamed.stderr)


@tiny_run.float32_only
def test_beams_are_those_of_transformers(folder, reference):
    model, tokenizer = reference
    prompts, beams = ["the red cat is", "who"], dict(num_beams=4, num_return_sequences=3, length_penalty=0.5)
    flags = [word for key, value in beams.items() for word in (f"--{key}", value)]
    common = ["generate", "--model", folder / "model", "--raw", "--max_new_tokens", 8, *flags, "--early_stopping", "true"]
    lines = [json.loads(line) for line in run(*common, "-p", prompts[0], "-p", prompts[1], "--json").stdout.splitlines()]
    assert [(line["index"], line["sequence"]) for line in lines] == [(i, j) for i in range(2) for j in range(3)]
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        theirs = model.generate(ids, max_new_tokens=8, do_sample=False, early_stopping=True, return_dict_in_generate=True,
                                output_scores=True, **beams)
        ours = lines[3 * index:3 * index + 3]
        for row, line in zip(theirs.sequences[:, ids.shape[1]:].tolist(), ours, strict=True):
            assert row[:len(line["ids"])] == line["ids"]
        assert [line["score"] for line in ours] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
    plain = run(*common, "-p", prompts[0]).stdout
    assert plain == f"[0] {prompts[0]}\n" + "".join(f"({j}) {lines[j]['text']}\n\n" for j in range(3))
    best = run("generate", "--model", folder / "model", "--raw", "--max_new_tokens", 8, "--num_beams", 4,
               "--length_penalty", 0.5, "--early_stopping", "true", "-p", prompts[0])
    assert best.stdout == lines[0]["text"] + "\n"
    drawn = [json.loads(line) for line in run("generate", "--model", folder / "model", "--raw", "-p", "who", "--json",
                                              "--temperature", 1, "--num_return_sequences", 4).stdout.splitlines()]
    assert [line["sequence"] for line in drawn] == [0, 1, 2, 3] and len({line["text"] for line in drawn}) > 1
    assert "score" not in drawn[0]


def test_chat_template_is_used_unless_raw(folder, reference):
    _, tokenizer = reference
    line = json.loads(run("generate", "--model", folder / "model", "-p", "red cat", "--system", "the dog", "--json").stdout)
    messages = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "red cat"}]
    expected = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
                         add_special_tokens=False)["input_ids"]
    assert line["prompt_tokens"] == len(expected)


def test_answers_do_not_depend_on_the_batch(folder, tmp_path):
    prompts = ["red", "the cat is not", "who", "one two three", "maybe yes"]
    (tmp_path / "p.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    common = ["--model", folder / "model", "--raw", "--json", "--temperature", 1, "--top_k", 10, "--max_new_tokens", 12]
    outputs = [run("generate", *common, "--prompts", tmp_path / name, "--batch_size", size).stdout
               for name, size in [("p.txt", 1), ("p.txt", 3), ("p.jsonl", 8)]]
    assert outputs[0] == outputs[1] == outputs[2]
    lines = [json.loads(line) for line in outputs[0].splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    other = run("generate", *common, "--prompts", tmp_path / "p.txt", "--seed", 7).stdout
    assert other != outputs[0]


def test_stop_strings(folder):
    common = ["generate", "--model", folder / "model", "--raw", "--json", "--max_new_tokens", 10]
    prompts = [flag for word in WORDS for flag in ("-p", word)]
    prompt, text = max(((line["prompt"], line["text"]) for line in map(json.loads, run(*common, *prompts).stdout.splitlines())),
                       key=lambda answer: len(answer[1].split()))
    stop = text.split()[2]
    line = json.loads(run(*common, "-p", prompt, "--stop", "never", "--stop", stop).stdout)
    assert line["text"] == text[:text.index(stop)]
    assert line["finish_reason"] == "stop"


def test_score_is_transformers_log_probability(folder, reference):
    model, tokenizer = reference
    text = "who is the red dog maybe"
    ids = tokenizer(text)["input_ids"]
    expected = logprobs(model, ids)
    ours = json.loads(run("score", "--model", folder / "model", "--text", text, "--json").stdout)
    assert ours["ids"] == ids
    assert ours["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert ours["sum"] == pytest.approx(sum(expected), abs=1e-3)
    assert ours["perplexity"] == pytest.approx(torch.tensor(expected).mean().neg().exp().item(), rel=1e-4)
    by_ids = json.loads(run("score", "--model", folder / "model", "--ids", ",".join(map(str, ids)), "--json").stdout)
    assert by_ids == ours
    assert "perplexity" in run("score", "--model", folder / "model", "--text", text).stdout


def test_score_needs_no_tokenizer_for_ids(tmp_path):
    model = make_model(tmp_path)
    ours = json.loads(run("score", "--model", tmp_path, "--ids", "3,4,5,6", "--json").stdout)
    assert ours["logprobs"] == pytest.approx(logprobs(model, [3, 4, 5, 6]), abs=1e-4)


def test_adapters_and_their_scale(folder, reference):
    model, _ = reference
    ids = [0, 7, 9, 11, 8]
    score = lambda *extra: json.loads(run("score", "--model", folder / "model", "--ids", ",".join(map(str, ids)), "--json",
                                          *extra).stdout)["logprobs"]
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
                                             folder / "lora").eval()
    with_adapter = score("--adapter", folder / "lora")
    assert with_adapter == pytest.approx(logprobs(adapted, ids), abs=1e-4)
    assert score("--adapter", f"mine={folder}/lora:0") == pytest.approx(logprobs(model, ids), abs=1e-4)
    assert max(abs(a - b) for a, b in zip(with_adapter, score())) > 1e-2


def test_chat_is_generate_with_the_conversation(folder, tmp_path):
    flags = ["--model", folder / "model", "--max_new_tokens", 6]
    done = run("chat", *flags, stdin="red cat\nwho is\n/reset\nred cat\n/what\n/exit\n")
    answers = done.stdout.splitlines()
    assert answers[0] == answers[2], "after /reset the conversation starts over"
    assert "Unknown command /what" in answers[3]
    first = {"role": "user", "content": "red cat"}
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": [first]}) + "\n" + json.dumps(
        {"messages": [first, {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "who is"}]}) + "\n")
    expected = [json.loads(line)["text"] for line in
                run("generate", *flags, "--prompts", tmp_path / "p.jsonl", "--json").stdout.splitlines()]
    assert answers[:2] == expected


# --- inspect, doctor -------------------------------------------------------------------------------------------------

def test_inspect(folder, reference, tmp_path):
    model, _ = reference
    total = sum(p.numel() for p in model.parameters())
    report = json.loads(run("inspect", folder / "model", "--json").stdout)
    assert report["kind"] == "model" and report["total_parameters"] == report["parameters"] == total
    assert report["sites"]["linears"]["q_proj"] == {"layers": 2, "in": 32, "out": 32}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert set(report["sites"]["scales"]) == {f"{name} {kind}" for name in names for kind in ["input", "output"]} | {
        "down_proj ffn_branch"}
    adapter = json.loads(run("inspect", folder / "lora", "--json").stdout)
    assert adapter["method"] == "lora" and adapter["lora_rank"] == 4 and adapter["tensors"] == 8
    assert adapter["parameters"] == 2 * (4 * (32 + 32) + 4 * (48 + 32))
    listing = run("inspect", folder / "lora" / "adapter_model.safetensors", "--tensors").stdout
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in listing
    # A config.json alone is enough to say what a method would train.
    (tmp_path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    assert json.loads(run("inspect", tmp_path, "--json").stdout)["total_parameters"] == total
    method = json.loads(run("inspect", "--model", tmp_path, "--method", "lora", "--lora_rank", 4, "--lora_target",
                            "q_proj,down_proj", "--json").stdout)
    assert method["trainable_parameters"] == adapter["parameters"]
    assert method["sites"] == 4 and method["percent"] == pytest.approx(100 * adapter["parameters"] / total)


def test_inspect_counts_the_reference_molora(tmp_path, folder):
    (tmp_path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    report = json.loads(run("inspect", "--model", tmp_path, "--method", "molora", "--num_experts", 10, "--lora_rank", 4,
                            "--lora_target", "reference", "--json").stdout)
    d, kv, f = 32, 16, 48
    # E r (in + out) and a router E in, at q, k, v, o, gate and down of both layers
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (f, d)]
    assert report["trainable_parameters"] == 2 * sum(10 * 4 * (i + o) + 10 * i for i, o in shapes)
    assert report["router_parameters"] == 2 * sum(10 * i for i, _ in shapes)


def test_doctor():
    report = json.loads(run("doctor", "--json").stdout)
    assert report["threads"] >= 1 and report["libtorch"].startswith("2.") and report["device"] in ("cpu", "cuda", "cuda:0")
    assert len(report["product_gflops"]) == 8
    assert all(speed["own"] > 0 and speed["library"] > 0 for speed in report["product_gflops"].values())
    # As on a processor without AVX2.
    done = subprocess.run([str(tiny_run.PROGRAM), "doctor", "--json", "--device", "cpu"], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"})
    report = json.loads(done.stdout)
    assert report["cpu_capability"] == "DEFAULT"
    assert (report["dtype"], report["dtype_reason"]) == ("float32", "this CPU has no fast bfloat16")
    assert (report["products"], report["products_reason"]) == ("library", "this processor has no AVX2 that PyTorch uses")


def test_who_multiplies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = json.loads(run("doctor", "--json").stdout)
    again = json.loads(run("doctor", "--json").stdout)
    assert (again["products"], again["products_reason"]) == (measured["products"], measured["products_reason"]), "remembered"
    for name in ("own", "library"):
        monkeypatch.setenv("MOESAIC_PRODUCTS", name)
        report = json.loads(run("doctor", "--json").stdout)
        assert (report["products"], report["products_reason"]) == (name, "MOESAIC_PRODUCTS")
    monkeypatch.setenv("MOESAIC_PRODUCTS", "mkl")
    failed = moesaic("doctor")
    assert failed.returncode == 2 and "MOESAIC_PRODUCTS 'mkl': expected own or library" in failed.stderr


# --- eval, routes ----------------------------------------------------------------------------------------------------

QUESTIONS = [("the cat is", ["red", "not red", "blue one two"], 1), ("who", ["yes", "no"], 0), ("one two", ["three", "dog dog"], 0),
             ("is the dog", ["maybe", "yes yes yes"], 1)]


@pytest.fixture(scope="module")
def task(folder):
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps({"template": f"t{i % 2}", "inputs": prompt, "answer_choices": choices,
                                        "target": choices[right]}) + "\n" for i, (prompt, choices, right) in enumerate(QUESTIONS)))
    return path


def test_eval_ranks_by_transformers_log_likelihood(folder, reference, task, tmp_path):
    model, tokenizer = reference
    sums = []
    for prompt, choices, _ in QUESTIONS:
        start = len(tokenizer(prompt)["input_ids"])
        sums.append([sum(logprobs(model, tokenizer(f"{prompt} {choice}")["input_ids"])[start - 1:]) for choice in choices])
    acc = sum(s.index(max(s)) == right for s, (_, _, right) in zip(sums, QUESTIONS)) / len(QUESTIONS)
    per_character = [[s / len(choice) for s, choice in zip(row, q[1])] for row, q in zip(sums, QUESTIONS)]
    acc_norm = sum(s.index(max(s)) == q[2] for s, q in zip(per_character, QUESTIONS)) / len(QUESTIONS)

    for batch in ["1", "2", "auto"]:
        out = tmp_path / batch
        done = run("eval", "--model", folder / "model", "--tasks", task, "--batch_size", batch, "--output_path", out,
                   "--log_samples")
        assert "| quiz" in done.stdout and "acc_norm" in done.stdout
        results = json.loads(next(out.glob("*/results_*.json")).read_text())
        assert results["results"]["quiz"]["acc,none"] == acc
        assert results["results"]["quiz"]["acc_norm,none"] == acc_norm
        assert results["config"]["batch_size"] == batch
        assert set(results["variants"]["quiz"]) == {"t0", "t1"}
        rows = [json.loads(line) for line in next(out.glob("*/samples_quiz_*.jsonl")).read_text().splitlines()]
        for row, expected in zip(rows, sums, strict=True):
            assert [pair[0] for pair in row["filtered_resps"]] == pytest.approx(expected, abs=1e-3)


def test_eval_generates(folder, tmp_path):
    answer = json.loads(run("generate", "--model", folder / "model", "-p", "say it\n\nred cat", "--json", "--max_new_tokens", 5).stdout)
    file = {"Definition": ["say it"], "Positive Examples": [], "Instances": [
        {"id": "1", "input": "red cat", "output": [answer["text"].strip()]}, {"id": "2", "input": "red cat", "output": ["never"]}]}
    (tmp_path / "task.json").write_text(json.dumps(file))
    results = json.loads(run("eval", "--model", folder / "model", "--tasks", tmp_path / "task.json", "--apply_chat_template",
                             "--generate", "--max_gen_toks", 5, "--json").stdout)
    assert results["results"]["task"]["exact_match,none"] == 0.5
    assert results["configs"]["task"]["output_type"] == "generate_until"
    assert results["chat_template"] == CHAT_TEMPLATE
    limited = json.loads(run("eval", "--model", folder / "model", "--tasks", tmp_path / "task.json", "--limit", 1,
                             "--apply_chat_template", "--generate", "--max_gen_toks", 5, "--json").stdout)
    assert limited["results"]["task"]["exact_match,none"] == 1.0
    assert limited["n-samples"]["task"] == {"original": 2, "effective": 1}


def test_eval_scores_a_corpus(folder, tmp_path):
    """--metrics: corpus figures as sacrebleu gives them for the logged answers, and nothing else."""
    from sacrebleu.metrics import BLEU, CHRF
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"prompt": prompt, "response": answer}) + "\n" for prompt, answer in
                                                 [("red cat", "the dog is not red"), ("who", "yes no"), ("one two", "three")]))
    done = run("eval", "--model", folder / "model", "--tasks", tmp_path / "task.jsonl", "--metrics", "bleu,chrf,chrf1,codexglue_bleu",
               "--max_gen_toks", 6, "--output_path", tmp_path / "out", "--log_samples")
    results = json.loads(next((tmp_path / "out").glob("*/results_*.json")).read_text())
    scores = results["results"]["task"]
    rows = [json.loads(line) for line in next((tmp_path / "out").glob("*/samples_*.jsonl")).read_text().splitlines()]
    answers, references = [row["filtered_resps"][0] for row in rows], [[row["target"] for row in rows]]
    assert any(answers)
    assert scores["bleu,none"] == pytest.approx(BLEU().corpus_score(answers, references).score, abs=1e-9)
    assert scores["chrf,none"] == pytest.approx(CHRF().corpus_score(answers, references).score, abs=1e-9)
    assert scores["chrf1,none"] == pytest.approx(CHRF(beta=1).corpus_score(answers, references).score, abs=1e-9)
    assert scores["chrf_stderr,none"] >= 0 and scores["codexglue_bleu_stderr,none"] == "N/A"  # as the harness: resampled, or none
    assert 0 <= scores["codexglue_bleu,none"] <= 100
    assert "exact_match,none" not in scores and "chrf1" in done.stdout
    assert set(results["higher_is_better"]["task"]) == {"bleu", "chrf", "chrf1", "codexglue_bleu"}


CODE = {"task_id": "x/0", "prompt": "red = one = two = three = 0\nclass A:\n    pass\n#", "canonical_solution": "",
        "test": "def check(f):\n    pass", "entry_point": "print"}


def test_eval_has_the_harness_filters_of_mgsm(folder, tmp_path):
    (tmp_path / "mgsm_sw.tsv").write_text("red cat?\t18\nblue?\t1,000\n")
    results = json.loads(run("eval", "--model", folder / "model", "--tasks", tmp_path / "mgsm_sw.tsv", "--max_gen_toks", 2,
                             "--json").stdout)
    keys = ["exact_match,flexible-extract", "exact_match,remove_whitespace", "number,none"]
    assert [k for k in sorted(results["results"]["mgsm_sw"]) if "stderr" not in k and k != "alias"] == keys
    assert results["results"]["mgsm_sw"]["exact_match_stderr,flexible-extract"] == 0
    assert results["higher_is_better"]["mgsm_sw"] == {"exact_match": True, "number": True}


def test_eval_runs_programs_only_when_told(folder, tmp_path):
    """The model's words are a comment behind the prompt's #, so that the first program passes whatever they are."""
    failing = {**CODE, "task_id": "x/1", "test": "raise ValueError"}
    (tmp_path / "code.jsonl").write_text(json.dumps(CODE) + "\n" + json.dumps(failing) + "\n")
    command = ["eval", "--model", folder / "model", "--tasks", tmp_path / "code.jsonl", "--max_gen_toks", 4]
    refused = moesaic(*command)
    assert refused.returncode == 2 and "--confirm_run_unsafe_code" in refused.stderr
    run(*command, "--confirm_run_unsafe_code", "--output_path", tmp_path / "out", "--log_samples")
    results = json.loads(next((tmp_path / "out").glob("*/results_*.json")).read_text())
    assert results["results"]["code"]["pass@1,none"] == 0.5
    assert results["configs"]["code"]["unsafe_code"] is True
    assert results["configs"]["code"]["generation_kwargs"]["until"][0] == "\nclass"
    rows = [json.loads(line) for line in next((tmp_path / "out").glob("*/samples_*.jsonl")).read_text().splitlines()]
    assert [row["verdict"] for row in rows] == ["passed", "failed"]
    nowhere = subprocess.run([str(tiny_run.PROGRAM), *map(str, command), "--confirm_run_unsafe_code"], capture_output=True,
                             text=True, timeout=300, env={"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert nowhere.returncode == 2 and "python3" in nowhere.stderr


def test_eval_refuses_metrics_that_do_not_fit(folder, task, tmp_path):
    (tmp_path / "free.jsonl").write_text('{"prompt": "who", "response": "12"}\n')
    for tasks, metrics, message in [(tmp_path / "free.jsonl", "exact_match,blue", "got 'blue', expected one of pass@1, exact_match"),
                                    (tmp_path / "free.jsonl", "pass@1", "has no tests to run"), (task, "f1", "ranks choices")]:
        done = moesaic("eval", "--model", folder / "model", "--tasks", tasks, "--metrics", metrics)
        assert done.returncode == 2 and message in done.stderr


def test_eval_lists_every_damaged_row(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"inputs": "a", "answer_choices": ["b"], "target": "c"}\n'
                                        '{"inputs": "a", "answer_choices": [], "target": "c"}\n')
    done = moesaic("eval", "--model", folder / "model", "--tasks", tmp_path / "bad.jsonl")
    assert done.returncode == 3
    assert "line 1" in done.stderr and "line 2" in done.stderr


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A MoLoRA trained a few steps by the program: (its model, its folder)."""
    path = tmp_path_factory.mktemp("mixture")
    done = tiny_run.moesaic("train", tiny_run.make_run(path, max_steps=3))
    assert done.returncode == 0, done.stderr
    return path / "model", path / "out"


def test_routes(mixture, tmp_path):
    model, adapter = mixture
    for name, text in [("colours", "red green blue"), ("pets", "cat dog is not")]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"inputs": text + " ", "answer_choices": ["one", "two"], "target": "two"}) + "\n")
    done = run("routes", "--model", model, "--adapter", adapter, "--tasks", f"{tmp_path}/colours.jsonl,{tmp_path}/pets.jsonl",
               "--text", "red dog is </script> blue", "-o", tmp_path / "out" / "routes")
    assert "colours" in done.stdout
    routes = json.loads((tmp_path / "out" / "routes.json").read_text())
    (owner, sites), = routes["tasks"]["colours"]["routers"].items()
    assert set(sites) == set(routes["routers"][owner]) and routes["adapters"] == [owner]
    for site in sites.values():
        assert len(site["mean_prob"]) == 3
        assert sum(site["mean_prob"]) == pytest.approx(1, abs=1e-5) and sum(site["top1_share"]) == pytest.approx(1)
        assert site["rows"] == routes["tasks"]["colours"]["tokens"] == 4
    cosine = routes["similarity"]["cosine"]
    assert cosine[0][0] == 1 and cosine[0][1] == cosine[1][0] <= 1
    text = routes["text"]
    assert all(len(rows) == len(text["tokens"]) for rows in text["routers"][owner].values())
    with open(tmp_path / "out" / "routes.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == sum(len(site["mean_prob"]) for task in routes["tasks"].values() for site in task["routers"][owner].values())
    for row in rows:
        site = routes["tasks"][row["task"]]["routers"][row["adapter"]][row["site"]]
        expert = int(row["expert"])
        assert (float(row["mean_prob"]), float(row["top1_share"])) == (site["mean_prob"][expert], site["top1_share"][expert])
        assert (int(row["layer"]), int(row["rows"])) == (site["layer"], site["rows"])
    page = (tmp_path / "out" / "routes.html").read_text()
    assert not re.search(r"(src|href)\s*=|@import|url\(", page), "the page must need nothing from outside"
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(embedded) == routes


def test_routes_of_an_adapter_without_router(folder, task):
    done = moesaic("routes", "--model", folder / "model", "--adapter", folder / "lora", "--tasks", task)
    assert done.returncode == 2 and "no router" in done.stderr


def test_eval_reports_routing(mixture, tmp_path):
    model, adapter = mixture
    (tmp_path / "t.jsonl").write_text(json.dumps({"inputs": "red green", "answer_choices": ["one", "two cat"], "target": "one"}) + "\n")
    results = json.loads(run("eval", "--model", model, "--adapter", adapter, "--tasks", tmp_path / "t.jsonl", "--json").stdout)
    (sites,) = results["routing"]["t"].values()
    site = next(iter(sites.values()))
    assert sum(site["mean_prob"]) == pytest.approx(1, abs=1e-5)
