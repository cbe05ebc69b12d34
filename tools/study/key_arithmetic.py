"""Key-value arithmetic with a real anchor (docs/study/key-arithmetic.md): SmolLM2-135M-Instruct helped by a LoRA in
arithmetic, joined to a small model that was made from nothing and knows what 500 words are worth.

Writes OUT/tables.json and table.md: {augmenting model, anchor, anchor + LoRA, composition, the same with a random
augmenting model} x {KV-SUB, NUM-MATH, KV-MATH}.
"""

import composing


def main():
    parser = composing.arguments(__doc__.splitlines()[0], "keys")
    parser.add_argument("--lora_steps", type=int, help="of the anchor's LoRA; default: the recipe's")
    options = parser.parse_args()
    study = composing.Study(options, composing.ROOT / "recipes" / "keys")
    data = study.out / "data"
    study.call("data", "keys", data, "--seed", options.seed)
    study.train("augmenting", "augmenting.yaml", options.augmenting_steps, dataset_dir=data)
    study.train("anchor_lora", "anchor_lora.yaml", options.lora_steps, dataset_dir=data,
                model_name_or_path=options.anchor)
    anchor, lora, augmenting = options.anchor, study.out / "anchor_lora", study.out / "augmenting"
    for name, model in [("composition", augmenting),
                        ("random", f"[{{model: {augmenting}, init: random, seed: {options.seed}}}]")]:
        start = study.compose(name, anchor=f"{{model: {anchor}, adapter: {lora}}}", augmenting=model)
        study.train(name, "composition.yaml", options.composition_steps, model_name_or_path=start, dataset_dir=data)

    # What comes behind a substitution is another task's: "12 + 34 = 46" answers both KV-SUB and KV-MATH.
    # The anchor without LoRA talks on behind a number.
    substitution, number = ("--until", " ="), ("--until", "\n", "--until", ".", "--until", ",")
    tasks = {"KV-SUB": ("test/kv_sub", substitution), "NUM-MATH": ("test/num_math", number),
             "KV-MATH": ("test/kv_math", number), "KV-SUB, held-in": ("held_in/kv_sub", substitution),
             "KV-MATH, held-in": ("held_in/kv_math", number)}
    systems = {"augmenting model": ["--model", augmenting], "anchor": ["--model", anchor],
               "anchor + LoRA": ["--model", anchor, "--adapter", lora],
               "composition": ["--model", study.out / "composition"],
               "random augmenting model": ["--model", study.out / "random"]}
    scores = {system: {} for system in systems}
    for system, flags in systems.items():
        for name, (path, more) in tasks.items():
            if "held-in" in name and system not in ("composition", "random augmenting model"):
                continue
            task = composing.Task(data / f"{path}.jsonl", ["exact_match"], 200, 16, more)
            scores[system][name] = study.ask(f"{system}, {name}", flags, task)
    study.write_tables({"head": ["", *tasks], "formats": ["{}", *["{:.1f} %"] * len(tasks)],
                        "rows": [[system, *(100 * row[name]["exact_match"] if name in row else None for name in tasks)]
                                 for system, row in scores.items()]})
    composing.plot_bars(study.out / "plot.svg", "KV-MATH with SmolLM2 as the anchor, % right",
                        {system: 100 * row["KV-MATH"]["exact_match"] for system, row in scores.items()})


if __name__ == "__main__":
    main()
