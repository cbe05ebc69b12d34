"""Code (docs/study/code.md): a small model made from nothing on Ruby and Python, joined to SmolLM2.

usage: tools/study/calm_code.py [--output_dir runs/code] [--data FOLDER] ...

What the augmenting model learns ("D_Code"): CodeXGLUE's Ruby functions with their summaries, those of the validation
file and of three quarters of the test file's repositories, and MBPP's tasks 511 to 974. The connections get a few
percent of it ("D_C"). Asked: summaries of functions from the other repositories, the next line of MBPP's test
solutions, and whole programs for MBPP's and HumanEval's tests, which are run.
"""

import hashlib
import json
import pathlib
import random

import composing

LONGEST = 350  # characters of a text that is trained with the anchor, or of a function that is asked


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(repository):
    """A quarter of all repositories."""
    return hashlib.sha256(repository.encode()).digest()[0] % 4 == 0


def summary_row(function):
    code, summary = (" ".join(function[key]) for key in ("code_tokens", "docstring_tokens"))
    return {"inputs": f"Ruby function: {code}\nSummary:", "targets": f" {summary}"}


def program_row(problem):
    """As lm-evaluation-harness asks."""
    tests = "\n".join(problem["test_list"])
    return {"inputs": f"You are an expert Python programmer, and here is your task: {problem['text']} Your code should "
                      f"pass these tests:\n\n{tests}\n[BEGIN]\n",
            "targets": problem["code"].replace("\r\n", "\n") + "\n[DONE]"}


def lines_of(problem):
    """The task as a comment, and the solution's lines."""
    return [f"# {problem['text'].strip()}", *filter(str.strip, problem["code"].replace("\r\n", "\n").split("\n"))]


def next_line_rows(problems):
    """A line from the middle of each solution, to be written after those before it."""
    for problem in problems:
        lines = lines_of(problem)
        middle = (len(lines) + 1) // 2
        if len(lines) > 2:
            yield {"inputs": "\n".join(lines[:middle]) + "\n", "targets": lines[middle].rstrip()}


def write_data(data, out, seed, share):
    folder = data / "codexglue_code_to_text"
    functions = read_jsonl(folder / "ruby_valid_500.jsonl") + read_jsonl(folder / "ruby_test.jsonl")
    problems = read_jsonl(data / "mbpp" / "mbpp.jsonl")
    known = [function for function in functions if not held_out(function["repo"])]
    solved = [problem for problem in problems if problem["task_id"] > 510]
    rows = [summary_row(function) for function in known] + [program_row(problem) for problem in solved]
    continued = [{"inputs": "", "targets": "\n".join(lines_of(problem))} for problem in solved]
    composing.write_jsonl(out / "knowledge.jsonl", rows + continued)
    short = [row for row in rows + continued if len(row["inputs"] + row["targets"]) <= LONGEST]
    random.Random(seed).shuffle(short)
    composed = short[:round(share * len(rows + continued))]
    composing.write_jsonl(out / "composition.jsonl", composed)
    summaries = [row for row in map(summary_row, filter(lambda function: held_out(function["repo"]), functions))
                 if len(row["inputs"]) <= LONGEST]
    composing.write_jsonl(out / "ruby_summary.jsonl", summaries)
    lines = list(next_line_rows(problem for problem in problems if 10 < problem["task_id"] <= 510))
    composing.write_jsonl(out / "next_line.jsonl", lines)
    return {"knowledge": len(rows + continued), "composition": len(composed), "summaries": len(summaries),
            "lines": len(lines)}


def main():
    parser = composing.arguments(__doc__.splitlines()[0], "code")
    parser.add_argument("--share", type=float, default=0.07, help="of the knowledge, trained with the connections")
    options = parser.parse_args()
    study = composing.Study(options, pathlib.Path("recipes") / "code")
    data = study.out / "data"
    study.step("data", lambda: write_data(options.data, data, options.seed, options.share))
    newline, run = ("--until", "\n"), ("--confirm_run_unsafe_code",)
    scores = study.run([
        composing.Task(data / "ruby_summary.jsonl", ["codexglue_bleu"], limit=40, max_tokens=24, flags=newline),
        composing.Task(data / "next_line.jsonl", ["exact_match", "chrf"], limit=60, max_tokens=24, flags=newline),
        composing.Task(options.data / "mbpp" / "mbpp.jsonl", ["pass@1"], limit=8, max_tokens=96, flags=run),
        composing.Task(options.data / "humaneval" / "HumanEval.jsonl", ["pass@1"], limit=8, max_tokens=96, flags=run),
    ])
    composing.plot_bars(study.out / "plot.svg", "Next line of Python, chrF",
                        {system: row["next_line"]["chrf"] for system, row in scores.items()})


if __name__ == "__main__":
    main()
