"""Every way in which a run can end early, provoked for real: what is said, in what time, and what is kept.

The faults are sockets, signals, full file systems and servers that die. The training set is a tenth of MNIST, cut
from the real files, so that an epoch takes less than a second. Storage faults are in test_storage.py.
"""

from __future__ import annotations

import fcntl
import gzip
import itertools
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import clearml_server
import pytest
import torch
from clearml_server import ApiError, ClearMLServer
from conftest import MNIST_FILES, ROOT, Begin, Machine, Run, silent
from reading import alike, curves_of, read, read_session, stored_curves
from stores import Rclone, free_port

import pytorch_mnist
from clearml_client import checkpoint
from clearml_client.faults import RunError

LONG = 10_000  # epochs that no test waits for
BUSY = 15  # seconds that a machine with other work may lose; a run's start alone takes 4 when idle


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


@pytest.fixture
def online(machine: Machine, server: ClearMLServer) -> ClearMLServer:
    """The server, in the machine's clearml.conf."""
    machine.configure(server.configuration())
    return server


class Finished(NamedTuple):
    folder: Path
    curves: dict[tuple[str, str], dict[int, float]]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return read(self.folder / "model.pt")


@pytest.fixture(scope="module")
def uninterrupted(module_machine: Machine, few: list[object]) -> Finished:
    """Six epochs that nothing disturbed."""
    run = module_machine.train(*few, "--epochs", 6)
    assert run.returncode == 0, run.stdout + run.stderr
    folder = module_machine.outputs("model.pt").parent
    return Finished(folder, curves_of(folder / "checkpoint.pt"))


def named_checkpoint(run: Run, machine: Machine) -> dict[str, Any]:
    """The checkpoint that the last line names, which must be whole; together with its path."""
    found = re.search(r"--resume (.*?)(;|$)", run.line)
    assert found, run.everything
    (path,) = shlex.split(found[1])
    return checkpoint.load(machine.home / path, pytorch_mnist.Net())


def statuses(server: ClearMLServer) -> list[str]:
    return [task["status"] for task in server.tasks.values()]


# --- 1-5: server and configuration -----------------------------------------------------------------------------------
@contextmanager
def silent_server() -> Iterator[str]:
    with silent() as host:
        yield f"http://{host}"


@contextmanager
def nobody() -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


@contextmanager
def no_such_name() -> Iterator[str]:
    yield "http://clearml.invalid:8008"


@pytest.mark.parametrize(("where", "seconds"), [(nobody, 15), (no_such_name, 15), (silent_server, 30)])
def test_a_server_that_does_not_answer_is_named_soon(
    begin: Begin, machine: Machine, server: ClearMLServer, where: Callable[[], Any], seconds: float
) -> None:
    with where() as url:
        machine.configure(server.configuration().replace(server.api_url, url))
        run = begin("--dry-run")
        assert run.end(seconds + BUSY) == 1
    for words in (f"no answer from the ClearML API server {url}", "--offline", "clearml_client.doctor"):
        assert words in run.line
    assert run.stderr.splitlines() == [run.line]
    assert not list(machine.home.glob("outputs/*"))


def test_the_web_ui_at_the_api_servers_address_is_named_as_such(
    begin: Begin, machine: Machine, server: ClearMLServer
) -> None:
    machine.configure(server.configuration().replace(server.api_url, server.web_url))
    run = begin("--dry-run")
    assert run.end(15 + BUSY) == 1
    assert f"no ClearML API server at {server.web_url}" in run.line
    assert "clearml_client.doctor" in run.line
    assert run.stderr.splitlines() == [run.line]


def test_each_key_comes_with_its_own_origin(begin: Begin, machine: Machine, server: ClearMLServer) -> None:
    machine.configure(server.configuration())
    run = begin("--dry-run", CLEARML_API_SECRET_KEY="mistyped")
    assert run.end() == 1
    origins = "api.credentials.access_key, ~/clearml.conf; CLEARML_API_SECRET_KEY, environment"
    assert f"(credentials: {origins}; new ones: " in run.line


