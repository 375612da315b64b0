"""Every way in which a run can fail, provoked for real: what is said, in what time, and what is kept.

faults.py has the catalogue of what can be wrong before a run begins. What happens to one in its middle has a test each
here, marked with the row of docs/when-things-go-wrong.md that it shows.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from clearml_server import ClearMLServer
from conftest import FEW, HANGS, MNIST_FILES, ROOT, Begin, Machine, Run, silent
from faults import DOCTOR, ELSEWHERE, FAULTS, Promise, Setup, row, table
from reading import EPOCH, alike, curves_in, evaluate, read, read_session, stored_curves
from stores import CHECKSUM, FakeGCS, Front, Plug, Rclone, SeaweedFS, Store, free_port

import pytorch_mnist
from clearml_client import checkpoint

LONG = 10_000  # epochs that no test waits for


@pytest.fixture
def server(live: bool, tmp_path: Path) -> Iterator[ClearMLServer]:
    """A server of the test's own, which it may stop."""
    if live:
        pytest.skip("stops the server or looks into it")
    stand_in = ClearMLServer(tmp_path / "clearml-server")
    stand_in.start()
    yield stand_in
    stand_in.stop()
    assert stand_in.unknown == []


@dataclass
class Bench:
    """A machine with a server, and a training that takes seconds."""

    machine: Machine
    server: ClearMLServer
    begin: Begin
    rows: list[Promise]  # of the README, that the test shows

    def train(self, *arguments: object, **variables: str) -> Run:
        return self.begin(*FEW, *arguments, **variables)

    def ends(self, run: Run, row: str = "", code: int | None = None, **places: object) -> None:
        """Wait for the end, which must be as the page has it; of several, by this beginning or code."""
        rows = [promise for promise in self.rows if promise.row.startswith(row) and code in (None, promise.code)]
        rows[0].kept(run, **{name: str(place) for name, place in places.items()})
        if rows[0].status:
            assert self.server.tasks[run.task]["status"] == rows[0].status


@pytest.fixture
def bench(machine: Machine, server: ClearMLServer, begin: Begin, request: pytest.FixtureRequest) -> Bench:
    machine.configure(server.configuration())
    return Bench(machine, server, begin, [mark.args[0] for mark in request.node.iter_markers("row")])


RECIPE = ("--epochs", 12, "--lr", 0.1)


@dataclass
class Uninterrupted:
    """A training that nothing disturbed."""

    folder: Path  # with the model, and the first checkpoint as `saved.pt`
    curves: dict[tuple[str, str], dict[int, float]]  # that the server has


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uninterrupted]:
    machine, server = Machine(tmp_path_factory.mktemp("home")), ClearMLServer(tmp_path_factory.mktemp("server"))
    server.start()
    machine.configure(server.configuration())
    run = machine.start("pytorch_mnist.py", *FEW, *RECIPE)
    run.wait_for("epoch 1/12")
    folder = machine.outputs("checkpoint.pt").parent
    os.link(folder / "checkpoint.pt", folder / "saved.pt")
    assert run.end() == 0, run.everything
    yield Uninterrupted(folder, stored_curves(server, run.task))
    server.stop()


def named_checkpoint(run: Run, machine: Machine) -> dict[str, Any]:
    """The checkpoint that the last line names, which must be whole."""
    found = re.search(r"pytorch_mnist.py (--resume .*?)(;|$)", run.line)
    assert found, run.everything
    _, path = shlex.split(found[1])
    content = read(machine.home / path)
    assert content["states"]["net"].keys() == pytorch_mnist.Net().state_dict().keys()
    return content


def statuses(server: ClearMLServer) -> set[str]:
    return {task["status"] for task in server.tasks.values()}


def is_whole(model: Path) -> bool:
    return read(model).keys() == pytorch_mnist.Net().state_dict().keys()


