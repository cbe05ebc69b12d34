"""Pages show the numbers of their JSON: the made tables, and every figure of README's table "Measured"."""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import tables

EPYC, EPYC_512 = "amd-epyc-avx2", "amd-epyc-avx512_bf16"


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def bench(section, what, processor=EPYC):
    """A row of bench/results."""
    (found,) = [row for row in load(tables.RESULTS / processor / f"{section}.json")["rows"] if row["what"] == what]
    return found


def faster(section, what, processor=EPYC):
    """"1.36", and its range over the rounds."""
    row = bench(section, what, processor)
    return [f"{row[key]:.2f}" for key in ("ratio", "low", "high")]


def times(section, what):
    """Our time as a multiple of the peer's, and its range."""
    row = bench(section, what)
    return [f"{value:.2f}" for value in (row["ours"] / row["peer"], 1 / row["high"], 1 / row["low"])]


def study(page, table, row, column):
    found = load(tables.STUDIES / f"{page}.json")["tables"][table]
    (values,) = [values for values in found["rows"] if values[0] == row]
    return values[found["head"].index(column)]


def first_mixture():
    rows = load(tables.STUDIES / "first-mixture.json")["tables"]["tasks"]["rows"][:-1]
    mean = [str(study("first-mixture", "tasks", "**mean**", column))
            for column in ("exact match, base", "with MoLoRA")]
    better = sum(row[2] > row[1] for row in rows)
    return [*re.findall(r"\d+", " ".join(mean)), str(better)]


def key_arithmetic():
    table = load(tables.STUDIES / "key-arithmetic.json")["tables"]["seeds"]
    seeds = [[row[table["head"].index(model)][2] for row in table["rows"]]
             for model in ("augmenting model", "anchor", "composition")]
    return [f"{max(seeds[0]):g}", f"{max(seeds[1]):g}", f"{min(seeds[2]):g}", f"{max(seeds[2]):g}"]


def smollm2_keys():
    cells = [("SmolLM2 alone", "KV-MATH"), ("SmolLM2 + LoRA", "KV-MATH"), ("composition", "KV-MATH"),
             ("SmolLM2 + LoRA", "NUM-MATH"), ("composition", "KV-SUB")]
    return [f"{study('key-arithmetic', 'SmolLM2', *cell):g}" for cell in cells]


def start():
    first, peak = "start to first token, float32 folder: ", "peak RSS of that process: "
    peers = ["CTranslate2", "transformers"]
    starts = [figure for peer in peers
              for figure in (f"{bench('start-1', first + peer)['peer']:.2f}", *faster("start-1", first + peer))]
    peaks = [f"{bench('start-1', peak + peer)['peer']:.0f}" for peer in peers]
    ours = bench("start-1", first + peers[0])["ours"], bench("start-1", peak + peers[0])["ours"]
    return [f"{ours[0]:.2f}", *starts, f"{ours[1]:.0f}", *peaks]


def sparse(experts, width, top_k):
    """The frozen step, LoRA's step and its memory, and decoding."""
    shape = f"{experts} experts of {width}, top {top_k}, "
    return [*faster("sparse-1", shape + "frozen forward + dX of 4x256: transformers"),
            *faster("sparse-1", shape + "LoRA r=4 of all linears, step of 4x256: PEFT"),
            f"{bench('sparse-1', shape + 'LoRA, peak above the loaded model: PEFT')['ratio']:.1f}",
            *faster("sparse-1", shape + "greedy decode: transformers")]


def demo_skills(kind, difference):
    """Questions; base, MoLoRA and LoRA with their errors; the difference and its interval."""
    found = load(tables.STUDIES / "demo.json")["tables"]
    (row,) = [row for row in found["skills"]["rows"] if row[0].startswith(f"**{kind}**")]
    figures = [text for value, error in row[1:] for text in (f"{value:.0f}", f"{error:.1f}")]
    (points, _), interval = (study("demo", "difference", difference, column)
                             for column in ("difference ± its error", "95 % interval"))
    return [re.search(r"\((\d+) questions", row[0])[1], *figures,
            *(f"{value:+.1f}" for value in (points, *interval))]


