"""A pytest that is killed with -9 leaves no process behind."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import ROOT, Machine, wait_until
from keeper import marked

# A training, a store, and an agent whose child has left its session.
TEST = """
import subprocess, time
from pathlib import Path

def test_that_takes_long(begin, rclone):
    begin("--offline", "--epochs", 10_000, "--batch-size", 100).wait_for("epoch 1/")
    subprocess.Popen(["sh", "-c", "setsid sleep 1000 & sleep 1000"], start_new_session=True)
    Path(__file__).with_name("all are running").touch()
    time.sleep(1000)
"""


def test_a_killed_pytest_leaves_no_process(machine: Machine) -> None:
    test, running = machine.home / "test_it.py", machine.home / "all are running"
    test.write_text(TEST)
    mark = f"MARK_{time.time_ns()}"
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml"), "-n1", str(test)]
    environment = {**machine.environment, "PYTHONPATH": str(Path(__file__).parent), mark: "1"}
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
    with subprocess.Popen(command, env=environment, **options) as controller:
        try:
            wait_until(lambda: running.exists() or controller.poll() is not None)
            assert len(marked(mark)) >= 7  # with pytest's worker, the keeper, the zygote and what watches over the fork
        finally:
            controller.kill()
    wait_until(lambda: not marked(mark))
