"""`make bench`: whole jobs, ours against peers, in one run; ratios into results/<processor>/ and so into RESULTS.md.

Every contestant is a process of its own that stays alive, so that repeats alternate: one round runs each contestant of
a group once. A row's ratio is peer / ours of the medians over the rounds (tok/s: ours / peer), so above 1 is ahead; the
range is over the rounds. CPU seconds (of all threads) stand beside wall seconds because a busy machine shifts the latter.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import http.client
import importlib.metadata
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import threading
import time

import prepare

ROOT = prepare.ROOT
sys.path.insert(0, str(ROOT / "tools"))
import tables

PYTHON = sys.executable
BUILD = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build"))


class Contestant:
    """A running peers.py or moesaic_bench_jobs with one job."""

    def __init__(self, name, job):
        self.name, self.runs = name, []
        ours = name.startswith("ours")
        program = [BUILD / "bench" / "moesaic_bench_jobs"] if ours else [PYTHON, ROOT / "bench" / "peers.py"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=None if ours else subprocess.DEVNULL,
                                        env=environment)
        self.base_rss = self.ask(json.dumps(job))["base_rss"]

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: the process ended with exit code {self.process.wait()}")
        return json.loads(answer)

    def run(self, **changes):
        self.runs.append(self.ask(json.dumps(changes)))

    def decode(self, new_tokens):
        """Decoding alone: what the prompt and its first token take is subtracted."""
        short = self.ask(json.dumps({"new_tokens": 1}))
        long = self.ask(json.dumps({"new_tokens": new_tokens + 1}))
        self.runs.append({**{k: long[k] - short[k] for k in ("seconds", "cpu_seconds", "tokens")}, "ids": long["ids"]})

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def median(self, key="seconds"):
        return statistics.median(r[key] for r in self.runs)

    def peak_over_base(self):
        """Bytes above the resident model that the runs needed."""
        return max(r["peak_rss"] for r in self.runs) - self.base_rss


class Served(Contestant):
    """A running `moesaic serve`, asked for all of a job's prompts at once over HTTP."""

    def __init__(self, name, job):
        self.name, self.job, self.runs = name, job, []
        adapters = [flag for key, folder in job["adapters"].items() for flag in ("--adapter", f"{key}={folder}")]
        self.process = subprocess.Popen(
            [BUILD / "moesaic", "serve", "--model", job["model"], "--port", "0", "--threads", str(job["threads"]), "--dtype",
             "float32", "--quantize", "int8" if job.get("quantize") else "none", *adapters, *job.get("flags", [])],
            stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"listening on http://127.0.0.1:(\d+)", line):
                break
        self.port = int(found[1])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def complete(self, prompt, name, new_tokens):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", "/v1/completions", json.dumps({
            "model": name, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}))
        return json.loads(connection.getresponse().read())["usage"]["completion_tokens"]

    def ask(self, line):
        job = {**self.job, **json.loads(line)}
        cpu, wall = self.cpu_seconds(), time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(len(job["prompts"])) as pool:
            tokens = sum(pool.map(self.complete, job["prompts"], job["names"], [job["new_tokens"]] * len(job["prompts"])))
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": self.cpu_seconds() - cpu, "tokens": tokens, "ids": []}

    def close(self):
        self.process.terminate()
        self.process.wait()


def row(job, what, unit, ours, peer, ratio, must, **more):
    """A row of a section's table; `must`: the ratio asked for, or None."""
    numbers = {key: round(value, 4) for key, value in dict(ours=ours, peer=peer, ratio=ratio, **more).items()}
    return {"job": job, "what": what, "unit": unit, **numbers, **({} if must is None else {"must": must})}