# --- the page ------------------------------------------------------------------------------------------------------
def test_each_row_of_the_page_has_a_test_and_its_exit_codes() -> None:
    marks = [mark for test in [*globals().values()] for mark in getattr(test, "pytestmark", []) if mark.name == "row"]
    promises = [*FAULTS.values(), *(mark.args[0] for mark in marks)]
    for when, what in table((ROOT / "docs/when-things-go-wrong.md").read_text()).items():
        if not when.startswith(ELSEWHERE):
            said = {int(code) for code in re.findall(r"exit (\d+)", what.replace("128 + number", "130, exit 143"))}
            assert {promise.code for promise in promises if when.startswith(promise.row)} - {0} == said - {0}, when
            assert [promise for promise in promises if when.startswith(promise.row)], when


# --- before the run begins -------------------------------------------------------------------------------------------
@pytest.fixture
def setup(
    machine: Machine, server: ClearMLServer, rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS
) -> Iterator[Setup]:
    """All is well, and nothing more is stored afterwards, in no bucket that was not there."""
    machine.variables |= CHECKSUM
    stores: dict[str, Store] = {"rclone": rclone, "tls": rclone_tls, "seaweed": seaweed, "gcs": gcs}
    before = {name: store.keys() for name, store in stores.items()}
    with ExitStack() as held:
        yield Setup(machine, server, stores, held)
    assert {name: store.keys() for name, store in stores.items()} == before
    assert seaweed.buckets() == ["models"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.waits) if name == "a silent server" else name for name in FAULTS]
)
def test_what_is_wrong_is_named_before_anything_exists(begin: Begin, setup: Setup, name: str) -> None:
    fault = FAULTS[name]
    fault.provoke(setup)
    home = setup.machine.home
    setup.places |= {"target": setup.target, "web": setup.server.web_url, "home": str(home)}
    script = begin(*(["--output-uri", setup.target] if setup.target else []))
    fault.kept(script, **setup.places)
    assert script.stderr.splitlines() == [script.line]
    assert not re.search("epoch 1/|offline session|created new task", script.stdout)
    assert not list(home.glob("outputs/*"))
    assert not setup.server.tasks


# --- the server dies --------------------------------------------------------------------------------------------------
@pytest.mark.waits
@row("the server dies during training and comes back", 0)
@row("the server dies during training and stays away", 1, "did not reach", DOCTOR, within=120)
def test_a_server_that_dies_costs_no_training(bench: Bench, machine: Machine, tmp_path: Path) -> None:
    """Two runs, each with a server of its own: one comes back, and the other is waited for in vain."""
    lost = ClearMLServer(tmp_path / "lost")
    lost.start()
    hosts = {"CLEARML_API_HOST": lost.api_url, "CLEARML_FILES_HOST": lost.files_url, "CLEARML_WEB_HOST": lost.web_url}
    elsewhere = ["--output-uri", tmp_path, "--output-dir", "deserted"]
    deserted = bench.train("--epochs", 4, *elsewhere, **hosts)
    deserted.wait_for("epoch 1/4")
    lost.stop()
    deserted.wait_for("epoch 4/4")
    deserted.since = time.monotonic()
    other = bench.train("--epochs", 4)
    other.wait_for("epoch 2/4")
    bench.server.stop()
    other.wait_for("waiting for the ClearML server to come back")
    bench.server.start()
    other.wait_for("the ClearML server is back")
    bench.ends(other, "the server dies during training and comes back")
    curves = stored_curves(bench.server, other.task)
    assert [*curves["loss", "train batch"]] == [*range(1, 13)]
    assert [*curves["accuracy", "test"]] == [3, 6, 9, 12]
    task = machine.read_task(other.task)
    assert all(task["console"].count(f"epoch {epoch}/4 ") == 1 for epoch in range(1, 5))
    assert {"confusion matrix", "per class"} <= task["plots"].keys()
    assert (len(task["samples"]), "predictions" in task["artifacts"]) == (1, True)
    (model,) = task["models"]
    assert Path(model["file"]).read_bytes() == machine.outputs("model.pt").read_bytes()
    bench.ends(deserted, "the server dies during training and stays away")
    (model,) = machine.home.glob("deserted/*/model.pt")
    assert str(model.relative_to(machine.home)) in deserted.line
    assert is_whole(model)
    assert named_checkpoint(deserted, machine)["epoch"] == 4


# --- the storage dies -------------------------------------------------------------------------------------------------
def stored_at(run: Run) -> str:
    return str(re.findall(r"^Stored: (.*)$", run.stdout, re.MULTILINE)[0])