@pytest.mark.parametrize("wrong", ["secret", "both in the environment"])
def test_wrong_keys_come_with_their_origin_and_where_to_make_new_ones(
    begin: Begin, machine: Machine, server: ClearMLServer, wrong: str
) -> None:
    machine.configure(server.configuration().replace(f"stand-in-{wrong}-key", "mistyped"))
    keys = {"CLEARML_API_ACCESS_KEY": "old", "CLEARML_API_SECRET_KEY": "older"}
    run = begin("--dry-run", **(keys if wrong.startswith("both") else {}))
    assert run.end(15 + BUSY) == 1
    origin = "CLEARML_API_ACCESS_KEY, environment" if wrong.startswith("both") else "~/clearml.conf"
    for words in ("credentials", origin, f"{server.web_url}/settings/workspace-configuration"):
        assert words in run.line
    assert run.stderr.splitlines() == [run.line]
    assert not server.tasks


@pytest.mark.parametrize(
    ("file", "content", "variables", "words"),
    [
        ("clearml.conf", lambda text: f"{text}\n}} api {{ [", {}, ("~/clearml.conf, line ",)),
        ("clearml.conf", lambda text: text, {"CLEARML_CONFIG_FILE": "~/other.conf"}, ("~/other.conf", "no such file")),
        (".clearml.conf", lambda text: text, {}, ("~/.clearml.conf", "~/clearml.conf")),
        ("clearml.conf", lambda text: text.replace("secret_key", "sekret"), {}, ("api.credentials.secret_key",)),
    ],
    ids=["syntax error", "missing file", "hidden file", "half a configuration"],
)
def test_a_wrong_configuration_is_an_error_and_no_reason_to_run_offline(
    begin: Begin,
    machine: Machine,
    server: ClearMLServer,
    file: str,
    content: Callable[[str], str],
    variables: dict[str, str],
    words: tuple[str, ...],
) -> None:
    (machine.home / file).write_text(content(server.configuration()))
    run = begin("--dry-run", **variables)
    assert run.end(15 + BUSY) == 1
    assert all(word in run.line.replace(str(machine.home), "~") for word in words), run.line
    assert run.stderr.splitlines() == [run.line]
    assert "offline session" not in run.stdout
    assert not server.tasks


# --- 8: the server dies ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def deserted(live: bool, few: list[object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Run]]:
    """A run whose server died in its first epoch, begun early: it takes two minutes, in which it does nothing."""
    if live:
        pytest.skip("stops the server")
    folder = tmp_path_factory.mktemp("deserted")
    server, machine = ClearMLServer(folder / "clearml-server"), Machine(folder / "home")
    machine.home.mkdir()
    server.start()
    machine.configure(server.configuration())
    arguments = [*few, "--epochs", 4, "--output-uri", folder]
    run = Run(machine.start("pytorch_mnist.py", *arguments, start_new_session=True))
    run.wait_for("epoch 1/4")
    server.stop()
    run.wait_for("epoch 4/4")
    run.begun = time.monotonic()
    yield machine, run
    run.process.kill()
    run.end()


def test_a_server_that_comes_back_has_everything(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], deserted: object
) -> None:
    run = begin(*few, "--epochs", 6)
    run.wait_for("epoch 2/6")
    online.stop()
    time.sleep(20)
    online.start()
    assert run.end(180) == 0, run.everything
    assert "Traceback" not in run.stdout + run.stderr
    assert alike(stored_curves(online, run.task), curves_of(machine.outputs("checkpoint.pt")))
    task = machine.read_task(run.task)
    assert task["status"] == "completed"
    for epoch in range(1, 7):
        assert task["console"].count(f"epoch {epoch}/6 ") == 1
    assert {"confusion matrix", "per digit"} <= task["plots"].keys()
    assert {"final accuracy", "final loss", "seconds"} <= task["single"].keys()
    assert len(task["samples"]) == 1
    assert "predictions" in task["artifacts"]
    (model,) = task["models"]
    assert Path(model["file"]).read_bytes() == machine.outputs("model.pt").read_bytes()


