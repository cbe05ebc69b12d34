"""How the program's threads wait for each other: its own choice unless the user made one, and no burden beside others."""

import contextlib
import os
import re
import subprocess
import sys
import time

import pytest

import tiny_run

POLICY = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with us
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: one thread")


def environment(**chosen):
    """The tests' environment without its own choice of a policy, and with `chosen`."""
    return {**{k: v for k, v in os.environ.items() if k not in POLICY}, **chosen}


@contextlib.contextmanager
def busy(processes):
    """Processes that compute meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def policies(**chosen):
    """What libgomp says it took, each time it was loaded."""
    done = subprocess.run([str(tiny_run.PROGRAM), "--version"], capture_output=True, text=True, timeout=60,
                          env=environment(OMP_DISPLAY_ENV="verbose", **chosen))
    assert done.returncode == 0 and done.stdout.startswith("moesaic "), done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("another OpenMP runtime than libgomp")
    return list(zip(re.findall("OMP_WAIT_POLICY = '(.*)'", done.stderr),
                    map(int, re.findall("GOMP_SPINCOUNT = '(.*)'", done.stderr))))


def test_spins_unless_told_otherwise():
    assert policies() == [("PASSIVE", 300000)]


@pytest.mark.parametrize("chosen,expected", [
    ({"OMP_WAIT_POLICY": "active"}, ("ACTIVE", 30000000000)),
    ({"OMP_WAIT_POLICY": "passive"}, ("PASSIVE", 0)),
    ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}, ("PASSIVE", 7)),
])
def test_a_user_s_choice_stays(chosen, expected):
    assert policies(**chosen) == [expected]


@needs_two_cores
def test_busy_processes_change_neither_results_nor_make_threads_a_burden(tmp_path):
    tiny_run.make_run(tmp_path)  # the data; the model is made anew, so large that threads share its products
    tiny_run.make_model(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=6)

    def seconds(name, threads, **chosen):
        run = tiny_run.make_run(tmp_path, output_dir=str(tmp_path / name), max_steps=12, save_steps=0,
                                per_device_train_batch_size=16)
        start = time.monotonic()
        done = subprocess.run([str(tiny_run.PROGRAM), "train", str(run), "--device", "cpu", "--dtype", "float32",
                               "--threads", str(threads)], capture_output=True, text=True, timeout=300,
                              env=environment(**chosen))
        assert done.returncode == 0, done.stderr
        return time.monotonic() - start

    seconds("quiet", 2)
    with busy(2):
        alone = seconds("alone", 1)
        watched = seconds("watched", 2)
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("quiet", "watched")]
    assert adapters[0] == adapters[1]
    assert watched < 3 * alone  # threads that spin take about ten times as long