UNSTORED = "the model is in outputs/{model}, but not at {uri}"


@row("the storage dies during training", 1, UNSTORED, f"{DOCTOR} --output-uri {{uri}}", status="failed")
@pytest.mark.parametrize("when", ["while training", "in the middle of the upload"])
def test_a_store_that_dies_costs_no_training(bench: Bench, machine: Machine, tmp_path: Path, when: str) -> None:
    """The store has no half object, and the command of the last line uploads what is there."""
    with Rclone(tmp_path / "store") as store:
        plug = Plug(store.port)
        host = store.host if when == "while training" else plug.host
        uri = f"s3://{host}/{store.bucket}"
        machine.configure(bench.server.configuration(), store.clearml_conf(host=host))
        run = bench.train("--epochs", 12, "--output-uri", uri)
        run.wait_for("epoch 1/")
        if when == "while training":
            store.stop()
        else:
            plug.bytes_left = 100_000  # of the 171,000 that the model has
        run.end()
        assert plug.pulled == (when != "while training")
        model = machine.outputs("model.pt")
        bench.ends(run, model=model.relative_to(machine.home / "outputs"), uri=uri)
        assert "Could not connect" in run.line
        assert evaluate(model, 200) == pytest.approx(float(EPOCH.findall(run.stdout)[-1][4]), abs=0.005)
        assert named_checkpoint(run, machine)["epoch"] == 12
        task = bench.server.tasks[run.task]
        assert uri in task["status_reason"]

        if when == "while training":
            store.start()
        assert not store.keys()
        machine.configure(bench.server.configuration(), store.clearml_conf())  # mended: the store at its own port
        again = bench.begin("--resume", f"outputs/{run.task}/checkpoint.pt", "--output-uri", store.uri())
        assert again.end() == 0, again.everything
        assert "epoch 1/" not in again.stdout
        (key,) = [key for key in store.keys() if key.endswith("models/model.pt")]
        assert stored_at(again) == store.uri(key)
        assert store.get(key) == model.read_bytes()
        assert task["status"] == "completed"
        assert [entry["uri"] for entry in bench.server.models.values()] == [stored_at(again)]


# --- signals and the web UI -------------------------------------------------------------------------------------------
TERMINATED = row("SIGTERM, SIGHUP", 143, "terminated", status="stopped", within=10)
INTERRUPTED = row("SIGTERM, SIGHUP", 130, "interrupted", status="stopped", within=10)


@TERMINATED
@INTERRUPTED
@pytest.mark.parametrize(
    ("moment", "number", "times"),
    [
        ("Storage: ", signal.SIGTERM, 1),
        ("created new task", signal.SIGINT, 3),
        ("epoch 1/", signal.SIGTERM, 1),
        ("epoch 1/", signal.SIGINT, 3),
        ("Test accuracy ", signal.SIGINT, 1),
    ],
)
def test_a_signal_stops_the_task_and_names_the_checkpoint(
    bench: Bench, machine: Machine, moment: str, number: signal.Signals, times: int
) -> None:
    at_the_end = moment == "Test accuracy "
    run = bench.train("--epochs", 1 if at_the_end else LONG)
    run.wait_for(moment)
    for press in range(times):
        time.sleep(0.3 if press else 0)
        if run.process.poll() is None:
            run.signal(number)
    bench.ends(run, code=128 + number)
    if at_the_end or moment == "epoch 1/":
        assert named_checkpoint(run, machine)["epoch"] >= 1


class Stuck(Plug):
    """A port before another one, on which the first request that begins like this gets no answer."""

    def __init__(self, port: int, request: bytes) -> None:
        self.request, self.asked = request, threading.Event()
        super().__init__(port)

    def pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(4096):
                if re.match(self.request, data):
                    self.asked.set()
                    time.sleep(HANGS)
                sink.sendall(data)


