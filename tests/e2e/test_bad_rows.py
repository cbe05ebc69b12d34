"""A row that can't be used is known before the first step, whatever is wrong with it."""

import json

import pytest
import tiny_run

ALTERNATING = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} </s>{% endfor %}")


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = chat(("user", "red cat"), ("assistant", "blue dog"))
BAD = {
    "begins with an answer": (chat(("assistant", "red"), ("user", "cat"), ("assistant", "dog")), "alternate"),
    "an empty conversation": ({"messages": []}, "missing or empty"),
    "a null answer": (chat(("user", "red"), ("assistant", None)), "content"),
    "no answer at all": (chat(("user", "red")), "assistant"),
}


def run_file(folder, bad, **changes):
    rows = [GOOD] * 60
    rows[36] = bad
    (folder / "template.jinja").write_text(ALTERNATING)
    run = tiny_run.make_run(folder, dataset=str(folder / "rows.json"), template=str(folder / "template.jinja"),
                            max_steps=20, save_steps=0, **changes)
    (folder / "rows.json").write_text(json.dumps(rows))  # one line
    return run


@pytest.mark.parametrize("kind", BAD)
def test_the_run_stops_before_its_first_step_and_names_the_row(kind, tmp_path):
    row, reason = BAD[kind]
    run = run_file(tmp_path, row)
    for arguments in (["train", run], ["train", run, "--dry-run"]):
        done = tiny_run.moesaic(*arguments)
        assert done.returncode == 3
        assert "rows.json row 37 (line 1)" in done.stderr and reason in done.stderr and "1 of 60 rows" in done.stderr
        assert not (tmp_path / "out" / "train_log.jsonl").exists()


def test_skipped_rows_are_listed_and_counted(tmp_path):
    done = tiny_run.moesaic("train", run_file(tmp_path, BAD["begins with an answer"][0], on_bad_row="skip"))
    assert done.returncode == 0, done.stderr
    assert "rows.json row 37 (line 1)" in done.stderr + done.stdout
    assert " skipped" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_validate_renders_with_a_model_or_a_run(tmp_path):
    run = run_file(tmp_path, BAD["begins with an answer"][0])
    plain = tiny_run.moesaic("data", "validate", tmp_path / "rows.json")
    assert plain.returncode == 0 and "0 damaged" in plain.stdout
    (tmp_path / "model" / "chat_template.jinja").write_text(ALTERNATING)
    for arguments in ([run], [tmp_path / "rows.json", "--model", tmp_path / "model"]):
        done = tiny_run.moesaic("data", "validate", *arguments)
        assert done.returncode == 3
        assert "60 rows" in done.stdout and "1 damaged" in done.stdout and "row 37 (line 1)" in done.stdout