def rounds(jobs, repeats, log, run=Contestant.run):
    """Runs a group; {name: Contestant}, closed. One warm-up round is not counted."""
    group = {name: (Served if job["kind"] == "serve" else Contestant)(name, job) for name, job in jobs.items()}
    for index in range(repeats + 1):
        for contestant in group.values():
            run(contestant)
            if index == 0:
                contestant.runs.clear()
        log(f"  round {index}/{repeats}: " + ", ".join(
            f"{n} {c.runs[-1]['seconds']:.2f}" for n, c in group.items() if c.runs))
    for contestant in group.values():
        contestant.close()
    return group


def compare(job, what, ours, peer, must=None, unit="s"):
    """A row from two contestants of one group: time of a run, or tokens per second."""
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(ours.runs, peer.runs)]
    values = [c.median() if unit == "s" else c.median("tokens") / c.median() for c in (ours, peer)]
    return row(job, what, unit, *values, peer.median() / ours.median(), must, low=min(pairs), high=max(pairs),
               cpu_ratio=peer.median("cpu_seconds") / ours.median("cpu_seconds"))


def compare_memory(job, what, ours, peer, must=None):
    values = [c.peak_over_base() for c in (ours, peer)]
    return row(job, what, "MiB", *(value / 2**20 for value in values), values[1] / max(values[0], 1), must)


def training_job(method, batches, threads, **more):
    return {"kind": "training", "method": method, "batches": batches, "threads": threads, "rank": 4, "experts": 10,
            "model": str(prepare.huggingface_folder()), **more}


def uniform_jobs(threads, quick, sequences=8):
    """A training job for each method on one batch of `sequences` of 256 tokens, and the batch's size in words."""
    batches = prepare.uniform_batches()
    batches[0] = {key: rows[:sequences] for key, rows in batches[0].items()}
    if quick:
        batches = [{"ids": [ids[:64] for ids in batches[0]["ids"][:2]], "mask": [[1] * 64] * 2}]
    tokens = "x".join(map(str, (len(batches[0]["ids"]), len(batches[0]["ids"][0]))))
    return (lambda method: training_job(method, batches, threads)), tokens


def lora_rows(threads, repeats, quick, log):
    job, tokens = uniform_jobs(threads, quick)
    log(f"LoRA, {tokens}")
    g = rounds({"ours-lora": job("lora"), "peft-lora": job("lora"), "ours-frozen": job("frozen"),
                "hf-frozen": job("frozen")}, repeats, log)
    yield compare("C1", f"LoRA r=4 all linears, step of {tokens}: PEFT", g["ours-lora"], g["peft-lora"], 1.12)
    yield compare("C2", "LoRA step: transformers' frozen forward + dX (at least 0.95 is at most 1.05x)", g["ours-lora"],
                  g["hf-frozen"], 0.95)
    yield compare("C2", "LoRA step: our own frozen forward + dX", g["ours-lora"], g["ours-frozen"], 0.95)
    yield compare("C2", "frozen forward + dX: transformers", g["ours-frozen"], g["hf-frozen"])
    yield compare_memory("C1", "LoRA, peak above the loaded model: PEFT", g["ours-lora"], g["peft-lora"])


def bfloat16_rows(threads, repeats, quick, log):
    if "avx512_bf16" not in tables.machine():
        log("bfloat16: left out, this processor multiplies it slower than float32")
        return
    job, tokens = uniform_jobs(threads, quick)
    log(f"LoRA in bfloat16, {tokens}")
    half = {**job("lora"), "bfloat16": True}
    g = rounds({"ours-half": half, "peft-half": half, "ours-f32": job("lora")}, repeats, log)
    what = f"LoRA r=4 all linears in bfloat16, step of {tokens}"
    yield compare("C15", f"{what}: PEFT in bfloat16", g["ours-half"], g["peft-half"], 1.12)
    yield compare("C15", f"{what}: our own in float32", g["ours-half"], g["ours-f32"], 1.0)
    for peer, name, must in [("peft-half", "PEFT in bfloat16", None), ("ours-f32", "our own in float32", 1.0)]:
        yield compare_memory("C15", f"LoRA in bfloat16, peak above the loaded model: {name}", g["ours-half"], g[peer], must)


