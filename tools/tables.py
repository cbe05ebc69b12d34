"""Measured numbers as JSON, and the tables that are made of them.

bench/results/<processor>/<section>-<threads>.json is what `make bench` measured; all of them are bench/RESULTS.md.
docs/study/<page>.json has the tables of docs/study/<page>.md: each replaces the one behind its mark there,
`<!-- table NAME -->`.

usage: tools/tables.py [--check]   writes the pages again; --check only says which are not what their JSON says
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
STUDIES = ROOT / "docs" / "study"
FLAGS = ["avx2", "avx512f", "avx512_bf16", "amx_tile"]  # the last that a processor has says what kind it is
UNITS = {"s": "{:.2f} s", "tok/s": "{:.1f} tok/s", "MiB": "{:.0f} MiB"}


def lscpu():
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}


def flags(info):
    return [flag for flag in FLAGS if flag in info.get("Flags", "").split()]


def machine():
    """What numbers are measured on, in words."""
    info = lscpu()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (f"{info['Model name']}, {os.cpu_count()} CPUs, L3 {info.get('L3 cache', '?')}, {memory:.0f} GiB, "
            f"{' '.join(flags(info))}, family {info.get('CPU family', '?')} model {info.get('Model', '?')}; {platform.system()} {platform.release()}")


def processor():
    """The kind of this machine's processor as a folder's name: "amd-epyc-avx2"."""
    info = lscpu()
    words = re.sub(r"\([^)]*\)|\bProcessor\b|\bCPU\b|@.*", " ", info["Model name"]).lower()
    return "-".join(re.findall(r"\w+", words) + [flag.removesuffix("_tile") for flag in flags(info)[-1:]])


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def to_json(value, margin=""):
    """JSON with a line for every element that holds no other object or list of lists."""
    flat = json.dumps(value, ensure_ascii=False)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if not inner or (margin and not any(isinstance(each, (dict, list)) for each in inner)) or len(flat) < 100:
        return flat
    keys = [json.dumps(key) + ": " for key in value] if isinstance(value, dict) else [""] * len(value)
    lines = ",\n".join(f"{margin} {key}{to_json(each, margin + ' ')}" for key, each in zip(keys, inner))
    return f"{flat[0]}\n{lines}\n{margin}{flat[-1]}"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(value) + "\n", encoding="utf-8")


# --- the benchmarks

HEAD = """# Speed against peers

Made by `make bench` (`bench/run.py`, which notes each section's command, machine and date in `bench/results/`). Ratio: peer / ours for time and memory, ours / peer for tok/s, so above 1 is ahead. Contestants take turns in one run after a warm-up round; medians; the range is that of single rounds. SmolLM2-135M, float32 unless said; training steps include AdamW.
"""


def bench_cells(row):
    show = UNITS[row["unit"]].format
    spread = "" if row.get("low") is None else f"{row['low']:.2f} to {row['high']:.2f}"
    by_cpu, must = ("" if row.get(key) is None else shape.format(row[key])
                    for key, shape in [("cpu_ratio", "{:.2f}"), ("must", "{:g}")])
    return [row["job"], row["what"], show(row["ours"]), show(row["peer"]), f"**{row['ratio']:.2f}**", spread, by_cpu,
            must]


def bench_page(sections):
    """RESULTS.md. `sections`: the names of bench/run.py in order."""
    text = HEAD
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        text += f"\n## {folder.name}\n"
        results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
        seen = None
        for result in sorted(results, key=lambda r: (sections.index(r["section"]), -r["threads"])):
            threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
            text += f"\n### {result['section']}, {threads}, {result['repeats']} rounds, {result['date']}\n\n"
            text += f"`{result['command']}`\n\n"
            where = "; ".join(filter(None, [result["machine"], result.get("versions")]))
            if where != seen:
                text += f"On {where}.\n\n"
            seen = where
            if "load_before" in result:
                text += f"Load average {result['load_before']} before it.\n\n"
            head = ["job", "what: the peer", "ours", "peer", "ratio", "over the rounds", "by CPU time", "must be"]
            text += table(head, map(bench_cells, result["rows"])) + "\n"
            if result.get("note"):
                text += f"\n{result['note']}\n"
    return text


# --- the studies

def cell(value, shape):
    """`value` by `shape`, a format string; a list fills several places, text stands as it is, None is empty."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return shape.format(*value) if isinstance(value, list) else shape.format(value)


def study_table(data):
    """A table of a study: {"head": names, "formats": one per column, "rows": values}."""
    return table(data["head"], ([cell(*pair) for pair in zip(row, data["formats"])] for row in data["rows"]))


def study_page(text, tables):
    """The page `text` with the tables behind its marks made anew."""
    def replaced(match):
        return f"<!-- table {match[1]} -->\n{study_table(tables[match[1]])}\n"
    return re.sub(r"<!-- table (.+) -->\n(?:\|.*\n)*", replaced, text)


def pages():
    """(path, text) of every page."""
    sys.path.insert(0, str(ROOT / "bench"))
    import run

    yield ROOT / "bench" / "RESULTS.md", bench_page(list(run.SECTIONS))
    for path in sorted(STUDIES.glob("*.json")):
        page = path.with_suffix(".md")
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
        yield page, study_page(page.read_text(encoding="utf-8"), tables)


def main():
    stale = [(path, text) for path, text in pages()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        if "--check" in sys.argv[1:]:
            print(f"{path.relative_to(ROOT)}: not what its JSON says; tools/tables.py writes it again")
        else:
            path.write_text(text, encoding="utf-8")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
