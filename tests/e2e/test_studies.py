"""The studies of compositions on a tiny anchor: every step of them runs and its figures arrive in the table."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tiny_run import PROGRAM, ROOT, make_model

DATA = pathlib.Path(os.environ.get("MOESAIC_DATA_DIR", ROOT.parent / "shared" / "data"))


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data at {DATA}")
@pytest.mark.parametrize("name, tasks", [("lowres", {"tsn_en": "chrf", "mgsm_sw": "number"}),
                                         ("code", {"ruby_summary": "codexglue_bleu", "next_line": "exact_match",
                                                   "mbpp": "pass@1", "HumanEval": "pass@1"})])
def test_a_study_runs_from_data_to_table(name, tasks, tmp_path):
    make_model(tmp_path / "anchor", num_hidden_layers=30, max_position_embeddings=4096)
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools" / "study" / f"calm_{name}.py", "--output_dir", out, "--data", DATA,
               "--anchor", tmp_path / "anchor", "--augmenting_steps", 2, "--composition_steps", 2, "--limit", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MOESAIC_BUILD_DIR": str(PROGRAM.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    for task, metric in tasks.items():
        assert metric in results[f"ask composition: {task}"] and metric in results[f"ask anchor: {task}"]
    trained = {key: value["trained"] for key, value in results.items() if key.startswith("train ")}
    assert trained["train composition"] == trained["train random"]
    assert abs(trained["train lora"] / trained["train composition"] - 1) < 0.5  # whole ranks of a tiny model
    table = (out / "table.md").read_text()
    assert "| composition |" in table and "| LoRA, rank" in table and "<svg" in (out / "plot.svg").read_text()
    # A second call finds everything done.
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "==" not in again.stdout
    # What is asked for later is added to what is there.
    more = subprocess.run([*map(str, command), "--vanilla", out / "augmenting"], capture_output=True, text=True,
                          timeout=300)
    assert more.returncode == 0, more.stderr[-3000:]
    assert "== train vanilla" in more.stdout and "== train random" not in more.stdout
    assert "| vanilla augmenting model |" in (out / "table.md").read_text()


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data at {DATA}")
def test_connections_run_from_data_to_table(tmp_path):
    make_model(tmp_path / "anchor", num_hidden_layers=30)
    make_model(tmp_path / "augmenting", num_hidden_layers=24)
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools" / "study" / "calm_connections.py", "--output_dir", out, "--data", DATA,
               "--anchor", tmp_path / "anchor", "--augmenting", tmp_path / "augmenting", "--composition_steps", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MOESAIC_BUILD_DIR": str(PROGRAM.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["train"]["texts"] == 788 and results["data"]["ruby"]["texts"] == 80
    rows = json.loads((out / "tables.json").read_text())["tables"]["scores"]["rows"]
    assert len(rows) == 8 and all(0 < value < 20 for row in rows for value in row[2:])
    assert {row[0]: row[1] for row in rows}["final to final, align text"] == 32 * 32 + 32


def test_key_arithmetic_runs_from_data_to_table(tmp_path):
    make_model(tmp_path / "anchor", num_hidden_layers=30)
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "tools" / "study" / "key_arithmetic.py", "--output_dir", out, "--anchor",
               tmp_path / "anchor", "--augmenting_steps", 2, "--lora_steps", 2, "--composition_steps", 2, "--limit", 2]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "MOESAIC_BUILD_DIR": str(PROGRAM.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    table = (out / "table.md").read_text()
    assert "|  | KV-SUB | NUM-MATH | KV-MATH | KV-SUB, held-in | KV-MATH, held-in |" in table
    for system in ["augmenting model", "anchor", "anchor + LoRA", "composition", "random augmenting model"]:
        assert f"| {system} |" in table
    # Two questions each: nothing trained for two steps answers them.
    results = json.loads((out / "results.json").read_text())
    assert results["ask composition, KV-MATH: kv_math"]["exact_match"] == 0
    assert results["train composition"]["trained"] == 2 * (64 * 32 + 32 + 4 * 32 * 32)