def molora_rows(threads, repeats, quick, log):
    # The plain form keeps [tokens, experts, width] at every linear: 8x256 needs more than 24 GiB.
    job, tokens = uniform_jobs(threads, quick, sequences=2)
    log(f"MoLoRA, {tokens}")
    g = rounds({"ours-molora": job("molora"), "naive-molora": job("molora")}, repeats, log)
    yield compare("C4", f"MoLoRA 10x4 all linears, step of {tokens}: plain einsum", g["ours-molora"], g["naive-molora"],
                  2.2)
    yield compare_memory("C4", f"MoLoRA, {tokens}, peak above the loaded model: plain einsum", g["ours-molora"],
                         g["naive-molora"], 5)
    job, tokens = uniform_jobs(threads, quick)
    log(f"MoLoRA, {tokens}")
    g = rounds({"ours-molora": job("molora"), "ours-frozen": job("frozen")}, repeats, log)
    yield compare("C4", f"MoLoRA 10x4, step of {tokens}: our frozen step (at least 0.80 is at most 1.25x)",
                  g["ours-molora"], g["ours-frozen"], 0.80)


def mov_rows(threads, repeats, quick, log):
    job, tokens = uniform_jobs(threads, quick)
    log(f"MoV and (IA)^3, {tokens}")
    g = rounds({"ours-mov": job("mov"), "peft-ia3": job("ia3")}, repeats, log)
    yield compare("C5", f"MoV-10, step of {tokens}: PEFT (IA)^3, which has one vector", g["ours-mov"], g["peft-ia3"],
                  1.0)
    job, tokens = uniform_jobs(threads, quick, sequences=2)  # the plain form needs too much memory for more
    log(f"MoV, {tokens}")
    g = rounds({"ours-mov": job("mov"), "naive-mov": job("mov")}, repeats, log)
    yield compare("C5", f"MoV-10, step of {tokens}: plain einsum", g["ours-mov"], g["naive-mov"], 1.5)


def instruction_rows(threads, repeats, quick, log):
    batches = prepare.instruction_batches()
    if batches is None:
        log(f"instructions: left out, {prepare.INSTRUCTIONS.name} is not here")
        return
    # One run is one batch; the rounds go through all of them, so the number of rounds is a multiple of theirs.
    batches = batches[:1] if quick else batches
    repeats = max(repeats, 2 * len(batches)) if not quick else repeats
    lengths = [len(ids) for b in batches for ids in b["ids"]]
    log(f"real instructions, {len(batches)} batches of 8, {min(lengths)} to {max(lengths)} tokens")

    def job(method):
        return training_job(method, batches, threads)

    g = rounds({"ours-lora": job("lora"), "peft-lora": job("lora"), "ours-molora": job("molora")}, repeats, log)
    total = {name: sum(r["seconds"] for r in c.runs) for name, c in g.items()}
    result = compare("C1", f"LoRA r=4 on real instructions, 8 of {min(lengths)} to {max(lengths)} tokens: PEFT with "
                     "padding", g["ours-lora"], g["peft-lora"], 1.3)
    for key, name in [("ours", "ours-lora"), ("peer", "peft-lora")]:
        result[key] = round(total[name] / len(g[name].runs), 4)
    result["ratio"] = round(total["peft-lora"] / total["ours-lora"], 4)
    yield result


