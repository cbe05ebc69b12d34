"""A run trained by several processes: the same bytes whatever their number, and an end that says why when one fails."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import tiny_run
from test_compose import make_augmenting

pytestmark = tiny_run.float32_only
RUNS = {
    "molora": dict(router={"jitter": 0.1}, gradient_checkpointing=True),
    "lora": dict(finetuning_type="lora", num_experts=1, loss_normalization="sequences", optim="adafactor"),
    "mov": dict(finetuning_type="mov", router={"top_k": 2, "jitter": 0.1}, moe_aux_loss_coef=0.01),
    "full": dict(finetuning_type="full", num_experts=1),
    "calm": dict(finetuning_type="calm", num_experts=1),
}


def start(*arguments, **options):
    return subprocess.Popen(tiny_run.command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def ended(process, code, timeout=120):
    """What a command wrote to standard error whose exit code is `code`."""
    out, error = process.communicate(timeout=timeout)
    assert process.returncode == code, out + error
    return error


def written(folder):
    """What must not depend on the number of ranks: weights, and what the logs say but for speed."""
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert weights
    lines = [json.loads(line) for name in ("train_log.jsonl", "router_stats.jsonl")
             for line in (folder / name).read_text().splitlines()]
    return weights, [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def ranks_of(launcher):
    """{rank: process id} of those that have begun, once one has."""
    for _ in range(200):
        found = {}
        for child in open(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read().split():
            try:
                variables = open(f"/proc/{child}/environ").read().split("\0")
            except OSError:
                continue
            rank = [line for line in variables if line.startswith("RANK=")]
            if rank:
                found[int(rank[0][5:])] = int(child)
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("no rank began")


def wait_for(path, timeout=60):
    until = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.02)


def gone(process):
    try:
        return open(f"/proc/{process}/stat").read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    tiny_run.make_run(path, initializer_range=0.3)
    make_augmenting(path / "augmenting")
    (path / "compose.yaml").write_text(json.dumps({
        "anchor": str(path / "model"), "augmenting": str(path / "augmenting"), "output_dir": str(path / "composed"),
        "connections": [{"anchor": 0, "aug": 1}, {"anchor": 1, "aug": 3}]}))
    tiny_run.run("compose", path / "compose.yaml")
    return path


def make_run(folder, name, **changes):
    if changes.get("finetuning_type") == "calm":
        changes["model_name_or_path"] = str(folder / "composed")
    return tiny_run.make_run(folder, output_dir=str(folder / name), **{
        "max_steps": 6, "save_steps": 3, "logging_steps": 2, "eval_steps": 3, "val_size": 10,
        "gradient_accumulation_steps": 1, "micro_batches_per_step": 4, **changes})


@pytest.mark.parametrize("method", RUNS)
@pytest.mark.parametrize("parts", [4, 6])
def test_the_number_of_ranks_does_not_change_the_bytes(method, parts, folder):
    results = []
    for ranks in (1, 2, 3):
        run = make_run(folder, f"{method}-{parts}-{ranks}", micro_batches_per_step=parts, **RUNS[method])
        ended(start("train", run, "--ranks", ranks), 0)
        results.append(written(folder / f"{method}-{parts}-{ranks}"))
    assert results[0] == results[1] == results[2]


def test_a_short_end_and_an_epoch(folder):
    """90 rows, 16 examples a step: the last step of the second epoch has fewer micro-batches than ranks."""
    results = []
    for ranks in (1, 3):
        run = make_run(folder, f"epochs-{ranks}", max_steps=-1, num_train_epochs=2.0, max_samples=33, val_size=0, eval_steps=0)
        ended(start("train", run, "--ranks", ranks), 0)
        results.append(written(folder / f"epochs-{ranks}"))
    assert results[0] == results[1]


def test_ranks_change_from_restart_to_restart(folder):
    whole = make_run(folder, "whole", max_steps=400, save_steps=40)
    ended(start("train", whole, "--ranks", 2), 0)
    parts = make_run(folder, "parts", max_steps=400, save_steps=40)
    for ranks, seen in ((2, "checkpoint-40"), (3, "checkpoint-160")):
        launcher = start("train", parts, "--ranks", ranks, "--resume", "auto")
        wait_for(folder / "parts" / seen)
        os.kill(ranks_of(launcher)[ranks - 1], signal.SIGTERM)  # one alone, and not the first
        error = ended(launcher, 130)
        assert error.count("go on with:") == 1 and f"--ranks {ranks}" in error
    ended(start("train", parts, "--resume", "auto"), 0)
    assert written(folder / "whole") == written(folder / "parts")


def test_without_the_key_a_step_grows_with_the_ranks(folder):
    run = make_run(folder, "grown", micro_batches_per_step=0, gradient_accumulation_steps=2, max_steps=40, save_steps=10)
    launcher = start("train", run, "--ranks", 2)
    wait_for(folder / "grown" / "checkpoint-10")
    launcher.send_signal(signal.SIGTERM)
    ended(launcher, 130)
    assert "micro_batches_per_step: 4" in (folder / "grown" / "run.yaml").read_text()
    ended(start("train", run, "--resume", "auto"), 0)  # one rank goes on with the four
    assert "micro_batches_per_step: 4" in (folder / "grown" / "run.yaml").read_text()
    rows = [json.loads(line) for line in (folder / "grown" / "train_log.jsonl").read_text().splitlines()]
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert tokens[-1] == 40 * tokens[0] // 2
    same = make_run(folder, "same", max_steps=40, save_steps=10)
    ended(start("train", same), 0)
    assert written(folder / "grown") == written(folder / "same")


def test_questions_are_divided(folder, tmp_path):
    """`eval` and the tasks of a run: the same figures and samples, whoever asked."""
    adapter = tiny_run.train(folder, "asked", router={"top_k": 2})
    rows = [{"inputs": f"{a} {b} is ", "answer_choices": ["red", "cat"], "target": "cat"}
            for a in tiny_run.WORDS for b in tiny_run.WORDS[:4]]
    (tmp_path / "rank.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "write.jsonl").write_text("".join(
        json.dumps({"inputs": row["inputs"], "targets": "cat dog"}) + "\n" for row in rows))
    tasks = f"{tmp_path / 'rank.jsonl'},{tmp_path / 'write.jsonl'}"
    found = []
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        printed = tiny_run.run("eval", adapter, "--tasks", tasks, "--max_gen_toks", 4, "--batch_size", 3, "--ranks", ranks,
                               "--output_path", out, "--log_samples")
        files = {re.sub(r"_\d{4}-.*?(\.json)", r"\1", path.name): path.read_text() for path in out.rglob("*") if path.is_file()}
        results = json.loads(next(text for name, text in files.items() if name.startswith("results")))
        found.append((re.sub(r"\d+ s", "", printed), results["results"],
                      {name: text for name, text in files.items() if not name.startswith("results")}))
    assert found[0] == found[1]
    logs = []
    for ranks in (1, 2):
        run = make_run(folder, f"tasks-{ranks}", eval={"tasks": tasks.split(","), "steps": 3, "max_gen_toks": 4})
        ended(start("train", run, "--ranks", ranks), 0)
        logs.append(written(folder / f"tasks-{ranks}"))
    assert logs[0] == logs[1] and "eval/write/exact_match" in str(logs[0])


@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_are_killed_and_begin_again(torchrun, folder):
    name = "killed-by-torchrun" if torchrun else "killed"
    if not (folder / "undisturbed").exists():
        ended(start("train", make_run(folder, "undisturbed", max_steps=600, save_steps=20)), 0)
    run = make_run(folder, name, max_steps=600, save_steps=20)
    command = tiny_run.command("train", run)
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "3",
                   "--max-restarts", "25", "--monitor-interval", "0.1", *command]
    else:
        command += ["--ranks", "3", "--restarts", "25"]
    chance = random.Random(5)
    with open(folder / "log", "w+") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(5 if not torchrun else 2):
                time.sleep(chance.uniform(0.3, 2.0))
                if launcher.poll() is not None:
                    break
                victims = list(ranks_of(launcher).items())
                try:
                    os.kill(chance.choice(victims)[1], signal.SIGKILL)
                except ProcessLookupError:
                    pass
            assert launcher.wait(timeout=120) == 0, (folder / "log").read_text()[-3000:]
        finally:
            launcher.kill()
    assert written(folder / name) == written(folder / "undisturbed")
    assert not [path for path in (folder / name).iterdir() if "tmp" in path.name or path.name == "run.lock"]


def test_a_run_that_reports_nothing(folder):
    run = make_run(folder, "quiet", report_to=["none"], router={"top_k": 2})
    ended(start("train", run, "--ranks", 2), 0)
    assert not (folder / "quiet" / "train_log.jsonl").exists()


def test_who_signals_all_gets_one_checkpoint(folder):
    """Steps of half a second: the launcher's signal meets ranks that have one already and still make their step."""
    run = make_run(folder, "signalled", max_steps=1000, save_steps=1, per_device_train_batch_size=128,
                   micro_batches_per_step=32)
    launcher = start("train", run, "--ranks", 2, "--restarts", 3)
    wait_for(folder / "signalled" / "checkpoint-1")
    for process in ranks_of(launcher).values():
        os.kill(process, signal.SIGTERM)
    time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    error = ended(launcher, 130)
    assert error.count("go on with:") == 1 and "again" not in error


