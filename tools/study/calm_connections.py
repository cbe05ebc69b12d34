"""Which connection learns fast (docs/study/connections.md): SmolLM2-135M reads Qwen2.5-Coder-0.5B over a little code.

usage: tools/study/calm_connections.py [--output_dir runs/connections] [--rows NAME ...] ...

Every row is trained on the same 788 texts (Ruby functions with their summaries as CodeXGLUE has them, MBPP's solutions
behind their tasks) and evaluated every 30 steps on 80 of either from other repositories and tasks. A study that was
stopped goes on where it was.
"""

import json
import pathlib
import random
import re

import calm_code
import composing

NEWEST = "{anchor: final, aug: final, reads: newest}"
SPREAD = "{anchor: 14, aug: 11}, {anchor: 21, aug: 17}, {anchor: 29, aug: 23}"
# Of each row what is not as in recipes/connections: keys of `compose`, and of `train`.
ROWS = {
    "LoRA of rank 13": (None, {"finetuning_type": "lora", "lora_rank": 13}),
    "the paper's places, align word": ({"connections": f"[{SPREAD}]", "align": "word", "norm": "pre", "output_scale": 0}, {}),
    "three blocks, and final to final": ({"connections": f"[{SPREAD}, {NEWEST}]", "cross_position": "recency"}, {}),
    "final to final, align token": ({"align": "token"}, {}),
    "final to final, align text": ({}, {}),
    "final to final, random augmenting model": ({"random": True}, {}),
    "LoRA of rank 13 and final to final": ({"adapter": True}, {"train_adapters": "true"}),
    "LoRA of rank 13 and final to final, random": ({"random": True, "adapter": True}, {"train_adapters": "true"}),
}


def write_data(data, out):
    functions = sum((calm_code.read_jsonl(data / "codexglue_code_to_text" / f"ruby_{part}.jsonl")
                     for part in ("valid_500", "test")), [])
    problems = calm_code.read_jsonl(data / "mbpp" / "mbpp.jsonl")

    def shuffled(rows, seed):
        random.Random(seed).shuffle(rows)
        return rows

    def short(texts):
        return [{"inputs": "", "targets": text} for text in texts if len(text) <= calm_code.LONGEST]

    def ruby(held_out):
        rows = [calm_code.summary_row(f) for f in functions if calm_code.held_out(f["repo"]) == held_out]
        return short(row["inputs"] + row["targets"] for row in rows)

    def python(first, last):
        return short("\n".join(calm_code.lines_of(p)) for p in problems if first <= p["task_id"] <= last)

    known = python(511, 974)
    sets = {"train": shuffled(known + shuffled(ruby(False), 0)[:788 - len(known)], 1),
            "python": shuffled(python(11, 510), 3)[:80], "ruby": shuffled(ruby(True), 2)[:80]}
    for name, rows in sets.items():
        composing.write_jsonl(out / f"{name}.jsonl", rows)
    return {name: {"texts": len(rows), "characters": sum(len(row["targets"]) for row in rows)}
            for name, rows in sets.items()}


class Connections(composing.Study):
    def start(self, name, random=False, adapter=False, **keys):
        """The folder of an untrained composition."""
        keys["augmenting"] = f"[{{model: {self.options.augmenting}{', init: random' if random else ''}}}]"
        if adapter:
            lora = self.out / "untrained-lora"
            self.train("an adapter that does nothing", "composition.yaml", 1, model_name_or_path=self.options.anchor,
                       dataset_dir=self.out / "data", finetuning_type="lora", lora_rank=13, learning_rate=1e-12,
                       per_device_train_batch_size=1, eval_steps=0, output_dir=lora)
            keys["anchor"] = f"{{model: {self.options.anchor}, adapter: {lora}}}"
        return self.compose(name, **keys)

    def row(self, label, compose, train):
        name = re.sub(r"\W+", "-", label)
        if compose is None:
            model = self.options.anchor
        else:
            model, train = self.start(name, **compose), {"state_cache_dir": self.out / "states", **train}
        run = self.train(name, "composition.yaml", self.options.composition_steps, model_name_or_path=model,
                         dataset_dir=self.out / "data", **train)
        log = [json.loads(line) for line in (self.out / name / "train_log.jsonl").read_text().splitlines()]
        return run, [line for line in log if "eval_loss" in line]


def main():
    parser = composing.arguments(__doc__.splitlines()[0], "connections")
    parser.add_argument("--augmenting", default=".cache/models/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="; ".join(ROWS))
    options = parser.parse_args()
    study = Connections(options, pathlib.Path("recipes") / "connections")
    study.step("data", lambda: write_data(options.data, study.out / "data"))
    rows = {label: study.row(label, *ROWS[label]) for label in options.rows}
    steps = sorted({line["step"] for _, log in rows.values() for line in log})
    study.write_tables({
        "head": ["", "numbers", *(f"step {step}" for step in steps), "Python", "Ruby"],
        "formats": ["{}", "{:,}", *["{:.3f}"] * (len(steps) + 2)],
        "rows": [[label, run["trained"], *(line["eval_loss"] for line in log), log[-1]["eval_python.jsonl_loss"],
                  log[-1]["eval_ruby.jsonl_loss"]] for label, (run, log) in rows.items()]})


if __name__ == "__main__":
    main()
