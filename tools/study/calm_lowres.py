"""Low-resource translation (docs/study/low-resource.md): a small model from nothing on Setswana, joined to SmolLM2.

usage: tools/study/calm_lowres.py [--output_dir runs/lowres] [--data FOLDER] ...

What the augmenting model learns ("D_NTL"): GATITOS' lexicon, MAFAND's training pairs and NTREX's last 997 lines, which
its data sheet leaves for tuning. The connections get a few of MAFAND's short pairs ("D_C"). Asked: MAFAND's test
sentences into English, and problems of MGSM in Swahili, the nearest language it has.
"""

import json
import pathlib
import random

import composing

SHORT = 120  # characters of a Setswana sentence that is trained with the anchor, or asked


def row(setswana, english):
    return {"inputs": f"Setswana: {setswana.strip()}\nEnglish:", "targets": f" {english.strip()}"}


def pairs_of(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)["translation"]
        yield pair["tsn"], pair["en"]


def write_data(data, out, seed, composed_pairs):
    folder = data / "lowres_mt"
    lexicon = [line.split("\t") for line in (folder / "gatitos" / "en_tn.tsv").read_text(encoding="utf-8").splitlines()]
    news = list(pairs_of(folder / "mafand" / "en-tsn" / "train.jsonl"))
    ntrex = [(folder / "ntrex128" / f"newstest2019-{name}.txt").read_text(encoding="utf-8").splitlines()[1000:]
             for name in ("ref.tsn", "src.eng")]
    sentences = news + list(zip(*ntrex))
    composing.write_jsonl(out / "lexicon.jsonl", [row(setswana, english) for english, setswana, *_ in lexicon])
    composing.write_jsonl(out / "sentences.jsonl", [row(*pair) for pair in sentences])
    short = [pair for pair in news if len(pair[0]) <= SHORT]
    random.Random(seed).shuffle(short)
    composing.write_jsonl(out / "composition.jsonl", [row(*pair) for pair in short[:composed_pairs]])
    test = [pair for pair in pairs_of(folder / "mafand" / "en-tsn" / "test.jsonl") if len(pair[0]) <= SHORT]
    composing.write_jsonl(out / "tsn_en.jsonl", [row(*pair) for pair in test])
    return {"lexicon": len(lexicon), "sentences": len(sentences), "composition": min(len(short), composed_pairs), "test": len(test)}


def main():
    parser = composing.arguments(__doc__.splitlines()[0], "lowres")
    parser.add_argument("--composed_pairs", type=int, default=250, help="pairs that the connections are trained with")
    options = parser.parse_args()
    study = composing.Study(options, pathlib.Path("recipes") / "lowres")
    data = study.out / "data"
    study.step("data", lambda: write_data(options.data, data, options.seed, options.composed_pairs))
    newline = ("--until", "\n")
    scores = study.run([
        composing.Task(data / "tsn_en.jsonl", ["chrf", "chrf1", "bleu"], limit=50, max_tokens=48, flags=newline),
        composing.Task(options.data / "mgsm" / "mgsm_sw.tsv", ["number"], limit=10, max_tokens=128,
                       only=("anchor", "composition")),
    ])
    composing.plot_bars(study.out / "plot.svg", "Setswana to English, chrF",
                        {system: row["tsn_en"]["chrf"] for system, row in scores.items()})


if __name__ == "__main__":
    main()