def test_a_launcher_that_was_told_to_end_starts_nothing_again(folder):
    launcher = start("train", make_run(folder, "early", max_steps=100000), "--ranks", 2, "--restarts", 3)
    ranks_of(launcher)
    launcher.send_signal(signal.SIGTERM)
    error = ended(launcher, 130, timeout=60)
    assert "again" not in error


def test_a_restart_is_no_consent(folder):
    """What the first start refuses, torchrun's next ones refuse, too."""
    ended(start("train", make_run(folder, "others", max_steps=3)), 0)
    before = {path: path.stat().st_mtime_ns for path in (folder / "others").rglob("*")}
    run = make_run(folder, "others", max_steps=6)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2",
                           "--max-restarts", "2", *tiny_run.command("train", run)], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stderr.count("of an earlier run") >= 2
    assert {path: path.stat().st_mtime_ns for path in (folder / "others").rglob("*") if path.name != "run.lock"} == before


def test_a_rank_that_stands_still_is_named(folder):
    run = make_run(folder, "still", max_steps=100000, save_steps=50, ddp_timeout=5)
    launcher = start("train", run, "--ranks", 3)
    wait_for(folder / "still" / "checkpoint-50")
    ranks = ranks_of(launcher)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    error = ended(launcher, 3, timeout=60)
    assert time.monotonic() - began < 20, "8 seconds where the machine has nothing else to do"
    assert "rank 0 of 3: rank 1 is gone or does not answer" in error
    assert all(gone(process) for process in ranks.values())