def generation_rows(threads, repeats, quick, log):
    model = str(prepare.huggingface_folder())
    prompt = prepare.prompt(64 if quick else 256)
    new_tokens = 8 if quick else 64
    kinds = {
        "ours-f32": {"kind": "generate"},
        "hf": {"kind": "generate"},
        "ct2-f32": {"kind": "ct2", "ct2_model": str(prepare.ct2_folder("float32")), "compute_type": "float32"},
        "ours-int8": {"kind": "generate", "quantize": True},
        "ct2-int8": {"kind": "ct2", "ct2_model": str(prepare.ct2_folder("int8")), "compute_type": "int8"},
        "llama.cpp": {"kind": "llama", "gguf": str(prepare.GGUF)},
    }

    def job(kind):
        return {**kind, "model": model, "prompt": prompt, "new_tokens": 1, "threads": threads}

    log(f"first token of a prompt of {len(prompt)}")
    short = rounds({n: job(k) for n, k in kinds.items()}, repeats, log)
    for contestant in short.values():
        for run in contestant.runs:
            run["tokens"] = len(prompt)
    what = f"prefill of {len(prompt)} tokens and one token"
    for ours, peer, must, name in [("ours-f32", "hf", 1.1, "float32: transformers"),
                                   ("ours-f32", "ct2-f32", 1.0, "float32: CTranslate2"),
                                   ("ours-f32", "llama.cpp", 2.4, "float32: llama.cpp Q4_1"),
                                   ("ours-int8", "ct2-int8", 1.0, "int8: CTranslate2 int8"),
                                   ("ours-int8", "ours-f32", None, "our int8 against our float32")]:
        yield compare("C7", f"{what}, {name}", short[ours], short[peer], must, "tok/s")

    log(f"decode {new_tokens} tokens")
    kinds["ours-molora"] = {"kind": "generate", "adapter": "molora", "rank": 4, "experts": 10}
    kinds["ours-lora"] = {"kind": "generate", "adapter": "lora", "rank": 4}
    prompt = prompt[:32]
    rate = rounds({n: job(k) for n, k in kinds.items()}, repeats, log, lambda c: c.decode(new_tokens))
    for id, ours, peer, must, name in [
            ("C8", "ours-f32", "hf", 1.7, "float32: transformers"),
            ("C8", "ours-f32", "ct2-f32", 1.05, "float32: CTranslate2"),
            ("C8", "ours-int8", "ct2-int8", 2.2, "int8: CTranslate2 int8"),
            ("C8", "ours-int8", "llama.cpp", 1.05, "int8: llama.cpp Q4_1"),
            ("C8", "ours-int8", "ours-f32", 1.0, "our int8 against our float32"),
            ("C10", "ours-molora", "ours-f32", 0.75, "MoLoRA 10x4 all linears against our base"),
            ("C10", "ours-lora", "ours-f32", None, "LoRA r=4 all linears against our base")]:
        yield compare(id, f"greedy decode at batch 1, {name}", rate[ours], rate[peer], must, "tok/s")
    words = [rate[n].runs[0]["ids"] for n in ("ours-f32", "hf", "ct2-f32")]
    same = sum(a == b == c for a, b, c in zip(*words))
    log(f"  the float32 contestants agree on {same} of {len(words[0])} tokens")


def scoring_rows(threads, repeats, quick, log):
    questions = prepare.choice_questions(8 if quick else 64)
    log(f"choices of {len(questions)} questions, a T5 of t5-v1_1-small's shape")
    job = {"kind": "score", "model": str(prepare.t5_folder()), "questions": questions, "threads": threads}
    g = rounds({"ours": job, "hf": job, "hf-batched": {**job, "batched": True}}, repeats, log)
    worst = max(abs(a - b) for a, b in zip(g["ours"].runs[0]["scores"], g["hf"].runs[0]["scores"], strict=True))
    log(f"  the scores differ from transformers' by {worst:.2g} at most")
    what = "choices ranked by an encoder-decoder, float32: transformers"
    yield compare("C14", f"{what}, choice by choice", g["ours"], g["hf"], 3)
    yield compare("C14", f"{what}, the choices of a question side by side", g["ours"], g["hf-batched"])


