"""A pytest that is killed with -9 leaves no process behind."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import HANGS, ROOT, Machine
from keeper import marked

# A training in a fork, one in a process of its own, a store, and an agent whose child has left its session.
TEST = """
import subprocess, time
from pathlib import Path

def test_that_takes_long(begin, rclone):
    training = ("--offline", "--epochs", 10_000, "--batch-size", 200)
    for run in (begin(*training), begin(*training, OMP_NUM_THREADS="2")):
        run.wait_for("epoch 1/")
    subprocess.Popen(["sh", "-c", "setsid sleep 1000 & sleep 1000"], start_new_session=True)
    Path(__file__).with_name("all are running").touch()
    time.sleep(1000)
"""


def wait_until(something: Callable[[], object], within: float) -> None:
    deadline = time.monotonic() + within
    while not something():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("killed", ["controller", "worker"])
def test_a_killed_pytest_leaves_no_process(machine: Machine, killed: str) -> None:
    """What a worker has started goes, even where its controller does nothing."""
    test, running = machine.home / "test_it.py", machine.home / "all are running"
    test.write_text(TEST)
    mark = f"MARK_{time.time_ns()}"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml"), "-n1", str(test)]
    environment = {**machine.environment, "PYTHONPATH": str(Path(__file__).parent), mark: "1"}
    with ExitStack() as stack:
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        controller = stack.enter_context(subprocess.Popen(command, env=environment, **options))
        stack.callback(controller.kill)
        wait_until(lambda: running.exists() or controller.poll() is not None, HANGS)
        children = psutil.Process(controller.pid).children()
        (worker,) = [child for child in children if "-c" in child.cmdline()]
        others = {controller.pid, *(child.pid for child in children)} - {worker.pid}
        # The worker, its keeper, what watches over the fork, and the five of the test, of which `sh` starts one late.
        wait_until(lambda: len({process.pid for process in marked(mark)} - others) >= 8, 20)
        if killed == "worker":
            controller.send_signal(signal.SIGSTOP)
            worker.kill()
            wait_until(lambda: {process.pid for process in marked(mark)} <= others, 20)
    wait_until(lambda: not marked(mark), 20)