def test_a_server_that_dies_and_stays_away_costs_two_minutes_and_no_model(deserted: tuple[Machine, Run]) -> None:
    machine, run = deserted
    assert run.end(max(1, run.begun + 120 - time.monotonic())) == 1
    assert re.search("did not reach", run.line), run.line
    model = machine.outputs("model.pt")
    assert str(model.relative_to(machine.home)) in run.line
    assert read(model).keys() == pytorch_mnist.Net().state_dict().keys()
    assert named_checkpoint(run, machine)["epoch"] == 4


# --- 9-11: signals and the web UI ------------------------------------------------------------------------------------
@pytest.mark.parametrize("moment", ["created new task", "Storage: ", "epoch 2/"])
def test_sigterm_stops_the_task_and_names_the_checkpoint(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], moment: str
) -> None:
    run = begin(*few, "--epochs", LONG)
    run.wait_for(moment)
    run.signal(signal.SIGTERM)
    assert run.end(10) == 143, run.everything
    assert statuses(online) == ["stopped"]
    assert "terminated" in run.line
    if moment == "epoch 2/":
        assert named_checkpoint(run, machine)["epoch"] >= 2


def test_sigterm_during_the_upload(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], tmp_path: Path
) -> None:
    with Rclone(tmp_path / "rclone") as store:
        machine.configure(online.configuration(), store.clearml_conf())
        run = begin(*few, "--epochs", 2, "--output-uri", store.uri())
        run.wait_for("epoch 1/2")
        store.stop()
        with socket.create_server(("127.0.0.1", store.port)) as listener:  # the upload waits for its answer
            listener.settimeout(90)
            upload, _ = listener.accept()
            time.sleep(0.5)
            run.signal(signal.SIGTERM)
            code = run.end(10)
            upload.close()
    assert code == 143, run.everything
    assert statuses(online) == ["stopped"]
    assert named_checkpoint(run, machine)["epoch"] == 2
    assert read(machine.outputs("model.pt")).keys() == pytorch_mnist.Net().state_dict().keys()


@pytest.mark.parametrize(("moment", "times"), [("created new task", 3), ("epoch 2/", 1), ("epoch 2/", 3)])
def test_ctrl_c_stops_the_task_and_names_the_checkpoint(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], moment: str, times: int
) -> None:
    run = begin(*few, "--epochs", LONG)
    run.wait_for(moment)
    for press in range(times):
        time.sleep(0.3 if press else 0)
        if run.process.poll() is None:
            run.signal(signal.SIGINT)
    assert run.end(10) == 130, run.everything
    assert statuses(online) == ["stopped"]
    assert "interrupted" in run.line
    if moment == "epoch 2/":
        assert named_checkpoint(run, machine)["epoch"] >= 2


def test_abort_in_the_web_ui_ends_the_training(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object]
) -> None:
    run = begin(*few, "--epochs", LONG)
    run.wait_for("epoch 2/")
    online.abort(run.task)
    assert run.end(2 + 10) == 143, run.everything  # the SDK asks every 2 s
    assert statuses(online) == ["stopped"]
    assert "aborted in the web UI" in run.line
    assert named_checkpoint(run, machine)["epoch"] >= 2


# --- 12: kill -9 and --resume ----------------------------------------------------------------------------------------
def test_resume_after_kill_9_is_as_if_nothing_had_happened(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], uninterrupted: Finished
) -> None:
    first = begin(*few, "--epochs", 6)
    first.wait_for("epoch 2/6")
    first.signal(signal.SIGKILL)
    first.end()
    assert statuses(online) == ["in_progress"]
    path = machine.outputs("checkpoint.pt").relative_to(machine.home)

    second = begin("--resume")
    second.wait_for("epoch 4/6")
    second.signal(signal.SIGKILL)
    second.end()
    assert f"resumed after epoch {2} from {path}" in second.stdout or "resumed after epoch 3" in second.stdout

    third = begin("--resume", path)
    assert third.end() == 0, third.everything
    assert list(online.tasks) == [first.task]
    assert statuses(online) == ["completed"]
    assert machine.outputs("model.pt").parent == machine.home / path.parent
    weights = read(machine.outputs("model.pt"))
    assert weights.keys() == uninterrupted.weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in uninterrupted.weights.items())
    assert alike(curves_of(machine.home / path), uninterrupted.curves)
    assert alike(stored_curves(online, first.task), uninterrupted.curves)
    task = machine.read_task(first.task)  # what the web UI shows
    for (title, series), points in uninterrupted.curves.items():
        assert task["scalars"][title][series]["x"] == sorted(points)
    assert len(task["models"]) == 1
    assert (task["parameters"]["Args/epochs"], task["parameters"]["Args/batch_size"]) == ("6", "2000")