def serve_rows(threads, repeats, quick, log):
    streams, new_tokens = (4, 4) if quick else (16, 32)
    model = str(prepare.huggingface_folder())
    adapters = {f"a{i}": folder for i, folder in enumerate(prepare.lora_folders(streams, 8))}
    text = prepare.prompt(24 * streams)
    job = {"kind": "serve", "model": model, "adapters": adapters, "threads": threads, "new_tokens": 1,
           "prompts": [text[24 * i:24 * (i + 1)] for i in range(streams)], "flags": ["--prefix_texts", "0"]}
    base, mixed = ["base"] * streams, list(adapters)
    log(f"{streams} streams, {new_tokens} tokens each, rank 8")
    rate = rounds({"base": {**job, "names": base}, "mixed": {**job, "names": mixed},
                   "peft": {**job, "kind": "peft_mixed", "names": mixed},
                   "fast": {**job, "names": base, "flags": [*job["flags"], "--no-deterministic"]},
                   "base-int8": {**job, "names": base, "quantize": True}, "mixed-int8": {**job, "names": mixed, "quantize": True}},
                  repeats, log, lambda c: c.decode(new_tokens))
    what = f"decoding, {streams} streams over HTTP, {streams} LoRAs r=8"
    for id, ours, peer, must, name in [
            ("B1", "mixed", "base", 0.85, "float32: our own base"),
            ("B2", "mixed", "peft", 2.2, "float32: PEFT's adapter_names, in process"),
            ("B1", "mixed-int8", "base-int8", 0.85, "int8: our own base"),
            ("B2", "mixed-int8", "peft", 3.5, "int8: PEFT's adapter_names in float32, in process")]:
        yield compare(id, f"{what}, {name}", rate[ours], rate[peer], must, "tok/s")
    yield compare("B10", f"decoding, {streams} streams of the base, same bits in any company: without that promise",
                  rate["base"], rate["fast"], 0.95, "tok/s")

    log("one stream, and the same in process")
    one = {**job, "adapters": {}, "prompts": [text[:32]], "names": ["base"], "quantize": True}
    rate = rounds({"served": one, "ours-process": {"kind": "generate", "model": model, "prompt": text[:32], "new_tokens": 1,
                                                   "threads": threads, "quantize": True}},
                  repeats, log, lambda c: c.decode(2 * new_tokens))
    yield compare("B6", "decoding, one stream over HTTP, int8: the same in process", rate["served"], rate["ours-process"],
                  0.95, "tok/s")

    log("a prompt of 512 tokens again, with another end")
    long = prepare.prompt(600)[:64 if quick else 512]
    kept = {**one, "quantize": False, "flags": []}

    def first(contestant):
        contestant.round = getattr(contestant, "round", 0) + 1
        head = [contestant.round, *long] if contestant.name == "cold" else long
        contestant.run(prompts=[[*head, contestant.round, contestant.round + 1]])

    group = rounds({"kept": kept, "cold": kept}, repeats, log, first)
    yield compare("B8", f"first token of a prompt whose first {len(long)} tokens were read before: not read", group["kept"],
                  group["cold"], 1 / 0.15)


# A process of its own, for a child's peak begins at that of the process that starts it.
LIFE = """import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"""