@TERMINATED
@pytest.mark.parametrize("request_", ["PUT .*/probe-", "PUT .*/model.pt"])
def test_sigterm_while_the_storage_is_silent(bench: Bench, machine: Machine, rclone: Rclone, request_: str) -> None:
    """The storage, before there is a task, and at the upload of the model."""
    store = Stuck(rclone.port, request_.encode())
    machine.configure(bench.server.configuration(), rclone.clearml_conf(host=store.host))
    run = bench.train("--epochs", 1, "--output-uri", f"s3://{store.host}/{rclone.bucket}")
    assert store.asked.wait(HANGS)
    run.signal(signal.SIGTERM)
    if "model" in request_:
        bench.ends(run)
        assert named_checkpoint(run, machine)["epoch"] == 1
        assert is_whole(machine.outputs("model.pt"))
    else:
        assert (run.end(within=10), run.line) == (143, "pytorch_mnist.py: terminated")
        assert not bench.server.tasks


@row("the task is aborted in the web UI", 143, "aborted in the web UI", status="stopped")
def test_abort_in_the_web_ui_ends_the_training(bench: Bench, machine: Machine) -> None:
    run = bench.train("--epochs", LONG)
    run.wait_for("epoch 1/")
    bench.server.tasks_stop(run.task)
    run.since = time.monotonic()
    run.end(within=2 + 10)  # the SDK asks every 2 s; from then on it is SIGTERM
    bench.ends(run)
    assert named_checkpoint(run, machine)["epoch"] >= 1


# --- kill -9 and --resume ---------------------------------------------------------------------------------------------
def killed_after(words: str, run: Run) -> None:
    run.wait_for(words)
    run.signal(signal.SIGKILL)
    run.end()


@row("the process is killed", 0)
def test_resume_after_kill_9_is_as_if_nothing_had_happened(
    bench: Bench, machine: Machine, uninterrupted: Uninterrupted
) -> None:
    first = bench.train(*RECIPE, "--tags", "red", "blue")
    killed_after("epoch 2/12", first)
    assert statuses(bench.server) == {"in_progress"}
    hyperparameters = deepcopy(bench.server.tasks[first.task]["hyperparams"])
    path = machine.outputs("checkpoint.pt").relative_to(machine.home)
    second = bench.begin("--resume")
    second.wait_for("resumed after")
    assert bench.server.tasks[first.task]["hyperparams"] == hyperparameters
    killed_after("epoch 7/12", second)
    assert re.search(f"resumed after epoch [2-6] from {path}", second.stdout)
    third = bench.begin("--resume", path)
    bench.ends(third)

    assert list(bench.server.tasks) == [first.task]
    assert statuses(bench.server) == {"completed"}
    assert is_the_same(machine.outputs("model.pt"), uninterrupted)
    assert alike(stored_curves(bench.server, first.task), uninterrupted.curves)
    assert len(machine.read_task(first.task)["models"]) == 1
    assert bench.server.tasks[first.task]["hyperparams"] == hyperparameters


def is_the_same(model: Path, uninterrupted: Uninterrupted) -> bool:
    """To the last bit."""
    weights, expected = read(model), read(uninterrupted.folder / "model.pt")
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_resume_offline_goes_on_in_a_new_session_that_begins_there(
    begin: Begin, machine: Machine, uninterrupted: Uninterrupted
) -> None:
    killed_after("epoch 3/12", begin(*FEW, *RECIPE))
    second = begin("--resume")
    assert second.end() == 0, second.everything
    found = re.search(r"resumed after epoch (\d+) from \S+, in a new session, which begins there", second.stdout)
    assert found, second.everything
    assert is_the_same(machine.outputs("model.pt"), uninterrupted)
    _, events, _ = read_session(machine.home / f".clearml/cache/offline/{second.task}.zip")
    assert {step for points in curves_in(events).values() for step in points} == {*range(3 * int(found[1]) + 1, 37)}


@row("the run for `--resume`", 2)
def test_what_is_finished_is_not_resumed_and_not_touched(
    bench: Bench, machine: Machine, uninterrupted: Uninterrupted
) -> None:
    """By the checkpoint that is gone, or by the task, which somebody may have completed or published."""
    first = bench.train("--epochs", 1)
    assert first.end() == 0, first.everything
    model = machine.outputs("model.pt").relative_to(machine.home)
    torch.save(read(uninterrupted.folder / "saved.pt") | {"task": first.task}, machine.home / "left.pt")
    for status, file, words in (
        ("completed", model.with_name("checkpoint.pt"), f"its checkpoint was removed; its model: {model}"),
        ("published", "left.pt", f"cannot resume: the task {first.task} is published"),
    ):
        bench.server.tasks[first.task]["status"] = status
        before = deepcopy((bench.server.tasks, bench.server.models))
        again = bench.begin("--resume", file)
        bench.ends(again)
        assert again.line.endswith(words)  # and it does not advise itself
        assert (bench.server.tasks, bench.server.models) == before


