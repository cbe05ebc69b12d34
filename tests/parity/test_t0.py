"""`moesaic eval --suite` against a plain scorer: Jinja2 renders, transformers scores choice by choice."""

import json
import os
import statistics
import subprocess

import jinja2
import pytest
import tokenizers
import torch
import transformers
import yaml

import common

DATA = common.pathlib.Path(os.environ.get("MOESAIC_DATA_DIR", common.ROOT.parent / "shared" / "data"))


def make_model(folder, texts):
    """A tiny T5 whose tokenizer is learnt from the texts; large weights, so that choices are told apart."""
    trained = tokenizers.Tokenizer(tokenizers.models.Unigram())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trained.train_from_iterator(texts, tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"))
    pieces = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["vocab"]]
    transformers.T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=len(pieces) + 3, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0 if name in ("shared.weight", "lm_head.weight") else
                                  0.7 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)


class Scorer:
    """Rank classification as T0 does it, one choice at a time."""

    def __init__(self, folder):
        torch.set_num_threads(1)
        self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def score(self, prompt, choices):
        source = self.tokenizer(prompt, return_tensors="pt").input_ids
        scores = []
        for choice in choices:
            labels = self.tokenizer(choice, return_tensors="pt").input_ids  # EOS included
            logits = self.model(input_ids=source, labels=labels).logits[0]
            scores.append(logits.log_softmax(-1).gather(1, labels.T).sum().item())
        return scores

    def right(self, prompt, choices, target):
        scores = self.score(prompt, choices)
        return choices[scores.index(max(scores))].strip() == target.strip(), scores