def life(command, threads):
    """(seconds, peak RSS in bytes) of a process from start to end."""
    done = subprocess.run([PYTHON, "-c", LIFE, *command], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def start_rows(threads, repeats, quick, log):
    log("start to first token")
    model, prompt = str(prepare.huggingface_folder()), json.dumps(prepare.prompt(16))
    ours = [str(BUILD / "moesaic"), "generate", "--threads", str(threads), "--dtype", "float32", "--raw",
            "-p", "The capital of France is", "--max_new_tokens", "1", "--model"]
    script = [PYTHON, str(ROOT / "bench" / "first_token.py")]
    commands = {
        "ours": [*ours, model],
        "ours-gguf": [*ours, str(prepare.GGUF)],
        "hf": [*script, "hf", model, prompt, str(threads)],
        "ct2": [*script, "ct2", str(prepare.ct2_folder("float32")), prompt, str(threads)],
    }
    lives = {name: [] for name in commands}
    for index in range(repeats + 1):  # the first round warms the page cache
        for name, command in commands.items():
            measured = life(command, threads)
            if index:
                lives[name].append(measured)
    seconds = {n: statistics.median(s for s, _ in v) for n, v in lives.items()}
    peak = {n: statistics.median(m for _, m in v) for n, v in lives.items()}
    log("  " + ", ".join(f"{n} {seconds[n]:.2f} s {peak[n] / 2**20:.0f} MiB" for n in commands))
    for peer, must_seconds, must_memory, name in [("hf", 5, 1.2, "transformers"), ("ct2", None, 1.2, "CTranslate2")]:
        pairs = [b / a for (a, _), (b, _) in zip(lives["ours"], lives[peer])]
        yield row("C12", f"start to first token, float32 folder: {name}", "s", seconds["ours"], seconds[peer],
                  seconds[peer] / seconds["ours"], must_seconds, low=min(pairs), high=max(pairs))
        yield row("C12", f"peak RSS of that process: {name}", "MiB", peak["ours"] / 2**20, peak[peer] / 2**20,
                  peak[peer] / peak["ours"], must_memory)
    yield row("C12", "start to first token from the Q4_1 GGUF against 2 s", "s", seconds["ours-gguf"], 2.0,
              2.0 / seconds["ours-gguf"], 1.0)


def calm_rows(threads, repeats, quick, log, released=None):
    """`released`: a checkout of google-deepmind/calm, or None."""
    models, connections = prepare.calm_pair()
    pair = {"models": models, "connections": connections, "heads": 9, "threads": threads}
    batches = prepare.uniform_batches()
    batches[0] = {key: [row[:64] if quick else row for row in rows[:2 if quick else 4]]
                  for key, rows in batches[0].items()}
    size = "x".join(map(str, (len(batches[0]["ids"]), len(batches[0]["ids"][0]))))
    log(f"CALM training, {size}")
    step = {"kind": "calm", "batches": batches, **pair}
    jobs = {"ours": step, "ours-cached": {**step, "cached": True}}
    if released:
        jobs["released"] = {**step, "calm": str(released.resolve())}
    else:
        log("  the released code is left out: name a checkout of google-deepmind/calm with --calm")
    g = rounds(jobs, repeats, log)
    if released:
        for ours, what, must in [("ours", "every state computed", 1.2), ("ours-cached", "frozen states cached", 1.5)]:
            yield compare("C6", f"CALM step of {size}, {what}: the released code", g[ours], g["released"], must)
            yield compare_memory("C6", f"CALM, {what}, peak above the loaded models: the released code", g[ours],
                                 g["released"], 1.0)
    yield compare("C6", f"CALM step of {size}, frozen states cached: every state computed", g["ours-cached"], g["ours"])

    new_tokens = 8 if quick else 64
    log(f"CALM, decode {new_tokens} tokens")
    alone = {"kind": "generate", "threads": threads, "prompt": prepare.prompt(32), "new_tokens": 1}
    g = rounds({"ours-anchor": {**alone, "model": models[0]}, "ours-augmenting": {**alone, "model": models[1]},
                "ours-composed": {**alone, **pair, "kind": "calm_generate"}},
               repeats, log, lambda c: c.decode(new_tokens))
    both = g["ours-anchor"]
    both.runs = [{k: a[k] + b[k] if k != "tokens" else a[k] for k in ("seconds", "cpu_seconds", "tokens")}
                 for a, b in zip(both.runs, g["ours-augmenting"].runs)]
    yield compare("C6", "decode at batch 1 by the composition: anchor and augmenting model one after the other (at least "
                  "0.80 is at most 1.25x)", g["ours-composed"], both, 0.80, "tok/s")


def t5_rows(threads, repeats, quick, log):
    """An encoder-decoder of the shape of T5 1.1 small."""
    model = str(prepare.t5_folder())

    def step(method, sequences, source, target):
        return training_job(method, prepare.source_batch(sequences, source, target), threads, model=model)

    sizes = (2, 32, 8) if quick else (8, 256, 64)
    tokens = "{}x({} read + {} learnt)".format(*sizes)
    log(f"T5, LoRA, {tokens}")
    g = rounds({"ours-lora": step("lora", *sizes), "peft-lora": step("lora", *sizes)}, repeats, log)
    yield compare("T1", f"T5 small, LoRA r=4 all linears, step of {tokens}: PEFT", g["ours-lora"], g["peft-lora"], 1.15)
    yield compare_memory("T1", "T5 small, LoRA, peak above the loaded model: PEFT", g["ours-lora"], g["peft-lora"])
    sizes = sizes if quick else (2, 256, 64)  # as little as the plain form needs memory for
    tokens = "{}x({} read + {} learnt)".format(*sizes)
    log(f"T5, MoLoRA, {tokens}")
    g = rounds({"ours-molora": step("molora", *sizes), "naive-molora": step("molora", *sizes)}, repeats, log)
    yield compare("T2", f"T5 small, MoLoRA 10x4 all linears, step of {tokens}: plain einsum", g["ours-molora"],
                  g["naive-molora"], 2.2)
    yield compare_memory("T2", f"T5 small, MoLoRA, {tokens}, peak above the loaded model: plain einsum",
                         g["ours-molora"], g["naive-molora"], 5)

    new_tokens = 8 if quick else 64
    draw = random.Random(4)
    prompt = [draw.randrange(3, prepare.T5_VOCABULARY) for _ in range(16 if quick else 128)]
    ct2 = {"kind": "ct2_translate", "ct2_model": str(prepare.ct2_folder("float32", prepare.t5_folder)),
           "compute_type": "float32"}
    for num_beams, what in ((1, "greedy decode"), (4, "beam search with 4 beams")):
        log(f"T5, {what}, {new_tokens} tokens")
        job = {"model": model, "prompt": prompt, "new_tokens": 1, "threads": threads, "num_beams": num_beams}
        g = rounds({"ours": {"kind": "generate", **job}, "hf": {"kind": "generate", **job}, "ct2": {**ct2, **job}},
                   repeats, log, lambda c: c.decode(new_tokens))
        for peer, must, name in [("hf", 1.5, "transformers"), ("ct2", 1.0, "CTranslate2")]:
            yield compare("T3", f"T5 small, {what} of one prompt of {len(prompt)}: {name}", g["ours"], g[peer], must,
                          "tok/s")
        words = [g[n].runs[0]["ids"] for n in ("ours", "hf", "ct2")]
        log(f"  they agree on {sum(a == b == c for a, b, c in zip(*words))} of {len(words[0])} tokens")


def sparse_rows(threads, repeats, quick, log):
    """Mixtrals as wide as SmolLM2: few wide experts, and many narrow ones. transformers computes them as it does by
    default, experts in groups."""
    for experts, top_k, width in ((8, 2, 1536), (64, 8, 192)):
        model = str(prepare.sparse_folder(experts, top_k, width))
        shape = f"{experts} experts of {width}, top {top_k}"
        job, tokens = uniform_jobs(threads, quick, sequences=4)
        log(f"{shape}, training, {tokens}")
        g = rounds({f"{who}-{method}": {**job(method), "model": model} for method in ("frozen", "lora")
                    for who in ("ours", "hf" if method == "frozen" else "peft")}, repeats, log)
        yield compare("M8", f"{shape}, frozen forward + dX of {tokens}: transformers", g["ours-frozen"], g["hf-frozen"], 1.1)
        yield compare("M4", f"{shape}, LoRA r=4 of all linears, step of {tokens}: PEFT", g["ours-lora"], g["peft-lora"], 1.5)
        yield compare("M4", f"{shape}, LoRA step: our own frozen forward + dX", g["ours-lora"], g["ours-frozen"])
        yield compare_memory("M9", f"{shape}, LoRA, peak above the loaded model: PEFT", g["ours-lora"], g["peft-lora"], 4)
        new_tokens = 8 if quick else 32
        job = {"kind": "generate", "model": model, "prompt": prepare.prompt(16 if quick else 64), "new_tokens": 1,
               "threads": threads}
        log(f"{shape}, greedy decode, {new_tokens} tokens")
        g = rounds({"ours": job, "hf": job, "ours-int8": {**job, "quantize": True}}, repeats, log,
                   lambda c: c.decode(new_tokens))
        yield compare("M6", f"{shape}, greedy decode: transformers", g["ours"], g["hf"], 1.3, "tok/s")
        yield compare("M6", f"{shape}, greedy decode in int8: our own float32", g["ours-int8"], g["ours"], None, "tok/s")


BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with us


@contextlib.contextmanager
def busy(processes):
    """Other processes that compute meanwhile."""
    others = [subprocess.Popen([PYTHON, "-c", BUSY]) for _ in range(processes)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def load_rows(threads, repeats, quick, log):
    """A step beside busy processes, against PEFT's and against each one's own step on the quiet machine."""
    job, tokens = uniform_jobs(threads, quick, sequences=2)
    groups = {}
    for processes in (0, 1, 2, 4):
        log(f"LoRA, {tokens}, beside {processes} busy processes")

        def run(contestant, processes=processes):
            with busy(processes):
                contestant.run()

        groups[processes] = rounds({"ours-lora": job("lora"), "peft-lora": job("lora")}, repeats, log, run)
    quiet = groups.pop(0)
    for processes, g in groups.items():
        what = f"LoRA r=4 all linears, step of {tokens} beside {processes} busy process{'es' if processes > 1 else ''}"
        yield compare("C13", f"{what}: PEFT", g["ours-lora"], g["peft-lora"], 1.0)
        yield compare("C13", f"{what}: our own on the quiet machine", g["ours-lora"], quiet["ours-lora"])
        yield compare("C13", f"PEFT's step beside {processes}: its own on the quiet machine", g["peft-lora"],
                      quiet["peft-lora"])


SECTIONS = {"lora": lora_rows, "bfloat16": bfloat16_rows, "molora": molora_rows, "mov": mov_rows, "instructions": instruction_rows,
            "generation": generation_rows, "scoring": scoring_rows, "start": start_rows, "t5": t5_rows, "sparse": sparse_rows,
            "serve": serve_rows, "calm": calm_rows, "load": load_rows}


def versions():
    names = ["torch", "transformers", "peft", "ctranslate2", "xllamacpp"]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names) + f"; Moesaic {commit.stdout.strip()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny batches and 2 repeats: shows that everything runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--calm", type=pathlib.Path, metavar="DIR",
                        help="checkout of github.com/google-deepmind/calm, the peer of section calm")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    sections = {**SECTIONS, "calm": functools.partial(calm_rows, released=options.calm)}

    def log(message):
        print(message, flush=True)

    for threads in options.threads:
        for name in options.only:
            log(f"== {name}, {threads} thread{'s' if threads > 1 else ''}")
            load = os.getloadavg()[0]
            rows = list(sections[name](threads, repeats, options.quick, log))
            for each in rows:
                log("  " + " | ".join(tables.bench_cells(each)))
            if not rows or options.quick:  # what is tiny is no result
                continue
            path = tables.RESULTS / tables.processor() / f"{name}-{threads}.json"
            note = json.loads(path.read_text(encoding="utf-8")).get("note") if path.exists() else None
            if note:
                log(f"  {path.relative_to(ROOT)} keeps its note; see whether it still holds: {note}")
            tables.write_json(path, {
                "section": name, "threads": threads, "repeats": repeats,
                "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
                "command": " ".join(["bench/run.py", *sys.argv[1:]]), "machine": tables.machine(),
                "versions": versions(), "load_before": round(load, 1), "note": note, "rows": rows})
            # After every section, so that a later failure loses nothing.
            (ROOT / "bench" / "RESULTS.md").write_text(tables.bench_page(list(SECTIONS)), encoding="utf-8")


if __name__ == "__main__":
    main()