def test_resume_offline_goes_on_in_a_new_session_that_has_the_whole_run(
    begin: Begin, machine: Machine, few: list[object], uninterrupted: Finished
) -> None:
    first = begin(*few, "--epochs", 6)
    first.wait_for("epoch 3/6")
    first.signal(signal.SIGKILL)
    first.end()
    second = begin("--resume")
    assert second.end() == 0, second.everything
    assert "new session" in second.stdout  # which the SDK cannot avoid
    weights = read(machine.outputs("model.pt"))
    assert all(torch.equal(weights[name], weight) for name, weight in uninterrupted.weights.items())
    _, events, _ = read_session(machine.home / f".clearml/cache/offline/{second.task}.zip")
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for event in events:
        if event.get("type") == "training_stats_scalar" and event["iter"] >= 0 and ":monitor:" not in event["metric"]:
            points = curves.setdefault((event["metric"], event["variant"]), {})
            assert event["iter"] not in points
            points[event["iter"]] = event["value"]
    assert alike(curves, uninterrupted.curves)


def test_resume_with_another_training_is_refused(begin: Begin, online: ClearMLServer, uninterrupted: Finished) -> None:
    run = begin("--resume", uninterrupted.folder / "checkpoint.pt", "--epochs", 9)
    assert run.end() == 2, run.everything
    assert "argument --resume: --epochs" in run.line
    assert not online.tasks


def test_resume_leaves_the_hyperparameters_as_they_are(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object]
) -> None:
    options = ["--project-name", "a project", "--lr", 0.1, "--device", "cpu", "--tags", "red", "blue"]
    first = begin(*few, *options, "--epochs", 4, "--output-uri", machine.home / "store")
    first.wait_for("epoch 2/4")
    first.signal(signal.SIGKILL)
    first.end()
    before = machine.read_task(first.task)["parameters"]
    second = begin("--resume")
    second.wait_for("resumed after")
    during = machine.read_task(first.task)["parameters"]
    assert second.end() == 0, second.everything
    after = machine.read_task(first.task)["parameters"]
    assert before == during == after
    assert (before["Args/lr"], before["Args/epochs"], before["Args/tags"]) == ("0.1", "4", "['red', 'blue']")
    assert not [name for name, value in before.items() if "[" in value and name != "Args/tags"]
    (machine.home / "clone.py").write_text("import sys; from clearml import Task; print(Task.clone(sys.argv[1]).id)")
    clone = machine.run(machine.home / "clone.py", first.task).stdout.split()[-1]
    run = Machine(machine.home, {"CLEARML_TASK_ID": clone}).run("pytorch_mnist.py", *few[:2], "--output-dir", "clone")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "epoch 4/4" in run.stdout


def test_a_finished_run_is_not_resumed(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object]
) -> None:
    first = begin(*few, "--epochs", 1)
    assert first.end() == 0, first.everything
    tasks, models = deepcopy(online.tasks), deepcopy(online.models)
    second = begin("--resume")
    assert second.end() == 2, second.everything
    (model,) = models.values()
    assert f"this run is finished, its model: {model['uri']}" in second.line
    assert (online.tasks, online.models) == (tasks, models)


@pytest.mark.parametrize("status", ["published", "completed"])
def test_a_task_that_somebody_finished_is_not_touched(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], status: str
) -> None:
    first = begin(*few, "--epochs", LONG)
    first.wait_for("epoch 2/")
    first.signal(signal.SIGTERM)
    first.end()
    online.tasks[first.task]["status"] = status
    before = deepcopy(online.tasks)
    second = begin("--resume")
    assert second.end() == 2, second.everything
    assert f"cannot resume: the task {first.task} is {status}" in second.line
    assert online.tasks == before


