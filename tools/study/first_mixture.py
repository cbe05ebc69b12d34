"""Writes the data of docs/study/first-mixture.md: instruction-induction tasks as chat rows.

usage: first_mixture.py FOLDER_OF_TASKS OUT

Each task file is {"task", "annotations": [instruction...], "train": [{"input", "output"}...], "test": [...]} (the
layout of orhonovich/instruction-induction's data, one file per task; train and test are disjoint there).
OUT gets <task>.train.jsonl, <task>.test.jsonl and dataset_info.json. The instruction of a row is drawn from the
task's annotations by a seeded generator.
"""
import json
import pathlib
import random
import sys

TASKS = [
    "active_to_passive", "antonyms", "diff", "first_word_letter", "larger_animal", "letters_list", "negation",
    "num_to_verbal", "orthography_starts_with", "second_word_letter", "sentiment", "singular_to_plural", "sum",
    "taxonomy_animal", "translation_en-de", "translation_en-es", "translation_en-fr",
]
TEST_ROWS = 25


def rows(task, split, draw):
    for item in task[split]:
        outputs = item["output"] if isinstance(item["output"], list) else [item["output"]]
        prompt = f"{draw.choice(task['annotations'])}\n\n{item['input']}"
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(outputs[0])}]}


def main():
    source, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    registry = {}
    for name in TASKS:
        task = json.loads((source / f"{name}.json").read_text(encoding="utf-8"))
        draw = random.Random(f"42 {name}")
        for split, limit in (("train", None), ("test", TEST_ROWS)):
            lines = [json.dumps(row, ensure_ascii=False) for row in list(rows(task, split, draw))[:limit]]
            (out / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        registry[name] = {"file_name": f"{name}.train.jsonl", "formatting": "sharegpt",
                          "columns": {"messages": "messages"},
                          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                                   "assistant_tag": "assistant"}}
    (out / "dataset_info.json").write_text(json.dumps(registry, indent=1) + "\n")


if __name__ == "__main__":
    main()