def test_ranks_end_with_who_started_them(folder):
    run = make_run(folder, "orphans", max_steps=100000, save_steps=50)
    launcher = start("train", run, "--ranks", 2)
    wait_for(folder / "orphans" / "checkpoint-50")
    ranks = ranks_of(launcher)
    launcher.kill()
    launcher.communicate()
    until = time.monotonic() + 30
    while not all(gone(process) for process in ranks.values()):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_full_disk_ends_all_with_its_message(folder):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    run = make_run(folder, "full", report_to=["none"])
    error = ended(start("train", run, "--ranks", 2, preexec_fn=limited), 3)
    assert "error: " in error and "rank 1" not in error.replace("rank 1 is gone", "")
    assert not list((folder / "full").glob("checkpoint-*"))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def by_hand(folder, run, *changes):
    """Two ranks as a launcher that we don't know would start them; what each says, and its exit code."""
    place = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [start("train", run, *changes[rank], env={**os.environ, **place, "RANK": str(rank)}) for rank in (0, 1)]
    return [(process.communicate(timeout=60), process.returncode) for process in processes]


def test_ranks_that_would_train_something_else_are_refused(folder):
    run = make_run(folder, "different", max_steps=3)
    for (_, error), code in by_hand(folder, run, [], ["learning_rate=0.5", "lora_rank=3"]):
        assert code == 2
        assert "rank 1: learning_rate: got 0.5, expected 0.005" in error and "rank 1: lora_rank: got 3, expected 2" in error
    other = shutil.copytree(folder / "model", folder / "other")
    model = bytearray((other / "model.safetensors").read_bytes())
    model[-1] ^= 1
    (other / "model.safetensors").write_bytes(model)
    for (_, error), code in by_hand(folder, run, [], [f"model_name_or_path={other}"]):
        assert code == 2 and "rank 1: weights of the model: got" in error
    (folder / "same-length.jsonl").write_text((folder / "rows.jsonl").read_text().replace("red", "dog"))
    for (_, error), code in by_hand(folder, run, [], [f"dataset={folder / 'same-length.jsonl'}"]):
        assert code == 2 and "rank 1: rows of the data: got" in error
    for (out, error), code in by_hand(folder, run, [], []):
        assert code == 0, error
    assert out == "", "rank 0 alone prints"


def sockets(process):
    """Local addresses of a process's internet sockets, as /proc has them."""
    inodes = set()
    for descriptor in os.listdir(f"/proc/{process}/fd"):
        try:
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{process}/fd/{descriptor}")))
        except OSError:
            pass
    lines = [line.split() for name in ("tcp", "tcp6", "udp", "udp6") for line in list(open(f"/proc/{process}/net/{name}"))[1:]]
    return [fields[1] for fields in lines if fields[9] in inodes]


def test_ranks_of_one_machine_meet_on_loopback_alone(folder):
    run = make_run(folder, "sockets", max_steps=100000, save_steps=50)
    loopback = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    launcher = start("train", run, "--ranks", 2)
    wait_for(folder / "sockets" / "checkpoint-50")
    found = {process: sockets(process) for process in [launcher.pid, *ranks_of(launcher).values()]}
    launcher.send_signal(signal.SIGINT)
    ended(launcher, 130)
    assert all(found.values()) and all(address.startswith(loopback) for of_one in found.values() for address in of_one), found
    alone = start("train", make_run(folder, "no-sockets", max_steps=100000, save_steps=50))
    wait_for(folder / "no-sockets" / "checkpoint-50")
    assert not sockets(alone.pid)
    alone.send_signal(signal.SIGINT)
    ended(alone, 130)


@pytest.mark.parametrize("arguments, message", [
    (["--ranks", "5"], "got 5 ranks and 4 micro-batches a step"),
    (["--ranks", "0"], "--ranks"),
    (["--restarts", "2"], "got no --ranks above 1"),
    (["--ranks", "2", "nonsense=1"], "nonsense"),
])
def test_what_cannot_be_is_refused_once(arguments, message, folder):
    run = make_run(folder, "refused")
    error = ended(start("train", run, *arguments), 2)
    assert message in error and error.count("error: ") == 1, error
