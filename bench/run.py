"""`make bench`: whole jobs, ours against peers, in one run; ratios into RESULTS.md.

Every contestant is a process of its own that stays alive, so that repeats alternate: one round runs each contestant of
a group once. A row's ratio is peer / ours of the medians over the rounds (tok/s: ours / peer), so above 1 is ahead; the
range is over the rounds. CPU seconds (of all threads) stand beside wall seconds because a busy machine shifts the latter.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import prepare

ROOT = prepare.ROOT
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


@dataclasses.dataclass
class Row:
    id: str
    what: str
    ours: str
    peer: str
    ratio: float
    must: str
    cpu_ratio: float | None = None
    low: float | None = None
    high: float | None = None

    def cells(self):
        spread = "" if self.low is None else f"{self.low:.2f} to {self.high:.2f}"
        cpu = "" if self.cpu_ratio is None else f"{self.cpu_ratio:.2f}"
        return [self.id, self.what, self.ours, self.peer, f"**{self.ratio:.2f}**", spread, cpu, self.must]


def rounds(jobs, repeats, log, run=Contestant.run):
    """Runs a group; {name: Contestant}, closed. One warm-up round is not counted."""
    group = {name: Contestant(name, job) for name, job in jobs.items()}
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


def compare(id, what, ours, peer, must, unit="s"):
    """A row from two contestants of one group: time of a run, or tokens per second."""
    pairs = [b["seconds"] / a["seconds"] for a, b in zip(ours.runs, peer.runs)]
    if unit == "s":
        cells = [f"{c.median():.2f} s" for c in (ours, peer)]
    else:
        cells = [f"{c.median('tokens') / c.median():.1f} tok/s" for c in (ours, peer)]
    return Row(id, what, cells[0], cells[1], peer.median() / ours.median(), must,
               peer.median("cpu_seconds") / ours.median("cpu_seconds"), min(pairs), max(pairs))


def compare_memory(id, what, ours, peer, must):
    cells = [f"{c.peak_over_base() / 2**20:.0f} MiB" for c in (ours, peer)]
    return Row(id, what, *cells, peer.peak_over_base() / max(ours.peak_over_base(), 1), must)


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
    yield compare("C1", f"LoRA r=4 all linears, step of {tokens}: PEFT", g["ours-lora"], g["peft-lora"], "1.12")
    yield compare("C2", "LoRA step: transformers' frozen forward + dX (at least 0.95 is at most 1.05x)", g["ours-lora"],
                  g["hf-frozen"], "0.95")
    yield compare("C2", "LoRA step: our own frozen forward + dX", g["ours-lora"], g["ours-frozen"], "0.95")
    yield compare("C2", "frozen forward + dX: transformers", g["ours-frozen"], g["hf-frozen"], "")
    yield compare_memory("C1", "LoRA, peak above the loaded model: PEFT", g["ours-lora"], g["peft-lora"], "")


def molora_rows(threads, repeats, quick, log):
    # The plain form keeps [tokens, experts, width] at every linear: 8x256 needs more than 24 GiB.
    job, tokens = uniform_jobs(threads, quick, sequences=2)
    log(f"MoLoRA, {tokens}")
    g = rounds({"ours-molora": job("molora"), "naive-molora": job("molora")}, repeats, log)
    yield compare("C4", f"MoLoRA 10x4 all linears, step of {tokens}: plain einsum", g["ours-molora"], g["naive-molora"],
                  "2.2")
    yield compare_memory("C4", f"MoLoRA, {tokens}, peak above the loaded model: plain einsum", g["ours-molora"],
                         g["naive-molora"], "5")
    job, tokens = uniform_jobs(threads, quick)
    log(f"MoLoRA, {tokens}")
    g = rounds({"ours-molora": job("molora"), "ours-frozen": job("frozen")}, repeats, log)
    yield compare("C4", f"MoLoRA 10x4, step of {tokens}: our frozen step (at least 0.80 is at most 1.25x)",
                  g["ours-molora"], g["ours-frozen"], "0.80")


def mov_rows(threads, repeats, quick, log):
    job, tokens = uniform_jobs(threads, quick)
    log(f"MoV and (IA)^3, {tokens}")
    g = rounds({"ours-mov": job("mov"), "peft-ia3": job("ia3")}, repeats, log)
    yield compare("C5", f"MoV-10, step of {tokens}: PEFT (IA)^3, which has one vector", g["ours-mov"], g["peft-ia3"],
                  "1.0")
    job, tokens = uniform_jobs(threads, quick, sequences=2)  # the plain form needs too much memory for more
    log(f"MoV, {tokens}")
    g = rounds({"ours-mov": job("mov"), "naive-mov": job("mov")}, repeats, log)
    yield compare("C5", f"MoV-10, step of {tokens}: plain einsum", g["ours-mov"], g["naive-mov"], "1.5")


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
    row = compare("C1", f"LoRA r=4 on real instructions, 8 of {min(lengths)} to {max(lengths)} tokens: PEFT with padding",
                  g["ours-lora"], g["peft-lora"], "1.3")
    row.ours, row.peer = (f"{total[n] / len(g[n].runs):.2f} s" for n in ("ours-lora", "peft-lora"))
    row.ratio = total["peft-lora"] / total["ours-lora"]
    yield row


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
    for ours, peer, must, name in [("ours-f32", "hf", "1.1", "float32: transformers"),
                                   ("ours-f32", "ct2-f32", "1.0", "float32: CTranslate2"),
                                   ("ours-f32", "llama.cpp", "2.4", "float32: llama.cpp Q4_1"),
                                   ("ours-int8", "ct2-int8", "1.0", "int8: CTranslate2 int8"),
                                   ("ours-int8", "ours-f32", "", "our int8 against our float32")]:
        yield compare("C7", f"{what}, {name}", short[ours], short[peer], must, "tok/s")

    log(f"decode {new_tokens} tokens")
    kinds["ours-molora"] = {"kind": "generate", "adapter": "molora", "rank": 4, "experts": 10}
    kinds["ours-lora"] = {"kind": "generate", "adapter": "lora", "rank": 4}
    prompt = prompt[:32]
    rate = rounds({n: job(k) for n, k in kinds.items()}, repeats, log, lambda c: c.decode(new_tokens))
    for id, ours, peer, must, name in [
            ("C8", "ours-f32", "hf", "1.7", "float32: transformers"),
            ("C8", "ours-f32", "ct2-f32", "1.05", "float32: CTranslate2"),
            ("C8", "ours-int8", "ct2-int8", "2.2", "int8: CTranslate2 int8"),
            ("C8", "ours-int8", "llama.cpp", "1.05", "int8: llama.cpp Q4_1"),
            ("C8", "ours-int8", "ours-f32", "1.0", "our int8 against our float32"),
            ("C10", "ours-molora", "ours-f32", "0.75", "MoLoRA 10x4 all linears against our base"),
            ("C10", "ours-lora", "ours-f32", "", "LoRA r=4 all linears against our base")]:
        yield compare(id, f"greedy decode at batch 1, {name}", rate[ours], rate[peer], must, "tok/s")
    words = [rate[n].runs[0]["ids"] for n in ("ours-f32", "hf", "ct2-f32")]
    same = sum(a == b == c for a, b, c in zip(*words))
    log(f"  the float32 contestants agree on {same} of {len(words[0])} tokens")


def life(command, threads):
    """(seconds, peak RSS in bytes) of a process from start to end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    _, exit_status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(exit_status)
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]}: exit code {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def start_rows(threads, repeats, quick, log):
    log("start to first token")
    model, prompt = str(prepare.huggingface_folder()), json.dumps(prepare.prompt(16))
    ours = [str(BUILD / "moesaic"), "generate", "--threads", str(threads), "--raw", "-p", "The capital of France is",
            "--max_new_tokens", "1", "--model"]
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
    for peer, must_seconds, must_memory, name in [("hf", "5", "1.2", "transformers"), ("ct2", "", "1.2", "CTranslate2")]:
        pairs = [b / a for (a, _), (b, _) in zip(lives["ours"], lives[peer])]
        yield Row("C12", f"start to first token, float32 folder: {name}", f"{seconds['ours']:.2f} s",
                  f"{seconds[peer]:.2f} s", seconds[peer] / seconds["ours"], must_seconds, None, min(pairs), max(pairs))
        yield Row("C12", f"peak RSS of that process: {name}", f"{peak['ours'] / 2**20:.0f} MiB",
                  f"{peak[peer] / 2**20:.0f} MiB", peak[peer] / peak["ours"], must_memory)
    yield Row("C12", "start to first token from the Q4_1 GGUF against 2 s", f"{seconds['ours-gguf']:.2f} s", "2.00 s",
              2.0 / seconds["ours-gguf"], "1.0")


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
        for ours, what, must in [("ours", "every state computed", "1.2"), ("ours-cached", "frozen states cached", "1.5")]:
            yield compare("C6", f"CALM step of {size}, {what}: the released code", g[ours], g["released"], must)
            yield compare_memory("C6", f"CALM, {what}, peak above the loaded models: the released code", g[ours],
                                 g["released"], "1.0")
    yield compare("C6", f"CALM step of {size}, frozen states cached: every state computed", g["ours-cached"], g["ours"],
                  "")

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
                  "0.80 is at most 1.25x)", g["ours-composed"], both, "0.80", "tok/s")


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
        yield compare("C13", f"{what}: PEFT", g["ours-lora"], g["peft-lora"], "1.0")
        yield compare("C13", f"{what}: our own on the quiet machine", g["ours-lora"], quiet["ours-lora"], "")
        yield compare("C13", f"PEFT's step beside {processes}: its own on the quiet machine", g["peft-lora"],
                      quiet["peft-lora"], "")