def evaluate(folder, *arguments):
    program = common.BUILD / "moesaic"
    done = subprocess.run([program, "eval", "--model", folder / "model", "--threads", "1", "--output_path",
                           folder / "out", "--log_samples", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = max((folder / "out").rglob("results_*.json"))
    samples = {}
    for path in out.parent.glob(out.name.replace("results_", "samples_*_") + "l"):
        samples[path.name.split("_2")[0].removeprefix("samples_")] = [
            json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return json.loads(out.read_text(encoding="utf-8")), samples, done.stdout, out


TEMPLATES = {
    "plain": ("{{a}} or {{b}}: {{q}}? ||| {{ answer_choices[label] }}", "{{a}} ||| {{b}}", True),
    "fixed": ("Is it {{b}}, {{q}}? ||| {{ answer_choices[label] }}", "No ||| Yes", True),
    "repeated": ("{{q}} ||| {{ [a, b][label] }}", "{{b}} ||| {{a}} ||| {{b}} ||| {{a}}", True),
    "some rows": ("{% if kind == 'x' %}{{q}} {{a}} ||| {{ answer_choices[label] }}{% endif %}", "{{b}} ||| {{a}}", True),
    "another task": ("{{q}} ||| {{ answer_choices[label] }}", "{{a}} ||| {{b}}", False),
    "no choices": ("{{q}} ||| {{a}}", None, True),
}
SUITE = """group: small
output_type: multiple_choice
dataset_path: json
validation_split: validation
prompt_filter: {original_task: true}
score_eos: true
metric_list: [{metric: acc}]
use_prompt: "templates:*"
task:
  - group: both
    task:
      - {task: first, dataset_kwargs: {data_files: {validation: first.jsonl}}}
      - {task: second, dataset_kwargs: {data_files: {validation: second.jsonl}}}
  - task: third
    use_prompt: "templates:fixed"
    process_docs: {fields: {label: "{'no': 0, 'yes': 1}[label]"}}
    dataset_kwargs: {data_files: {validation: third.jsonl}}
"""
WORDS = ["red", "green", "blue", "one", "two", "three", "cats", "dogs"]


def plain_rows(count, first):
    return [{"q": f"{WORDS[i % 8]} of {WORDS[(3 * i + 1) % 8]}", "a": WORDS[(i + 2) % 8], "b": WORDS[(5 * i + 3) % 8] + "s",
             "kind": "xy"[i % 2], "label": i % 2} for i in range(first, first + count)]


def rendered(rows, names):
    """(template, prompt, choices, target) of every row that a template fits, as promptsource renders."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    for row in rows:
        for name in names:
            jinja, answers, _ = TEMPLATES[name]
            choices = [part.strip() for part in environment.from_string(answers).render(**row).split("|||")]
            parts = [part.strip() for part in
                     environment.from_string(jinja).render(**row, answer_choices=choices).split("|||")]
            if len(parts) == 2 and all(parts):
                yield name, parts[0], choices, parts[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t0")
    rows = {"first": plain_rows(9, 0), "second": plain_rows(7, 20), "third": plain_rows(8, 40)}
    make_model(folder / "model", [json.dumps(row) for part in rows.values() for row in part] * 4)
    (folder / "templates").mkdir()
    lines = ["dataset: small", "templates:"]
    for i, (name, (jinja, answers, original)) in enumerate(TEMPLATES.items()):
        lines += [f"  id{i}: !Template", f"    answer_choices: {json.dumps(answers)}", f"    id: id{i}",
                  f"    jinja: {json.dumps(jinja)}", "    metadata: !TemplateMetadata", "      choices_in_prompt: false",
                  "      languages: [en]", "      metrics: [Accuracy]", f"      original_task: {json.dumps(original)}",
                  f"    name: {name}", "    reference: ''"]
    (folder / "templates" / "templates.yaml").write_text("\n".join(lines) + "\n")
    for name, part in rows.items():
        if name == "third":
            part = [{**row, "label": ["no", "yes"][row["label"]]} for row in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "suite.yaml").write_text(SUITE)
    return folder, rows


def test_a_suite_scores_as_the_plain_scorer_does(small):
    folder, rows = small
    results, samples, printed, out = evaluate(folder, "--suite", folder / "suite.yaml", "--data_dir", folder)
    scorer = Scorer(folder / "model")
    asked = ["plain", "fixed", "repeated", "some rows"]
    scores = {}
    for task, names in [("first", asked), ("second", asked), ("third", ["fixed"])]:
        expected = list(rendered(rows[task], names))
        assert len(samples[task]) == len(expected)
        for row, (name, prompt, choices, target) in zip(samples[task], expected):
            right, sums = scorer.right(prompt, choices, target)
            assert row["arguments"]["gen_args_0"]["arg_0"] == prompt
            ours = [pair[0] for pair in row["filtered_resps"]]
            assert ours == pytest.approx(sums, abs=2e-4)
            assert ours.index(max(ours)) == sums.index(max(sums))
            assert row["acc"] == right
            scores.setdefault((task, name), []).append(right)
    means = {key: sum(values) / len(values) for key, values in scores.items()}
    suite = results["suite"]
    assert {(s["task"], s["template"]): s["value"] for c in suite["columns"] for s in c["scores"]} == pytest.approx(means)
    assert {(s["task"], s["template"]): s["questions"] for c in suite["columns"] for s in c["scores"]} == {
        key: len(values) for key, values in scores.items()}
    medians = []
    for column, tasks in zip(suite["columns"], [("first", "second"), ("third",)], strict=True):
        values = [value for (task, _), value in means.items() if task in tasks]
        medians.append(statistics.median(values))
        assert [column[k] for k in ("median", "mean", "min", "max")] == pytest.approx(
            [medians[-1], statistics.mean(values), min(values), max(values)])
    assert [column["name"] for column in suite["columns"]] == ["both", "third"]
    assert suite["mean"] == pytest.approx(statistics.mean(medians))
    assert results["groups"]["small"]["acc,none"] == suite["mean"]
    assert f"{100 * suite['mean']:.2f}" in printed and "first: some rows" in printed
    page = (out.parent / out.name.replace("results_", "suite_").replace(".json", ".html")).read_text(encoding="utf-8")
    assert '"template":"some rows"' in page and "src=" not in page


def test_what_is_wrong_with_a_suite_is_named(small):
    folder, _ = small

    def refusal(text):
        (folder / "bad.yaml").write_text(text)
        done = subprocess.run([common.BUILD / "moesaic", "eval", "--model", folder / "model", "--suite", folder / "bad.yaml",
                               "--data_dir", folder], capture_output=True, text=True)
        assert done.returncode in (2, 3) and "bad.yaml" in done.stderr, done.stderr
        return done.stderr

    assert "bad.yaml:12: 'tsk'" in refusal(SUITE.replace("task: first", "tsk: first"))
    assert "bad.yaml:5: prompt_filter" in refusal(SUITE.replace("original_task: true", "original: true"))
    assert "bad.yaml:15" in refusal(SUITE.replace("templates:fixed", "templates:unheard"))
    assert "bad.yaml:8" in refusal(SUITE.replace('"templates:*"', '"nowhere:*"'))
    assert "bad.yaml:9: task" in refusal(SUITE[:SUITE.index("task:\n")] + "task: first\n")
    assert "third.jsonl" in refusal(SUITE.replace("'no': 0", "'never': 0"))


SETS = {"anli_r1": "anli/anli_r1_dev", "anli_r2": "anli/anli_r2_dev", "anli_r3": "anli/anli_r3_dev", "cb": "cb/val",
        "rte": "rte/val", "wsc": "wsc/val", "wic": "wic/val", "copa": "copa/val", "winogrande": "winogrande/val",
        "hellaswag_4templates": "hellaswag/val_activitynet_heavy_1000"}


def test_raw_rows_score_as_rendered_ones(tmp_path):
    """The built-in suite over raw rows against rows that Jinja2 rendered, asked as files and by the plain scorer."""
    if not (DATA / "t0_eval").exists():
        pytest.skip(f"no data set folder at {DATA}")
    texts, rendered_rows = [], {}
    (tmp_path / "rendered").mkdir()
    for name, source in SETS.items():
        rows = [json.loads(line) for line in (DATA / "p3_rendered" / "eval" / f"{name}.jsonl").open(encoding="utf-8")]
        kept = sorted({row["row"] for row in rows})[:3]
        rendered_rows[name] = rows = [row for row in rows if row["row"] in kept]
        texts += [row["inputs"] for row in rows]
        (tmp_path / "rendered" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        raw = tmp_path / "data" / "t0_eval" / f"{source}.jsonl"
        raw.parent.mkdir(parents=True, exist_ok=True)
        lines = (DATA / "t0_eval" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        raw.write_text("".join(line + "\n" for line in lines
                               if json.loads(line).get("idx", json.loads(line).get("ind")) in kept))
    (tmp_path / "data" / "promptsource").symlink_to(DATA / "promptsource")
    make_model(tmp_path / "model", texts)

    files, _, _, _ = evaluate(tmp_path, "--tasks", tmp_path / "rendered", "--score_eos")
    results, samples, _, _ = evaluate(tmp_path, "--suite", "t0", "--data_dir", tmp_path / "data")
    columns = {"cb": "CB", "rte": "RTE", "wsc": "WSC", "wic": "WiC", "copa": "COPA", "winogrande": "Winogrande",
               "hellaswag_4templates": "HellaSwag"}
    scorer, compared = Scorer(tmp_path / "model"), 0
    scores = {(s["task"], s["template"]): s["value"] for c in results["suite"]["columns"] for s in c["scores"]}
    for name, rows in rendered_rows.items():
        task = columns.get(name, name)
        drawn = "Randomized prompts template"  # its wording is drawn
        for template, figures in files["variants"][name].items():
            if template != drawn:
                assert scores[task, template] == pytest.approx(figures["acc,none"]), (task, template)
        assert {template for of, template in scores if of == task} == set(files["variants"][name])
        ours = {(row["template"], row["doc"].get("idx", row["doc"].get("ind"))): row for row in samples[task]}
        assert len(samples[task]) == len(ours) == len(rows)
        for row in rows:
            if row["template"] == drawn:
                continue
            right, sums = scorer.right(row["inputs"], row["answer_choices"], row["target"])
            mine = ours[row["template"], row["row"]]
            assert mine["arguments"]["gen_args_0"]["arg_0"] == row["inputs"]
            assert mine["acc"] == right, row
            assert [pair[0] for pair in mine["filtered_resps"]] == pytest.approx(sums, abs=1e-3)
            compared += 1
    assert compared > 300
