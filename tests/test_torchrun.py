"""Several processes by torchrun: the patch of docs/beyond-one-machine.md, applied to a copy of the script."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from clearml_server import ClearMLServer
from conftest import FEW, Begin, Machine, blocks, copy_script, mnist
from reading import stored_curves

TORCHRUN = Path(sys.executable).with_name("torchrun")
PROCESSES = ("--standalone", "--nproc-per-node")


@pytest.fixture
def patched(tmp_path: Path) -> Path:
    script = copy_script(tmp_path / "copy")
    (patch,) = blocks("Several processes", "diff")
    assert len(re.findall(r"^[+-](?![+-]{2} )", patch, re.MULTILINE)) <= 30  # changed lines
    subprocess.run(["git", "apply"], input=patch, text=True, cwd=script.parent, check=True)
    return script


def test_two_processes_train_as_one_does(begin: Begin, machine: Machine, online: ClearMLServer, patched: Path) -> None:
    options = ["--data-dir", mnist(6000, 1000), "--epochs", 1, "--log-interval", 10]
    alone = machine.train(*options)
    both = begin(*PROCESSES, 2, patched, *options, script=TORCHRUN)
    assert both.end() == 0, both.everything
    one, two = (stored_curves(online, run.task) for run in (alone, both))
    assert list(online.tasks) == [alone.task, both.task]
    assert online.tasks[both.task]["status"] == "completed"
    assert one["loss", "train batch"].keys() == two["loss", "train batch"].keys()  # each has its share of each batch
    assert two["accuracy", "test"][47] == pytest.approx(one["accuracy", "test"][47], abs=0.02)
    assert both.stdout.count("epoch 1/1") == both.stdout.count("Test accuracy") == 1


@pytest.mark.parametrize(
    ("count", "killed", "number", "status"),
    [
        (2, "rank 1", signal.SIGKILL, "failed"),
        (1, "torchrun", signal.SIGTERM, "failed"),
        (2, "torchrun", signal.SIGINT, "stopped"),
    ],
)
def test_the_end_of_one_process_ends_all(
    begin: Begin, online: ClearMLServer, patched: Path, count: int, killed: str, number: int, status: str
) -> None:
    run = begin(*PROCESSES, count, patched, *FEW, "--epochs", 10_000, script=TORCHRUN)
    run.wait_for("epoch 2/")
    ranks = [process for process in psutil.Process(run.process.pid).children() if "RANK" in process.environ()]
    victims = {process.environ()["RANK"]: process.pid for process in ranks} | {"torchrun": run.process.pid}
    os.kill(victims[killed.removeprefix("rank ")], number)
    assert run.end() != 0
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("pytorch_mnist.py: ")]
    assert "; saved, and to go on: " in line
    assert online.tasks[run.task]["status"] == status, run.everything
    assert not [process for process in ranks if process.is_running()]


def test_without_the_patch_it_is_refused(machine: Machine) -> None:
    """In each process, by what torchrun sets for it."""
    run = machine.train("--dry-run", TORCHELASTIC_RUN_ID="none", RANK="0", WORLD_SIZE="2", code=2)
    assert run.stderr.splitlines() == [run.line]
    assert "torchrun would start a run in each process: see docs/beyond-one-machine.md" in run.line


def test_variables_that_another_launcher_left_are_of_no_account(machine: Machine) -> None:
    machine.train("--dry-run", RANK="0", WORLD_SIZE="", MASTER_ADDR="nowhere.invalid")