SECTIONS = {"lora": lora_rows, "molora": molora_rows, "mov": mov_rows, "instructions": instruction_rows,
            "generation": generation_rows, "start": start_rows, "calm": calm_rows, "load": load_rows}


def machine():
    """What the numbers were measured on."""
    info = dict(line.split(":", 1) for line in subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
                if ":" in line)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in info.get("Flags", "").split()]
    return (f"{info['Model name'].strip()}, {os.cpu_count()} CPUs, L3 {info.get('L3 cache', '?').strip()}, "
            f"{memory:.0f} GiB, {' '.join(flags)}; {platform.system()} {platform.release()}")


def versions():
    names = ["torch", "transformers", "peft", "ctranslate2", "xllamacpp"]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names) + f"; Moesaic {commit.stdout.strip()}"


def table(rows):
    head = ["job", "what: the peer", "ours", "peer", "ratio", "over the rounds", "by CPU time", "must be"]
    lines = [head, ["---"] * len(head), *(r.cells() for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny batches and 2 repeats: shows that everything runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--calm", type=pathlib.Path, metavar="DIR",
                        help="checkout of github.com/google-deepmind/calm, the peer of section calm")
    parser.add_argument("--output", type=pathlib.Path, help="default: RESULTS.md beside this file; --quick writes none")
    options = parser.parse_args()
    repeats = 2 if options.quick else options.repeats
    sections = {**SECTIONS, "calm": functools.partial(calm_rows, released=options.calm)}
    output = options.output or (None if options.quick else ROOT / "bench" / "RESULTS.md")

    def log(message):
        print(message, flush=True)

    started = datetime.datetime.now(datetime.timezone.utc)
    load = [os.getloadavg()[0]]
    command = "bench/run.py " + " ".join(sys.argv[1:])
    rows = {threads: [] for threads in options.threads}

    def report():
        parts = "\n".join(f"## {threads} thread{'s' if threads > 1 else ''}\n\n{table(found)}\n"
                          for threads, found in rows.items() if found)
        return f"""# Speed against peers

Made by `{command.strip()}` (`make bench`) on {started:%Y-%m-%d %H:%M} UTC. Ratio: peer / ours for time and memory, ours / peer
for tok/s, so above 1 is ahead. {repeats} repeats after a warm-up, contestants in turn, medians; "over the rounds" is the range
of the ratio in single rounds. Model: SmolLM2-135M, float32 unless said; training steps include AdamW.

- Machine: {machine()}
- Load average: {load[0]:.1f} before; {", ".join(f"{x:.1f}" for x in load[1:])} after each section (a run's own threads included)
- Versions: {versions()}

{parts}"""

    for threads in options.threads:
        for name in options.only:
            log(f"== {name}, {threads} thread{'s' if threads > 1 else ''}")
            rows[threads].extend(sections[name](threads, repeats, options.quick, log))
            load.append(os.getloadavg()[0])
            if output:
                output.write_text(report())  # after every section, so that a later failure loses nothing
    log("\n" + report())


if __name__ == "__main__":
    main()
