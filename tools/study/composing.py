"""What the studies of compositions share: make an augmenting model from nothing, join it to the anchor, train the
connections and what they are compared with, ask everything, write tables and a plot.

A study is a folder of recipes (config.json and augmenting.yaml, compose.yaml, composition.yaml), data files and tasks.
Every step is a call of the program, noted in OUT/commands.txt; OUT/results.json holds what is done, so that a study
that was stopped goes on where it was.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import tables

PROGRAM = pathlib.Path(os.environ.get("MOESAIC_BUILD_DIR", ROOT / "build")) / "moesaic"


@dataclasses.dataclass
class Task:
    """A task file and how it is asked."""
    path: pathlib.Path
    metrics: list
    limit: int
    max_tokens: int
    flags: tuple = ()
    only: tuple = ()  # the systems that are asked; empty = all


def arguments(description, name):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=pathlib.Path, default=ROOT / "runs" / name)
    parser.add_argument("--data", type=pathlib.Path, default=ROOT.parent / "shared" / "data", help="folder of the data")
    parser.add_argument("--anchor", default=".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--augmenting_steps", type=int, help="default: the recipe's")
    parser.add_argument("--composition_steps", type=int,
                        help="of the composition, its ablation and LoRA; default: the recipe's")
    parser.add_argument("--vanilla", type=pathlib.Path, metavar="MODEL",
                        help="also compose with this one, which learnt something else (the paper's vanilla m_A)")
    parser.add_argument("--limit", type=int, default=10**6, help="questions per task at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


class Study:
    def __init__(self, options, recipes):
        self.options, self.out, self.recipes = options, options.output_dir.resolve(), recipes
        self.out.mkdir(parents=True, exist_ok=True)
        self.path = self.out / "results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}

    def call(self, verb, *words):
        """Runs the program; what it printed."""
        command = [str(PROGRAM), verb, *map(str, words), "--threads", str(self.options.threads)]
        with open(self.out / "commands.txt", "a", encoding="utf-8") as log:
            log.write(" ".join(["moesaic", *command[1:]]) + "\n")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
        return done.stdout

    def step(self, name, work):
        """`work()` and its seconds, or what they were in an earlier run."""
        if name not in self.results:
            print(f"== {name}", flush=True)
            wall, cpu = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            result = work()
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.results[name] = {**result, "seconds": round(time.monotonic() - wall, 1),
                                  "cpu_seconds": round(now.ru_utime + now.ru_stime - cpu.ru_utime - cpu.ru_stime, 1)}
            self.path.write_text(json.dumps(self.results, indent=1) + "\n")
        return self.results[name]

    def train(self, name, recipe, steps, **keys):
        """One run of `moesaic train`; its trained numbers and last loss."""
        keys = {"output_dir": self.out / name, "overwrite_output_dir": "true", "seed": self.options.seed, **keys}
        if steps:
            keys["max_steps"] = steps

        def work():
            printed = self.call("train", self.recipes / recipe, *(f"{key}={value}" for key, value in keys.items()))
            return {"trained": int(re.search(r"^trainable +(\d+)", printed, re.MULTILINE).group(1)),
                    "train_loss": float(re.search(r"train loss ([\d.]+)", printed).group(1))}

        return self.step(f"train {name}", work)

    def compose(self, name, **keys):
        keys = {"anchor": self.options.anchor, "output_dir": self.out / f"{name}-start", "seed": self.options.seed,
                **keys}
        self.step(f"compose {name}", lambda: {"printed": self.call(
            "compose", self.recipes / "compose.yaml", *(f"{key}={value}" for key, value in keys.items()))})
        return self.out / f"{name}-start"

    def rank_of(self, numbers):
        """The rank of a LoRA at every linear whose numbers come nearest to `numbers`."""
        one = json.loads(self.call("inspect", "--model", self.options.anchor, "--method", "lora", "--lora_rank", 1,
                                   "--lora_target", "all-linear", "--json"))["trainable_parameters"]
        return max(1, round(numbers / one))

    def ask(self, system, flags, task):
        def work():
            printed = self.call("eval", *flags, "--tasks", task.path, "--metrics", ",".join(task.metrics), "--limit",
                                min(task.limit, self.options.limit), "--max_gen_toks", task.max_tokens, "--batch_size",
                                16, "--json", *task.flags)
            scores = next(iter(json.loads(printed)["results"].values()))
            return {metric: scores[f"{metric},none"] for metric in task.metrics}

        return self.step(f"ask {system}: {task.path.stem}", work)

    def run(self, tasks):
        """The whole study: {system: {task: {metric: value}}}."""
        options = self.options
        self.train("augmenting", "augmenting.yaml", options.augmenting_steps, dataset_dir=self.out / "data")
        trained = self.out / "augmenting"
        systems = {"anchor": ["--model", options.anchor], "augmenting model": ["--model", trained]}
        compositions = [("composition", "composition", f"[{{model: {trained}}}]"),
                        ("random augmenting model", "random",
                         f"[{{model: {trained}, init: random, seed: {options.seed}}}]")]
        if options.vanilla:
            compositions.append(("vanilla augmenting model", "vanilla", f"[{{model: {options.vanilla}}}]"))
        for system, name, augmenting in compositions:
            start = self.compose(name, augmenting=augmenting)
            run = self.train(name, "composition.yaml", options.composition_steps, model_name_or_path=start,
                             dataset_dir=self.out / "data")
            systems[system] = ["--model", self.out / name]
        rank = self.rank_of(run["trained"])
        self.train("lora", "composition.yaml", options.composition_steps, model_name_or_path=options.anchor,
                   finetuning_type="lora", lora_rank=rank, lora_alpha=2 * rank, lora_target="all-linear",
                   dataset_dir=self.out / "data")
        systems[f"LoRA, rank {rank}"] = ["--model", options.anchor, "--adapter", self.out / "lora"]
        scores = {system: {task.path.stem: self.ask(system, flags, task) for task in tasks
                           if not task.only or system in task.only} for system, flags in systems.items()}
        columns = [(task.path.stem, metric) for task in tasks for metric in task.metrics]
        self.write_tables({"head": ["", *(f"{task}: {metric}" for task, metric in columns)],
                           "formats": ["{}", *["{:.3g}"] * len(columns)],
                           "rows": [[system, *(row[task][metric] if task in row else None for task, metric in columns)]
                                    for system, row in scores.items()]})
        return scores

    def write_tables(self, scores):
        """tables.json as in docs/study, and table.md: the scores; what was trained, for how long."""
        training = {"head": ["trained", "numbers", "loss", "minutes", "CPU minutes"],
                    "formats": ["{}", "{:,}", "{:.3f}", "{:.1f}", "{:.1f}"],
                    "rows": [[name[6:], run["trained"], run["train_loss"], round(run["seconds"] / 60, 1),
                              round(run["cpu_seconds"] / 60, 1)]
                             for name, run in self.results.items() if name.startswith("train ")]}
        total = sum(run["seconds"] for run in self.results.values())
        command = " ".join([os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
        made = {"tables": ["scores", "training"], "command": command,
                "date": f"{datetime.date.today():%Y-%m-%d}", "minutes": round(total / 60, 1),
                "machine": f"{self.options.threads} thread(s) of {tables.machine()}"}
        found = {"scores": scores, "training": training}
        tables.write_json(self.out / "tables.json", {"made": [made], "tables": found})
        in_all = f"{total / 60:.1f} minutes in all, {self.options.threads} thread(s), seed {self.options.seed}."
        text = "\n\n".join([*map(tables.study_table, found.values()), in_all])
        (self.out / "table.md").write_text(text + "\n")
        print(text)


def plot_bars(path, title, scores):
    """A bar for each system: {system: value}, as SVG that reads on light and dark pages."""
    top, height, left, width = 34, 24, 190, 420
    largest = max(scores.values()) or 1
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 70}" '
             f'height="{top + height * len(scores) + 8}" font-family="sans-serif" font-size="13" fill="#768390">',
             f'<text x="8" y="20" font-weight="bold">{title}</text>']
    for row, (system, value) in enumerate(scores.items()):
        y, length = top + row * height, width * value / largest
        color = "#2f81f7" if system == "composition" else "#8b949e"
        parts += [f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{system}</text>',
                  f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{height - 6}" fill="{color}"/>',
                  f'<text x="{left + length + 6:.1f}" y="{y + 15}">{value:.1f}</text>']
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
