"""Runs `moesaic demo` and notes what it showed and took: docs/study/demo.json, and from there the page's tables.

usage: tools/study/demo.py [--output_dir runs/demo]    nothing else should run on the machine
"""

import argparse
import datetime
import json
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import tables

COLUMNS = {"base": "base", "molora": "MoLoRA", "lora": "LoRA"}


def note(results, seconds, cpu_seconds, machine):
    """Writes docs/study/demo.json from a demo's results.json."""
    columns = results["columns"]

    def cells(figures):
        return [[round(100 * figure["value"], 8), round(100 * figure["standard_error"], 8)] for figure in figures]

    rows = [[skill, *cells(columns[name]["skills"][skill] for name in COLUMNS)] for skill in columns["base"]["skills"]]
    for kind, title in [("trained", "all trained skills"), ("never_trained", "all never trained")]:
        rows.append([f"**{title}** ({columns['base'][kind]['questions']} questions)",
                     *cells(columns[name][kind] for name in COLUMNS)])
    ahead = [[title, *cells([results["molora_minus_lora"][kind]])]
             for kind, title in [("trained", "trained skills"), ("never_trained", "never trained")]]
    for row in ahead:
        points, error = row[1]
        row += [[round(points - 1.96 * error, 2), round(points + 1.96 * error, 2)],
                "yes" if abs(points) <= 1.96 * error else "no"]
    trained = [[COLUMNS[name], columns[name]["trainable_parameters"], results["settings"]["steps"],
                *[round(columns[name]["train_seconds"] / 60, 2)]] for name in ("molora", "lora")]
    training = sum(row[3] for row in trained)
    tables.write_json(tables.STUDIES / "demo.json", {
        "made": [{"tables": ["skills", "difference", "trained", "times"], "command": "build/moesaic demo",
                  "date": f"{datetime.date.today():%Y-%m-%d}", "machine": machine, "settings": results["settings"]}],
        "tables": {
            "skills": {"head": ["skill", *COLUMNS.values()], "formats": ["{}", *["{:.0f} ± {:.1f} %"] * 3],
                       "rows": rows},
            "difference": {"head": ["MoLoRA - LoRA, points", "difference ± its error", "95 % interval",
                                    "within the error"],
                           "formats": ["{}", "{:+.1f} ± {:.1f}", "{:+.1f} to {:+.1f}", "{}"], "rows": ahead},
            "trained": {"head": ["", "trained numbers", "steps", "minutes"], "formats": ["{}", "{:,}", "{}", "{:.1f}"],
                        "rows": trained},
            "times": {"head": ["minutes", "wall", "CPU, both cores"], "formats": ["{}", "{:.1f}", "{:.1f}"],
                      "rows": [["the whole demo", round(seconds / 60, 2), round(cpu_seconds / 60, 2)],
                               ["of these training", round(training, 2), None]]}}})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=pathlib.Path, default=ROOT / "runs" / "demo")
    options = parser.parse_args()
    start = time.monotonic()
    subprocess.run([ROOT / "build" / "moesaic", "demo", "--output_dir", options.output_dir], check=True, cwd=ROOT)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    results = json.loads((options.output_dir / "results.json").read_text(encoding="utf-8"))
    note(results, time.monotonic() - start, used.ru_utime + used.ru_stime, tables.machine())
    return tables.main()


if __name__ == "__main__":
    sys.exit(main())