def demo_times():
    cells = [("the whole demo", "wall"), ("of these training", "wall"), ("the whole demo", "CPU, both cores")]
    return [f"{study('demo', 'times', *cell):.1f}" for cell in cells]


def lora_512():
    half = "LoRA r=4 all linears in bfloat16, step of 8x256: "
    memory = bench("bfloat16-2", "LoRA in bfloat16, peak above the loaded model: our own in float32", EPYC_512)
    return [*faster("lora-2", "LoRA r=4 all linears, step of 8x256: PEFT", EPYC_512),
            *faster("bfloat16-2", half + "PEFT in bfloat16", EPYC_512),
            *faster("bfloat16-2", half + "our own in float32", EPYC_512), f"{memory['ratio']:.2f}"]


def molora_512():
    memory = bench("molora-2", "MoLoRA, 2x256, peak above the loaded model: plain einsum", EPYC_512)
    return [*faster("molora-2", "MoLoRA 10x4 all linears, step of 2x256: plain einsum", EPYC_512), f"{memory['ratio']:.1f}"]


DECODE, PREFILL = "greedy decode at batch 1, ", "prefill of 256 tokens and one token, "
# First cell of a row of README's table -> the figures of its second cell, in order.
MEASURED = {
    "`moesaic demo` on 2 cores of an Intel Xeon with AMX": demo_times,
    "its 9 trained skills, answered exactly": lambda: demo_skills("all trained skills", "trained skills"),
    "2 related skills that were never trained": lambda: demo_skills("all never trained", "never trained"),
    "LoRA training step, 8x256 tokens, 2 threads, against PEFT":
        lambda: faster("lora-2", "LoRA r=4 all linears, step of 8x256: PEFT"),
    "the same on real instructions of 48 to 421 tokens, which PEFT pads":
        lambda: faster("instructions-2", "LoRA r=4 on real instructions, 8 of 48 to 421 tokens: PEFT with padding"),
    "MoLoRA training step, 2x256 tokens, against the plain einsum form: 1 thread, 2 threads":
        lambda: [figure for threads in (1, 2)
                 for figure in faster(f"molora-{threads}", "MoLoRA 10x4 all linears, step of 2x256: plain einsum")]
        + [f"{bench(f'molora-{threads}', 'MoLoRA, 2x256, peak above the loaded model: plain einsum')['ratio']:.1f}"
           for threads in (1, 2)],
    "training step of 8x256 against our own frozen forward and backward, 2 threads":
        lambda: times("molora-2", "MoLoRA 10x4, step of 8x256: our frozen step (at least 0.80 is at most 1.25x)")
        + times("lora-2", "LoRA step: our own frozen forward + dX"),
    "training step of a composition, 4x256, 1 thread, against the released CALM code":
        lambda: faster("calm-1", "CALM step of 4x256, every state computed: the released code")
        + faster("calm-1", "CALM step of 4x256, frozen states cached: the released code")
        + [f"{ratio:.1f}" for ratio in [bench("calm-1", "CALM, every state computed, peak above the loaded models: the "
                                              "released code")["ratio"]]],
    "decoding by a composition, 1 thread, against its anchor and its augmenting model one after the other":
        lambda: faster("calm-1", "decode at batch 1 by the composition: anchor and augmenting model one after the "
                       "other (at least 0.80 is at most 1.25x)"),
    "greedy decoding at batch 1, 1 thread":
        lambda: [figure for name in ("float32: transformers", "float32: CTranslate2", "int8: CTranslate2 int8",
                                     "int8: llama.cpp Q4_1", "MoLoRA 10x4 all linears against our base")
                 for figure in faster("generation-1", DECODE + name)],
    "prefill of 256 tokens, 1 thread":
        lambda: [figure for name in ("float32: transformers", "float32: CTranslate2", "int8: CTranslate2 int8")
                 for figure in faster("generation-1", PREFILL + name)],
    "an encoder-decoder of T5 1.1 small's shape, training step, 1 thread: LoRA against PEFT, MoLoRA against the plain "
    "einsum form": lambda: faster("t5-1", "T5 small, LoRA r=4 all linears, step of 8x(256 read + 64 learnt): PEFT")
        + faster("t5-1", "T5 small, MoLoRA 10x4 all linears, step of 2x(256 read + 64 learnt): plain einsum"),
    "the same model answering, 1 thread, against transformers and CTranslate2":
        lambda: [figure for what in ("greedy decode", "beam search with 4 beams")
                 for peer in ("transformers", "CTranslate2")
                 for figure in faster("t5-1", f"T5 small, {what} of one prompt of 128: {peer}")],
    "the same model ranking the choices of 64 questions, 1 thread, against transformers": lambda: [
        figure for what in ("choice by choice", "the choices of a question side by side")
        for figure in faster("scoring-1", f"choices ranked by an encoder-decoder, float32: transformers, {what}")],
    "a sparse model as wide as SmolLM2, 4x256 tokens, 1 thread, two of 8 wide experts a token": lambda: sparse(8, 1536, 2),
    "the same with eight of 64 narrow experts": lambda: sparse(64, 192, 8),
    "16 streams over HTTP, each with a LoRA of its own (rank 8), 1 thread, decoding": lambda: [
        figure for what in ("16 LoRAs r=8, float32: our own base", "16 LoRAs r=8, float32: PEFT's adapter_names, in process",
                            "16 LoRAs r=8, int8: our own base",
                            "16 LoRAs r=8, int8: PEFT's adapter_names in float32, in process")
        for figure in faster("serve-1", f"decoding, 16 streams over HTTP, {what}")]
        + faster("serve-1", "decoding, 16 streams of the base, same bits in any company: without that promise"),
    "first token of a prompt of which 512 tokens were read before, 1 thread":
        lambda: faster("serve-1", "first token of a prompt whose first 512 tokens were read before: not read"),
    "start to first token, SmolLM2, page cache warm": start,
    "LoRA training step, 8x256 tokens, 2 threads, with AVX512, against PEFT": lora_512,
    "MoLoRA training step, 2x256 tokens, 2 threads, with AVX512, against the plain einsum form": molora_512,
    "prefill of 256 tokens, 1 thread, with AVX512":
        lambda: [figure for name in ("float32: transformers", "float32: CTranslate2", "int8: CTranslate2 int8")
                 for figure in faster("generation-1", PREFILL + name, EPYC_512)],
    "greedy decoding at batch 1, 1 thread, with AVX512":
        lambda: [figure for name in ("float32: transformers", "float32: CTranslate2", "int8: CTranslate2 int8",
                                     "int8: llama.cpp Q4_1")
                 for figure in faster("generation-1", DECODE + name, EPYC_512)],
    "16 streams over HTTP, each with a LoRA of its own (rank 8), 1 thread, decoding, with AVX512": lambda: [
        figure for what in ("float32: our own base", "float32: PEFT's adapter_names, in process", "int8: our own base")
        for figure in faster("serve-1", f"decoding, 16 streams over HTTP, 16 LoRAs r=8, {what}", EPYC_512)],
    "17 small real tasks in one MoLoRA, 400 steps, held-out exact match": first_mixture,
    "`moesaic demo calm`, ten seeds: one model knows keys, one calculates, joined they calculate with keys never "
    "trained together": key_arithmetic,
    "the same with SmolLM2-135M and its own tokenizer as the anchor, helped by a LoRA in arithmetic, seed 0":
        smollm2_keys,
}


def measured_table():
    """{first cell: second cell} of README's table."""
    text = re.search(r"^## Measured$(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: second for first, second in rows[2:]}


def main():
    problems = [f"{path.relative_to(ROOT)}: not what its JSON says; tools/tables.py writes it again"
                for path, text in tables.pages() if path.read_text(encoding="utf-8") != text]
    shown = measured_table()
    for row in shown.keys() ^ MEASURED.keys():
        problems.append(f"README.md, Measured: '{row}' stands in one of README and {pathlib.Path(__file__).name} only")
    for row in shown.keys() & MEASURED.keys():
        words = re.sub(r"`[^`]*`|\([^()]*experts[^()]*\)|bfloat16|float32|int8|Q4_1|CTranslate2|95 %", "", shown[row])
        figures, source = re.findall(r"[-+]?\d+(?:\.\d+)?", words), MEASURED[row]()
        if figures != source:
            problems.append(f"README.md, Measured, '{row}': has {' '.join(figures)}, measured {' '.join(source)}")
    print("\n".join(problems) or "the pages show what was measured")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