def test_a_record_that_the_server_refuses_leaves_no_object(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After training: one line that says where the model is, and the store has nothing that no record knows."""

    def refuse(*_: object, **__: object) -> Any:
        raise ApiError("validation_error")

    store = machine.home / "store"
    with monkeypatch.context() as patch:
        patch.setitem(clearml_server.HANDLERS, "models.create", (refuse, "1.0"))
        run = begin(*few, "--epochs", 1, "--output-uri", store)
        assert run.end() == 1, run.everything
    model = machine.outputs("model.pt")
    assert f"the model is in {model.relative_to(machine.home)}, but not at file://{store}" in run.line
    assert "the ClearML server refused" in run.line
    assert statuses(online) == ["failed"]
    assert not [path for path in store.rglob("*") if path.is_file()]
    second = begin("--resume")
    assert second.end() == 0, second.everything
    assert "epoch 1/" not in second.stdout
    (entry,) = online.models.values()
    assert Path(entry["uri"].removeprefix("file://")).read_bytes() == model.read_bytes()


def test_resume_without_a_checkpoint_says_so(begin: Begin, machine: Machine) -> None:
    run = begin("--resume")
    assert run.end() == 2, run.everything
    assert "no checkpoint below outputs" in run.line
    assert not list(machine.home.iterdir())


# --- 13: disks -------------------------------------------------------------------------------------------------------
def mount(*arguments: object) -> None:
    if sys.platform != "linux":
        pytest.skip("needs Linux: mounts a small file system")
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    done = subprocess.run([*root, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs root or sudo to mount a file system: {done.stderr.strip()}")


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


@pytest.mark.parametrize("full_at", ["checkpoint.pt", "model.pt", "mistakes.png"])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint_whole(
    begin: Begin,
    machine: Machine,
    online: ClearMLServer,
    few: list[object],
    uninterrupted: Finished,
    small_disk: Callable[[int], Path],
    full_at: str,
) -> None:
    names = ["checkpoint.pt", "model.pt", "mistakes.png"]
    fits = names[: max(1, names.index(full_at))]
    small_disk(pages(*(uninterrupted.folder / name for name in fits)))
    run = begin(*few, "--epochs", 2 if full_at == "checkpoint.pt" else 1)
    assert run.end() == 1, run.everything
    path = full_at if full_at in ("checkpoint.pt", "model.pt") else ""
    assert re.search(rf"error: cannot write .*outputs/\S*{path}: No space left on device", run.line), run.line
    assert statuses(online) == ["failed"]
    assert named_checkpoint(run, machine)["epoch"] == 1
    if fits[1:]:
        assert read(machine.outputs("model.pt")).keys() == pytorch_mnist.Net().state_dict().keys()
    assert not list(machine.home.glob("outputs/*/*.part"))


def test_a_disk_that_becomes_read_only(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], small_disk: Callable[[int], Path]
) -> None:
    folder = small_disk(10_000_000)
    run = begin(*few, "--epochs", LONG)
    run.wait_for("epoch 1/")
    while True:  # refused while a file is open for writing
        try:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True, capture_output=True)
            break
        except subprocess.CalledProcessError:
            time.sleep(0.02)
    assert run.end() == 1, run.everything
    assert "checkpoint.pt" in run.line
    assert "Read-only file system" in run.line
    assert statuses(online) == ["failed"]
    assert named_checkpoint(run, machine)["epoch"] >= 1


def test_an_output_folder_that_cannot_be_made(begin: Begin, machine: Machine, online: ClearMLServer) -> None:
    (machine.home / "outputs").write_text("a file")
    run = begin("--dry-run")
    assert run.end() == 1, run.everything
    assert "outputs" in run.line
    assert re.search("Not a directory|File exists", run.line)
    assert statuses(online) in ([], ["failed"])


# --- 14, 15: data ----------------------------------------------------------------------------------------------------
@pytest.fixture
def no_network(machine: Machine) -> Machine:
    """A machine whose way out is a proxy that is not there."""
    proxy = f"http://127.0.0.1:{free_port()}"
    names = ("http_proxy", "https_proxy", "all_proxy")
    machine.variables |= dict.fromkeys((*names, *map(str.upper, names)), proxy)
    machine.variables |= {"no_proxy": "", "NO_PROXY": ""}
    return machine


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """The folder of a user's own copy of the data, packed files only; its --data-dir is two folders up."""
    folder = tmp_path / "data/MNIST/raw"
    folder.mkdir(parents=True)
    for name in MNIST_FILES:
        shutil.copy(ROOT / f"data/MNIST/raw/{name}.gz", folder)
    return folder


def unpack(raw: Path) -> None:
    for name in MNIST_FILES:
        (raw / name).write_bytes(gzip.decompress((raw / f"{name}.gz").read_bytes()))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def exchange(path: Path) -> None:
    """The same kind of file from elsewhere: labels of the test set, say, in place of those of the training set."""
    other = {"t": "t10k", "1": "train"}["1" if "t10k" in path.name else "t"]
    shutil.copy(path.with_name(re.sub("^(train|t10k)", other, path.name)), path)


def bend(path: Path) -> None:
    """One byte in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-labels-idx1-ubyte", cut),
        ("t10k-images-idx3-ubyte", exchange),
        ("train-images-idx3-ubyte.gz", cut),
        ("train-images-idx3-ubyte.gz", bend),
        ("t10k-labels-idx1-ubyte.gz", exchange),
    ],
)
def test_a_damaged_data_file_is_named(
    begin: Begin, no_network: Machine, raw: Path, name: str, damage: Callable[[Path], None]
) -> None:
    if not name.endswith(".gz"):
        unpack(raw)
        for packed in raw.glob("*.gz"):
            packed.unlink()
    damage(raw / name)
    run = begin("--dry-run", "--data-dir", raw.parent.parent)
    assert run.end(60 + BUSY) == 1, run.everything
    assert name.removesuffix(".gz") in run.line


def test_reading_the_data_writes_nothing_and_waits_for_nobody(begin: Begin, no_network: Machine, raw: Path) -> None:
    unpack(raw)
    cut(raw / "train-images-idx3-ubyte")  # of no account beside its .gz
    data = raw.parent.parent
    (data / ".lock").touch()
    with open(data / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
        run = begin("--dry-run", "--data-dir", data)
        assert run.end() == 0, run.everything
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


def test_without_data_and_mirror_it_says_how_to_get_the_files(
    begin: Begin, no_network: Machine, tmp_path: Path
) -> None:
    with silent_server() as proxy:
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        refused = begin("--dry-run", "--data-dir", tmp_path / "refused")
        unanswered = begin("--dry-run", "--data-dir", tmp_path / "unanswered", **dict.fromkeys(names, proxy))
        for run, folder in ((refused, "refused"), (unanswered, "unanswered")):
            assert run.end(60) == 1, run.everything
            for words in (str(tmp_path / folder), ".gz", str(ROOT / "data/MNIST/raw")):
                assert words in run.line


# --- 16: checkpoints from elsewhere ----------------------------------------------------------------------------------
class Malice:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


BAD_CHECKPOINTS: dict[str, tuple[str, Callable[[Path, Finished], object]]] = {
    "missing": ("No such file", lambda path, _: None),
    "a folder": ("Is a directory", lambda path, _: path.mkdir()),
    "empty": ("", lambda path, _: path.touch()),
    "truncated": ("", lambda path, good: path.write_bytes((good.folder / "checkpoint.pt").read_bytes()[:100_000])),
    "no checkpoint": ("", lambda path, _: path.write_text("Hello, world!")),
    "of another network": (
        "size mismatch",
        lambda path, good: torch.save(
            read(good.folder / "checkpoint.pt") | {"net": {**good.weights, "9.weight": torch.zeros(9, 9)}}, path
        ),
    ),
    "of another program": ("not a checkpoint", lambda path, good: torch.save({"net": good.weights}, path)),
    "a model": ("not a checkpoint", lambda path, good: shutil.copy(good.folder / "model.pt", path)),
    "malicious": ("weights_only", lambda path, _: torch.save({"net": Malice(path.with_name("executed"))}, path)),
    "a malicious pickle": (
        "",
        lambda path, _: path.write_bytes(pickle.dumps({"net": Malice(path.with_name("executed"))}, 2)),
    ),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_checkpoint_that_is_none_is_refused_with_the_reason_and_not_executed(
    uninterrupted: Finished, tmp_path: Path, kind: str
) -> None:
    path, (words, make) = tmp_path / "checkpoint.pt", BAD_CHECKPOINTS[kind]
    make(path, uninterrupted)
    with pytest.raises(RunError, match=f"cannot resume from {path}.*{words}"):
        checkpoint.load(path, pytorch_mnist.Net())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["of another network", "malicious"])
def test_the_run_ends_at_a_checkpoint_that_is_none(
    begin: Begin, machine: Machine, online: ClearMLServer, uninterrupted: Finished, kind: str
) -> None:
    path, (words, make) = machine.home / "checkpoint.pt", BAD_CHECKPOINTS[kind]
    make(path, uninterrupted)
    run = begin("--resume", path)
    assert run.end() == 1, run.everything
    assert f"cannot resume from {path}" in run.line
    assert words in run.line
    assert run.stderr.splitlines() == [run.line]
    assert not path.with_name("executed").exists()
    assert not online.tasks


# --- 17: the loss ----------------------------------------------------------------------------------------------------
def test_a_loss_that_is_no_number_ends_the_run_in_that_epoch(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object]
) -> None:
    run = begin(*few, "--epochs", 100, "--lr", 1000, "--weight-decay", 0.1)  # the weights grow until they overflow
    assert run.end() == 1, run.everything
    found = re.search(r"the loss is (?:nan|inf) in epoch (\d+)", run.line)
    assert found, run.line
    assert "--lr" in run.line
    assert statuses(online) == ["failed"]
    last = int(found[1])
    assert last > 1, "diverged too early for this test"
    saved = named_checkpoint(run, machine)
    assert saved["epoch"] == last - 1
    assert all(math.isfinite(value) for _, _, value, _ in saved["points"])


# --- 18: devices -----------------------------------------------------------------------------------------------------
def test_a_device_that_is_not_there_is_refused(begin: Begin, machine: Machine, online: ClearMLServer) -> None:
    run = begin("--dry-run", "--device", "cuda:99")
    assert run.end() == 2, run.everything
    assert "no device 'cuda:99' on this machine" in run.line
    assert run.stderr.splitlines()[-1] == run.line
    assert not online.tasks
    assert not list(machine.home.glob("outputs/*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory it fills")
def test_a_gpu_without_memory_ends_in_one_line(begin: Begin, online: ClearMLServer) -> None:
    rest = torch.cuda.mem_get_info()[0] - 700 * 2**20  # enough for the context
    filler = torch.empty(rest, dtype=torch.uint8, device="cuda")
    run = begin("--device", "cuda", "--batch-size", 60_000, "--epochs", 1)
    assert run.end() == 1, run.everything
    del filler
    assert "out of memory" in run.line
    assert statuses(online) == ["failed"]


# --- 19: names -------------------------------------------------------------------------------------------------------
ODD = "Ziffern 🔢 50%", "Übung № 1? 🚀 #2"  # of which the file server has the artifacts in a folder of their own


@pytest.mark.parametrize(
    ("project", "name", "where", "folders"),
    [
        ("group/sub group/project", "run/1 of/2", "file server", 1),
        ("group/sub group/project", "run/1 of/2", "S3", 1),
        ("a group", "it's [second] (clone)", "file server", 1),
        (*ODD, "file server", 2),
        (*ODD, "folder", 1),
        (*ODD, "S3", 1),
        ("p" * 300, "t" * 300, "file server", 2),
        ("🔢" * 300, "🚀" * 300, "folder", 2),
    ],
    ids=lambda text: str(text)[:12],
)
def test_any_name_works_and_one_folder_has_all_of_the_run(
    begin: Begin,
    machine: Machine,
    online: ClearMLServer,
    rclone: Rclone,
    few: list[object],
    tmp_path: Path,
    project: str,
    name: str,
    where: str,
    folders: int,
) -> None:
    machine.configure(online.configuration(), rclone.clearml_conf())
    root = f"names/{tmp_path.name}"  # the store is other tests', too
    uri = {"file server": "", "folder": str(tmp_path / "storage"), "S3": rclone.uri(root)}[where]
    run = begin(*few, "--dry-run", "--project-name", project, "--task-name", name, "--output-uri", uri)
    assert run.end() == 0, run.everything
    assert "Traceback" not in run.stdout + run.stderr
    (task,) = online.tasks.values()
    assert (task["status"], task["name"]) == ("completed", name)
    assert online.projects[task["project"]]["name"] == project
    read_back = machine.read_task(task["id"])
    assert Path(read_back["models"][0]["file"]).read_bytes() == machine.outputs("model.pt").read_bytes()
    disk = online.files_folder if where == "file server" else tmp_path / "storage"
    stored = [key for key in rclone.keys() if root in key] if where == "S3" else map(str, disk.rglob("*.*"))
    files = [Path(path) for path in stored if Path(path).suffix in (".pt", ".png", ".csv")]
    assert len(files) == 3
    assert len({str(path).partition(task["id"])[0] for path in files}) == folders
    assert not [path for path in tmp_path.iterdir() if path.name not in ("home", "clearml-server", "storage")]


@pytest.mark.parametrize("name", ["ab", "   ", "..", '"quoted"'])
@pytest.mark.parametrize("option", ["--project-name", "--task-name"])
def test_a_name_that_clearml_cannot_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", option, name])
    with pytest.raises(SystemExit, match=r"^2$"):
        pytorch_mnist.parse_args()
    assert f"argument {option}: a name has three characters or more" in capsys.readouterr().err


# --- 20, 22: other programs ------------------------------------------------------------------------------------------
def test_a_reader_that_leaves_early_costs_nothing(machine: Machine, online: ClearMLServer, few: list[object]) -> None:
    script = [sys.executable, ROOT / "pytorch_mnist.py", *few, "--epochs", 2]
    command = f"{shlex.join(map(str, script))} | head -1; echo exit code ${{PIPESTATUS[0]}}"
    shell = ["bash", "-c", command]
    done = subprocess.run(shell, env=machine.environment, cwd=machine.home, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "exit code 0", done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "BrokenPipe" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert read(machine.outputs("model.pt")).keys() == pytorch_mnist.Net().state_dict().keys()
    assert statuses(online) == ["completed"]


def test_two_runs_at_once_with_the_same_names_are_both_whole(
    begin: Begin, machine: Machine, online: ClearMLServer, few: list[object], tmp_path: Path
) -> None:
    both = [begin(*few, "--epochs", 2, "--seed", seed, "--output-uri", tmp_path / "storage") for seed in (1, 2)]
    for run in both:
        assert run.end() == 0, run.everything
    assert statuses(online) == ["completed", "completed"]
    models = {model["task"]: model["uri"] for model in online.models.values()}
    assert len(models) == 2
    contents = set()
    for run in both:
        found = re.search(r"Model: (outputs/\S+)", run.stdout)
        assert found
        content = (machine.home / found[1]).read_bytes()
        stored = re.search(r"(?:Stored|Model): (\S*storage/\S+)", run.stdout)
        assert stored
        assert Path(stored[1].removeprefix("file://")).read_bytes() == content
        assert models[run.task].removeprefix("file://") == stored[1].removeprefix("file://")
        assert alike(stored_curves(online, run.task), curves_of((machine.home / found[1]).with_name("checkpoint.pt")))
        contents.add(content)
    assert len(contents) == 2
    folders = [path.name for path in machine.home.glob("outputs/*")]
    assert len(folders) == 2
    for run, folder in itertools.product(both, folders):
        assert (folder in run.stdout) == folder.endswith(run.task[-8:])