# --- what the server or a store refuses -------------------------------------------------------------------------------
@row("the picture or the predictions", 1, "AccessDenied", DOCTOR, status="failed")
def test_an_upload_in_the_background_that_fails_is_heard(bench: Bench, machine: Machine, tmp_path: Path) -> None:
    """The SDK only logs it, and goes on."""
    with Rclone(tmp_path / "store") as store, Front(store, r"^0 PUT \S*predictions", "AccessDenied") as front:
        uri = f"s3://{front.host}/{store.bucket}"
        machine.configure(bench.server.configuration(), store.clearml_conf(host=front.host))
        run = bench.train("--epochs", 1, "--output-uri", uri)
        bench.ends(run)
        assert named_checkpoint(run, machine)["epoch"] == 1
        assert [key for key in store.keys() if key.endswith("/model.pt")]


# --- disks ------------------------------------------------------------------------------------------------------------
def mount(*arguments: object) -> None:
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    done = subprocess.run([*root, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system (Linux, root or sudo): {done.stderr.strip()}")


@pytest.fixture
def small_disk(machine: Machine) -> Iterator[Callable[[int], Path]]:
    """Makes `outputs` a file system of so many bytes."""
    folder = machine.home / "outputs"
    folder.mkdir()

    def make(size: int) -> Path:
        mount("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        return folder

    yield make
    if folder.is_mount():
        mount("umount", "--lazy", folder)


def pages(*files: Path) -> int:
    """The bytes that files take on a tmpfs, with a little more for folders and for growth."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files) + 16384


@row("the disk is full", 1, "cannot write ", ": No space left on device", status="failed")
@pytest.mark.parametrize("full_at", ["checkpoint.pt", "mistakes.png"])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint_whole(
    bench: Bench, machine: Machine, uninterrupted: Uninterrupted, small_disk: Callable[[int], Path], full_at: str
) -> None:
    fits = ["saved.pt", "model.pt"] if full_at == "mistakes.png" else ["saved.pt"]
    small_disk(pages(*(uninterrupted.folder / name for name in fits)))
    run = bench.train("--epochs", 2 if full_at == "checkpoint.pt" else 1)
    bench.ends(run)
    if full_at == "mistakes.png":  # for which the library that writes it names no file
        assert is_whole(machine.outputs("model.pt"))
    else:
        assert re.search(rf"cannot write outputs/{run.task}/{full_at}: No space", run.line), run.line
    assert named_checkpoint(run, machine)["epoch"] == 1
    assert not list(machine.home.glob("outputs/*/*.part"))


@row("the disk is full", 1, "error: cannot write ", ": Read-only file system", status="failed")
def test_a_disk_that_becomes_read_only(bench: Bench, machine: Machine, small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(10_000_000)
    run = bench.train("--epochs", LONG)
    run.wait_for("epoch 1/")
    while True:  # refused while a file is open for writing
        try:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True, capture_output=True)
            break
        except subprocess.CalledProcessError:
            time.sleep(0.02)
    bench.ends(run)
    assert named_checkpoint(run, machine)["epoch"] >= 1


@row("`--output-dir` cannot be made", 1, "Not a directory", "outputs/", status="failed")
def test_an_output_folder_that_cannot_be_made(bench: Bench, machine: Machine) -> None:
    (machine.home / "outputs").write_text("a file")
    bench.ends(bench.train("--epochs", 1))


# --- data -------------------------------------------------------------------------------------------------------------
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The folder of a user's own copy of the data; its --data-dir is two folders up."""
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copy(ROOT / f"data/MNIST/raw/{name}.gz", folder)
    return folder


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def exchange(path: Path) -> None:
    """Take the other set's file of this kind."""
    shutil.copy(path.with_name(re.sub("^(train|t10k)", "t10k" if "train" in path.name else "train", path.name)), path)


def bend(path: Path) -> None:
    """Change one byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-images-idx3-ubyte", cut),
        ("train-labels-idx1-ubyte", bend),
        ("t10k-labels-idx1-ubyte", exchange),
    ],
)
def test_a_damaged_data_file_is_named_and_reading_writes_nothing(
    raw: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(raw / f"{name}.gz")
    with pytest.raises(SystemExit, match=rf"no MNIST in {raw}: .*{name}\.gz"):
        pytorch_mnist.load_mnist(raw.parent.parent, name.partition("-")[0])
    assert {path.name for path in raw.iterdir()} == {f"{name}.gz" for name in MNIST_FILES}


@row("a data file is damaged", 1, "train-images-idx3-ubyte.gz", status="failed")
def test_the_run_ends_at_a_damaged_data_file(bench: Bench, raw: Path) -> None:
    bend(raw / "train-images-idx3-ubyte.gz")
    bench.ends(bench.begin("--dry-run", "--data-dir", raw.parent.parent))


@pytest.mark.waits
@row("the data folder is empty", 1, "no MNIST in {folder}", ".gz", f"see {ROOT}/data", within=60)
def test_without_data_and_mirror_it_says_how_to_get_the_files(bench: Bench, tmp_path: Path) -> None:
    with silent() as host:
        for name, proxy in (("refused", f"127.0.0.1:{free_port()}"), ("unanswered", host)):
            way_out = dict.fromkeys(PROXIES, f"http://{proxy}")
            run = bench.begin("--offline", "--data-dir", tmp_path / name, **way_out, no_proxy="", NO_PROXY="")
            bench.ends(run, folder=tmp_path / name)


# --- checkpoints from elsewhere ---------------------------------------------------------------------------------------
class Malice:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


def save_cut(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    cut(path)


BAD_CHECKPOINTS: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    "No such file": lambda path, _: None,
    "RuntimeError": save_cut,
    "UnpicklingError": lambda path, _: path.write_text("Hello, world!"),
    "KeyError": lambda path, good: torch.save(good["states"]["net"], path),
    "weights_only": lambda path, _: torch.save({"net": Malice(path.with_name("executed"))}, path),
}


@row("the file for `--resume` is damaged", 1, "cannot resume from {path}", "size mismatch")
def test_the_run_ends_at_a_checkpoint_of_another_network(
    bench: Bench, machine: Machine, uninterrupted: Uninterrupted
) -> None:
    path, good = machine.home / "checkpoint.pt", read(uninterrupted.folder / "saved.pt")
    name, weight = next(iter(good["states"]["net"].items()))
    good["states"]["net"][name] = torch.zeros(*weight.shape, 9)
    torch.save(good | {"task": ""}, path)
    run = bench.begin("--resume", path)
    bench.ends(run, path=path)
    assert run.stderr.splitlines() == [run.line]


@row("`--resume` comes with another", 2)
@row("the device is not there", 2)
@row("a name has slashes", 2)
def test_what_is_refused_before_anything_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """In this process: it is the start of one that takes seconds."""
    good = uninterrupted.folder / "saved.pt"
    few, many = "has three characters or more", "has at most 220 characters"
    rows: list[tuple[int, Sequence[object], str]] = [
        (2, ["--resume", "--output-dir", tmp_path / "none"], "no checkpoint below"),
        (2, ["--resume", good, "--epochs", 9], "--resume: --epochs was 12, and cannot change now"),
        (2, ["--device", "cuda:99"], "no device 'cuda:99' on this machine"),
        *((2, ["--project-name", text], few) for text in ("   ", "a/../b", '"quoted"')),
        *((2, ["--task-name", text], many) for text in ("n" * 221, "🚀" * 19)),
    ]
    for words, make in BAD_CHECKPOINTS.items():
        path = tmp_path / words / "checkpoint.pt"
        path.parent.mkdir()
        make(path, read(good))
        rows.append((1, ["--resume", path], f"error: cannot resume from {path}: .*{words}"))
    for code, arguments, words in rows:
        monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            checkpoint.parse_args(pytorch_mnist.make_parser())
        assert re.search(words, capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.rglob("executed"))


# --- the loss ---------------------------------------------------------------------------------------------------------
@row("the loss becomes NaN", 1, "--lr", status="failed")
def test_a_loss_that_is_no_number_ends_the_run_in_that_epoch(bench: Bench, machine: Machine) -> None:
    run = bench.train("--epochs", 100, "--lr", 1000, "--weight-decay", 0.1)  # the weights grow until they overflow
    bench.ends(run)
    found = re.search(r"the loss is (?:nan|inf) in epoch (\d+)", run.line)
    assert found, run.line
    last = int(found[1])
    assert last > 1, "diverged too early for this test"
    saved = named_checkpoint(run, machine)
    assert saved["epoch"] == last - 1
    assert all(math.isfinite(weight.sum()) for weight in saved["states"]["net"].values())


# --- devices ----------------------------------------------------------------------------------------------------------
@row("the device is not there", 1, "out of memory", status="failed")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory it fills")
def test_a_gpu_without_memory_ends_in_one_line(bench: Bench) -> None:
    rest = torch.cuda.mem_get_info()[0] - 700 * 2**20  # enough for the context
    filler = torch.empty(rest, dtype=torch.uint8, device="cuda")
    run = bench.begin("--device", "cuda", "--batch-size", 60_000, "--epochs", 1)
    bench.ends(run)
    del filler


# --- names ------------------------------------------------------------------------------------------------------------
NAMES = [("group/sub group/project", "it's [run/1 of/2] (clone)"), ("p" * 220, "🚀" * 18), ("Übung 50%", "№ 1? 🚀 #2")]


@row("a name has slashes", 0)
@pytest.mark.parametrize("where", ["file server", "S3"])
def test_any_name_works(bench: Bench, machine: Machine, tmp_path: Path, where: str) -> None:
    """Model, picture and predictions lie where the SDK puts them: in a folder that has the task's id."""
    with Rclone(tmp_path / "rclone") as rclone:
        machine.configure(bench.server.configuration(), rclone.clearml_conf())
        uri = rclone.uri("names") if where == "S3" else ""
        for project, name in NAMES:
            names = ["--project-name", project, "--task-name", name]
            bench.ends(bench.train("--dry-run", "--batch-size", 100, *names, "--output-uri", uri))
        stored = [*rclone.keys(), *(str(path) for path in bench.server.files_folder.rglob("*.*"))]
    for (task, record), (project, name) in zip(bench.server.tasks.items(), NAMES, strict=True):
        assert (record["status"], record["name"]) == ("completed", name)
        assert bench.server.projects[record["project"]]["name"] == project
        assert sorted(Path(path).suffix for path in stored if f".{task}/" in path) == [".csv", ".png", ".pt"]


# --- other programs ---------------------------------------------------------------------------------------------------
@row("the output is cut", 0)
def test_a_reader_that_leaves_early_costs_nothing(bench: Bench, machine: Machine) -> None:
    reader, writer = os.pipe()
    run = machine.start("pytorch_mnist.py", *FEW, "--epochs", 1, stdout=writer)
    os.close(writer)
    with open(reader) as output:
        assert output.readline()
    assert (run.end(), run.stderr) == (0, "")
    assert is_whole(machine.outputs("model.pt"))
    assert statuses(bench.server) == {"completed"}


@row("two runs start at once", 0, status="completed")
def test_two_runs_at_once_with_the_same_names_are_both_whole(bench: Bench, machine: Machine, tmp_path: Path) -> None:
    both = [bench.train("--epochs", 1, "--seed", seed, "--output-uri", tmp_path / "storage") for seed in (1, 2)]
    for run in both:
        bench.ends(run)
    models = {model["task"]: model["uri"] for model in bench.server.models.values()}
    for run in both:
        content = machine.home.joinpath("outputs", run.task, "model.pt").read_bytes()
        assert models[run.task] == stored_at(run)
        assert Path(stored_at(run).removeprefix("file://")).read_bytes() == content
        assert [*stored_curves(bench.server, run.task)["loss", "train batch"]] == [1, 2, 3]
    assert len(models) == len(list(machine.home.glob("outputs/*"))) == 2
