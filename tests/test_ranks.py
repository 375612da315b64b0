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
from conftest import ROOT, Begin, Machine, Run
from reading import stored_curves
from stores import free_port

from clearml_client import arguments, ranks

GENTLE = ["--lr", 0.01]  # at the default rate the few steps of a short training blow up what is rounded differently
TORCHRUN = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", 2]
LONG = ["--epochs", 10_000]  # that no test waits for


def begin_ranks(begin: Begin, count: int, *arguments: object, own: tuple[object, ...] = ()) -> list[Run]:
    """A run of so many processes; the last one has arguments of its `own`."""
    port = str(free_port())
    everyone = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in map(str, range(count)):
        more = own if int(rank) == count - 1 else ()
        started.append(begin(*arguments, *more, **everyone, RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port))
    return started


def lines(run: Run) -> list[str]:
    """What the script says of its end; torchrun has a report of its own."""
    return [line for line in run.stderr.splitlines() if line.startswith("pytorch_mnist.py: ")]


def the_task(server: ClearMLServer) -> Doc:
    return list(server.tasks.values())[-1]


@pytest.fixture
def launched(begin: Begin, online: ClearMLServer, few: list[object]) -> Iterator[Run]:
    """A long training of two processes by torchrun, in its second epoch."""
    command, *options = TORCHRUN
    run = begin(*options, ROOT / "pytorch_mnist.py", *few, *LONG, script=command, fresh=True)
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


@pytest.mark.parametrize("batch_size", [1499, 5999], ids=["last batch of 4", "last batch of 1"])
def test_two_processes_train_as_one_does(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], batch_size: int
) -> None:
    curves = []
    for count in (1, 2):
        before = set(online.tasks)
        runs = begin_ranks(begin, count, *few, *GENTLE, "--batch-size", batch_size)
        assert [run.end() for run in runs] == [0] * count, runs[-1].everything
        (task,) = set(online.tasks) - before
        assert online.tasks[task]["status"] == "completed"
        curves.append(stored_curves(online, task))
        assert [run.stdout for run in runs[1:]] == [""] * (count - 1)
    alone, together = curves
    assert alone.keys() == together.keys()
    for name in alone.keys() - {("images per second", "train")}:
        assert alone[name] == pytest.approx(together[name], rel=5e-3, abs=5e-3), name
    reported = [event for event in online.events[task].values() if event.get("variant") == "train batch"]
    assert len(reported) == len(together["loss", "train batch"]), "a point is there twice"


def test_a_rank_that_is_killed_fails_the_run(launched: Run, online: ClearMLServer) -> None:
    victim = processes(launched)[1]
    os.kill(victim, signal.SIGKILL)
    assert launched.end() == 1
    (line,) = lines(launched)
    assert f"error: rank 1 (process {victim}) ended early; saved, and to go on: uv run" in line
    assert the_task(online)["status"] == "failed"
    assert f"rank 1 (process {victim}) ended early" in the_task(online)["status_reason"]


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_to_torchrun_stops_the_task(
    launched: Run, online: ClearMLServer, number: signal.Signals, words: str
) -> None:
    launched.process.send_signal(number)
    assert launched.end() != 0
    (line,) = lines(launched)
    assert f"pytorch_mnist.py: {words}; saved, and to go on: uv run" in line
    assert (the_task(online)["status"], the_task(online)["status_message"]) == ("stopped", words)


def test_a_rank_that_stands_still_does_not_keep_the_task_running(
    begin: Begin, online: ClearMLServer, few: list[object]
) -> None:
    first, second = begin_ranks(begin, 2, *few, *LONG)
    first.wait_for("epoch 1/")
    second.process.send_signal(signal.SIGSTOP)
    first.process.terminate()
    assert first.end() == 143
    assert first.line.startswith("pytorch_mnist.py: terminated; saved, and to go on: uv run")
    assert (the_task(online)["status"], the_task(online)["status_message"]) == ("stopped", "terminated")


def test_a_failure_of_rank_0_ends_the_others(begin: Begin, online: ClearMLServer, few: list[object]) -> None:
    target = f"s3://127.0.0.1:{free_port()}/models"
    first, second = begin_ranks(begin, 2, *few, "--output-uri", target)
    assert (first.end(), second.end()) == (1, 1)
    assert f"no storage at {target}" in first.line
    assert f"error: rank 0 (process {first.process.pid}) ended early" in second.line
    assert the_task(online)["status"] == "failed"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], before: int, after: int
) -> None:
    assert begin(*few, *GENTLE).end() == 0
    whole = the_task(online)["id"]
    broken = begin_ranks(begin, before, *few, *GENTLE)
    broken[0].wait_for("epoch 1/3")
    for run in broken:
        run.process.kill()
    checkpoint = sorted(machine.home.glob("outputs/*/checkpoint.pt"))[-1]
    runs = begin_ranks(begin, after, *few, *GENTLE, "--resume", checkpoint)
    assert [run.end() for run in runs] == [0] * after, runs[0].everything
    assert the_task(online)["id"] == broken[0].task
    assert "resumed after epoch " in runs[0].stdout
    some, other = stored_curves(online, whole), stored_curves(online, broken[0].task)
    assert some.keys() == other.keys()
    for name in some.keys() - {("images per second", "train")}:
        assert some[name] == pytest.approx(other[name], rel=5e-3, abs=5e-3), name


def test_ranks_with_other_arguments_are_refused(begin: Begin, online: ClearMLServer, few: list[object]) -> None:
    before = len(online.tasks)
    runs = begin_ranks(begin, 2, *few, own=("--lr", 0.1))
    assert [run.end() for run in runs] == [2, 2]
    for run in runs:
        assert "error: rank 1 has other arguments than rank 0: " in run.line
    assert len(online.tasks) == before


def test_a_batch_smaller_than_the_ranks_is_refused(begin: Begin, few: list[object]) -> None:
    first, *others = begin_ranks(begin, 3, *few, "--batch-size", 2)
    assert first.end() == 2
    assert "error: argument --batch-size: 2 images are too few for 3 processes" in first.line
    assert [run.end() for run in others] == [1, 1]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # no GPU is here to ask
    monkeypatch.setattr(ranks, "LOCAL_RANKS", 3)
    assert arguments.no_device("auto") == "3 processes and 2 GPUs: --nproc-per-node 2, or --device cpu"
    assert arguments.no_device("cpu") == ""
