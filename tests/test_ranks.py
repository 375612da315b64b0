"""Several processes of one run: by torchrun where it has a part in it, else by the variables that it sets."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from clearml_server import ClearMLServer, Doc
from conftest import FEW, ROOT, Begin, Machine, Run, begin_ranks
from reading import SPEED, stored_curves
from stores import free_port

from clearml_client import arguments, ranks

GENTLE = ["--lr", 0.01]  # at the default rate the few steps of a short training blow up what is rounded differently
TORCHRUN = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2]
LONG = ["--epochs", 10_000]  # that no test waits for


def lines(run: Run) -> list[str]:
    """What the script says of its end; torchrun has a report of its own."""
    return [line for line in run.stderr.splitlines() if line.startswith("pytorch_mnist.py: ")]


def the_task(server: ClearMLServer) -> Doc:
    return list(server.tasks.values())[-1]


@pytest.fixture
def launched(begin: Begin, online: ClearMLServer) -> Iterator[Run]:
    """A long training of two processes by torchrun, in its second epoch."""
    command, *options = TORCHRUN
    run = begin(*options, ROOT / "pytorch_mnist.py", *FEW, *LONG, script=command)
    run.wait_for("epoch 1/")
    started = processes(run)
    yield run
    for number in started:  # torchrun does not take them along when it is killed
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def processes(torchrun: Run) -> list[int]:
    """The ids of its ranks, in their order."""
    found = subprocess.check_output(["pgrep", "-P", str(torchrun.process.pid)], text=True)
    return sorted(map(int, found.split()))


def curves_agree(server: ClearMLServer, some: str, other: str) -> None:
    """Every point once, and the same but for rounding."""
    first, second = stored_curves(server, some), stored_curves(server, other)
    assert first.keys() == second.keys()
    for name in first.keys() - {SPEED}:
        allowed = 0.011 if name == ("accuracy", "test") else 5e-3  # two of 200 images
        assert first[name] == pytest.approx(second[name], rel=5e-3, abs=allowed), name
    reported = [event for event in server.events[other].values() if event.get("variant") == "train batch"]
    assert len(reported) == len(second["loss", "train batch"])


def test_two_processes_train_as_one_does(begin: Begin, online: ClearMLServer) -> None:
    """Also where the last batch has one image, and so one process none."""
    options = [*FEW, *GENTLE, "--batch-size", 599]
    alone, *both = [*begin_ranks(begin, 1, *options), *begin_ranks(begin, 2, *options)]
    assert [run.end() for run in (alone, *both)] == [0, 0, 0], both[0].everything
    assert both[1].stdout == ""
    curves_agree(online, alone.task, both[0].task)
    assert [online.tasks[run.task]["status"] for run in (alone, both[0])] == ["completed", "completed"]


def test_a_rank_that_is_killed_fails_the_run(launched: Run, online: ClearMLServer) -> None:
    victim = processes(launched)[1]
    os.kill(victim, signal.SIGKILL)
    assert launched.end() == 1
    (line,) = lines(launched)
    assert f"error: rank 1 (process {victim}) ended early; saved, and to go on: uv run" in line
    assert the_task(online)["status"] == "failed"
    assert f"rank 1 (process {victim}) ended early" in the_task(online)["status_reason"]


def test_sigterm_to_torchrun_stops_the_task(launched: Run, online: ClearMLServer) -> None:
    launched.process.terminate()
    assert launched.end() != 0
    (line,) = lines(launched)
    assert "pytorch_mnist.py: terminated; saved, and to go on: uv run" in line
    assert (the_task(online)["status"], the_task(online)["status_message"]) == ("stopped", "terminated")


def test_a_rank_that_stands_still_does_not_keep_the_task_running(begin: Begin, online: ClearMLServer) -> None:
    first, second = begin_ranks(begin, 2, *FEW, *LONG)
    first.wait_for("epoch 1/")
    second.signal(signal.SIGSTOP)
    first.signal(signal.SIGINT)
    assert first.end() == 130
    assert first.line.startswith("pytorch_mnist.py: interrupted; saved, and to go on: uv run")
    assert (the_task(online)["status"], the_task(online)["status_message"]) == ("stopped", "interrupted")


def test_a_failure_of_rank_0_ends_the_others(begin: Begin, online: ClearMLServer) -> None:
    target = f"s3://127.0.0.1:{free_port()}/models"
    first, second = begin_ranks(begin, 2, *FEW, "--output-uri", target)
    assert (first.end(), second.end()) == (1, 1)
    assert f"no storage at {target}" in first.line
    assert f"error: rank 0 (process {first.process.pid}) ended early" in second.line
    assert the_task(online)["status"] == "failed"


def test_resume_with_another_number_of_processes(begin: Begin, machine: Machine, online: ClearMLServer) -> None:
    """Two, one, two; and the last batch is smaller."""
    before = len(online.tasks)
    options = [*FEW, *GENTLE, "--batch-size", 160, "--epochs", 9]
    (whole,) = begin_ranks(begin, 1, *options)
    assert whole.end() == 0, whole.everything
    broken = begin_ranks(begin, 2, *options)
    kill_in_epoch(2, broken)
    (checkpoint,) = machine.home.glob(f"outputs/*{broken[0].task[-8:]}/checkpoint.pt")
    again = begin_ranks(begin, 1, "--resume", checkpoint)
    kill_in_epoch(5, again)
    runs = begin_ranks(begin, 2, "--resume", checkpoint)
    assert [run.end() for run in runs] == [0, 0], runs[0].everything
    for run in (again[0], runs[0]):
        assert "resumed after epoch " in run.stdout
    assert len(online.tasks) == before + 2
    curves_agree(online, whole.task, broken[0].task)


def kill_in_epoch(number: int, runs: list[Run]) -> None:
    runs[0].wait_for(f"epoch {number}/")
    for run in runs:
        run.process.kill()
        run.end()


def test_ranks_with_other_arguments_are_refused(begin: Begin, online: ClearMLServer) -> None:
    before = len(online.tasks)
    runs = begin_ranks(begin, 2, *FEW, own=("--lr", 0.1))
    assert [run.end() for run in runs] == [2, 2]
    for run in runs:
        assert "error: rank 1 has other arguments than rank 0: " in run.line
    assert len(online.tasks) == before


def test_a_batch_smaller_than_the_ranks_is_refused(begin: Begin) -> None:
    first, *others = begin_ranks(begin, 3, *FEW, "--batch-size", 2)
    assert first.end() == 2
    assert "error: argument --batch-size: 2 images are too few for 3 processes" in first.line
    assert [run.end() for run in others] == [1, 1]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # no GPU is here to ask
    monkeypatch.setattr(ranks, "LOCAL_RANKS", 3)
    assert arguments.no_device("auto") == "3 processes and 2 GPUs: --nproc-per-node 2, or --device cpu"
    assert arguments.no_device("cpu") == ""
