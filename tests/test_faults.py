"""The table of docs/when-things-go-wrong.md: each way in which a run can fail, provoked for real.

What somebody does to a run while it goes on is in test_midrun.py, what the doctor says in test_doctor.py.
"""

from __future__ import annotations

import ast
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from clearml_server import ClearMLServer
from conftest import FEW, HANGS, ROOT, Begin, Machine, Run, copy_script, silent
from reading import EPOCH, alike, curves_in, evaluate, read, read_session, stored_curves
from stores import CHECKSUM, FakeGCS, Front, Plug, Rclone, S3Store, SeaweedFS, Store

import pytorch_mnist
from clearml_client import checkpoint

LONG = 10_000  # epochs that no test waits for
DOCTOR = "-m clearml_client.doctor"
STATUS = {0: "completed", 1: "failed", 130: "stopped", 143: "stopped"}  # of the task, by exit code


# --- the page ---------------------------------------------------------------------------------------------------------
def read_page() -> dict[str, str]:
    """What happens, by when it happens."""
    lines = (ROOT / "docs/when-things-go-wrong.md").read_text().splitlines()
    rows = [re.split(r" *(?<!\\)\| *", line)[1:3] for line in lines if line.startswith("| ")]
    return {when: what for when, what in rows if not when.startswith(("When …", "---"))}


PAGE = read_page()
# The rows that other modules show.
ELSEWHERE = "a line of `.env`", "HOME cannot", "something hangs", "the queue of", "torchrun starts", "one of torchrun's"


def test_each_row_of_the_page_has_a_test() -> None:
    """Each test names its row by the first words, and `promised` looks at the exit code."""
    nodes = ast.walk(ast.parse(Path(__file__).read_text()))
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    named = tuple(text for text in words if len(text) > 10)
    assert not [when for when in PAGE if not when.startswith(named)]


def promised(row: str, code: int) -> bool:
    """Tell whether the row that begins so has this exit code."""
    (what,) = [what for when, what in PAGE.items() if when.startswith(row)]
    return not code or f"exit {code}" in what.replace("128 + number", "130, exit 143")


@dataclass(kw_only=True)
class Bench(Machine):
    """A machine with a server of its own, and what a run on it has to show."""

    server: ClearMLServer
    begin: Begin

    def train(self, *arguments: object, **options: Any) -> Run:
        return self.begin(*FEW, *arguments, **options)

    def connect(self, store: S3Store, **entry: object) -> None:
        self.configure(self.server.configuration(), store.clearml_conf(**entry))

    def ends(self, run: Run, row: str, code: int, *words: str, within: float | None = None) -> None:
        """Wait for the end, which must be as this row of the page has it."""
        assert promised(row, code)
        assert run.end(within) == code, run.everything
        assert "Traceback" not in run.stdout + run.stderr
        line = run.line.replace(str(self.home), "~") if words else ""
        assert not [each for each in words if each.replace(str(self.home), "~") not in line], run.line
        # The doctor is named where it can tell more, and nowhere else.
        assert (DOCTOR in run.stderr) == (DOCTOR in " ".join(words)), run.stderr
        for task, record in self.server.tasks.items():
            assert task not in run.stdout or record["status"] == STATUS[code]

    def saved_epoch(self, run: Run) -> int:
        """The epoch of the checkpoint that the last line names, which must be whole and finite."""
        found = re.search(r"pytorch_mnist.py --resume (.*?)(;|$)", run.line)
        assert found, run.everything
        content = read(self.home / shlex.split(found[1])[0])
        weights = content["states"]["net"]
        assert weights.keys() == pytorch_mnist.Net().state_dict().keys()
        assert all(math.isfinite(weight.sum()) for weight in weights.values())
        return int(content["epoch"])


@pytest.fixture
def bench(machine: Machine, own_server: ClearMLServer, begin: Begin) -> Bench:
    return Bench(home=machine.home, server=own_server, begin=begin)


# --- before the run begins --------------------------------------------------------------------------------------------
DOWN, OTHER = "the ClearML server is down", "something else answers at its address"
KEY, FILE = "the access or secret key is wrong", "clearml.conf is a folder"
NO_ANSWER, REFUSED = "no answer from the ClearML API server", "the ClearML server refused"
NEW_KEYS = "make new ones: {web}/settings/workspace-configuration"
ACCESS, SECRET = (f"api.credentials.{key}_key, ~/clearml.conf" for key in ("access", "secret"))
HALF, VARIABLE = "half a ClearML configuration", "CLEARML_API_SECRET_KEY"
CLOSED, MODELS = "127.0.0.1:1", "s3://{seaweed}/models"
# Of the S3 entry in clearml.conf.
KEYS, VERIFY = '"key": "{}", "secret": "{}"'.format, ', "verify": "{ca}"'
WRITER, READER = KEYS(Store.access_key, Store.secret_key), KEYS(*SeaweedFS.READER)


@dataclass
class Fault:
    """What provokes it. {web} and the like stand for places of the test."""

    row: str  # of the page
    words: tuple[str, ...]
    edits: dict[str, str] = field(default_factory=dict)  # of clearml.conf: old text and new
    target: str = ""  # --output-uri
    variables: dict[str, str] = field(default_factory=dict)
    within: int = 10  # seconds, of which the page speaks


def no_storage(target: str, *words: str, edits: dict[str, str] | None = None, **variables: str) -> Fault:
    """`words` are what the store itself says, and what is made of it."""
    words = (f"error: no storage at {target}: ", *words, f"{DOCTOR} --output-uri {target}")
    return Fault("the storage is missing", words, edits or {}, target, variables)


FAULTS = {
    "nobody listens": Fault(DOWN, (f"{NO_ANSWER} http://{CLOSED}: refused",), {"{api}": f"http://{CLOSED}"}, within=15),
    "silent": Fault(DOWN, (NO_ANSWER + " http://{silent}: time-out",), {"{api}": "http://{silent}"}, within=30),
    "the web UI": Fault(OTHER, ("no ClearML API server at {web}", "the web UI answers there"), {"{api}": "{web}"}),
    "a wrong key": Fault(
        KEY, (REFUSED, f"(credentials: {ACCESS}; {SECRET})", NEW_KEYS), {ClearMLServer.secret_key: "mistyped"}
    ),
    "a wrong variable": Fault(
        KEY, (REFUSED, f"{ACCESS}; {VARIABLE}, environment)", "take both from one"), variables={VARIABLE: "mistyped"}
    ),
    "a file that is missing": Fault(
        FILE,
        ("CLEARML_CONFIG_FILE names ~/other.conf", "no such file"),
        variables={"CLEARML_CONFIG_FILE": "~/other.conf"},
    ),
    "half a file": Fault(FILE, (HALF, "api.credentials.secret_key", "~/clearml.conf"), {"secret_key": "other"}),
    "no such bucket where a store makes it": no_storage("s3://{seaweed}/nonesuch", "NoSuchBucket"),
    "no such bucket of Google's": no_storage("gs://nonesuch", "no such bucket"),
    "a wrong secret": no_storage(
        MODELS, "signature mismatch", "DoesNotMatch", edits={Store.secret_key: "a-wrong-secret"}
    ),
    "may not write": no_storage(MODELS, "access denied", "AccessDenied", edits={WRITER: READER}),
    "http to a TLS port": no_storage("s3://{tls}/models", edits={f"true{VERIFY}": "false"}),
    "a certificate of nobody's": no_storage("s3://{tls}/models", "certificate not trusted", edits={VERIFY: ""}),
    "a closed port": no_storage(
        f"s3://{CLOSED}/models", "no answer: refused", "Could not connect", edits={"{rclone}": CLOSED}
    ),
    "a silent store": no_storage("s3://{silent}/models", "no answer: time-out", edits={"{rclone}": "{silent}"}),
    "Google's is down": no_storage("gs://models", "Connection refused", STORAGE_EMULATOR_HOST=f"http://{CLOSED}"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.waits) if "silent" in name else name for name in FAULTS]
)
def test_what_is_wrong_is_named_before_anything_exists(
    bench: Bench, rclone: Rclone, rclone_tls: Rclone, seaweed: SeaweedFS, gcs: FakeGCS, name: str
) -> None:
    """Nothing is stored either, and no bucket is made."""
    fault, stores = FAULTS[name], (rclone, rclone_tls, seaweed, gcs)
    before = [store.keys() for store in stores]
    with silent() as nobody:
        places = {"silent": nobody, "web": bench.server.web_url, "api": bench.server.api_url}
        places |= {"rclone": rclone.host, "tls": rclone_tls.host, "seaweed": seaweed.host, "ca": str(rclone_tls.ca)}

        def fill(text: str) -> str:
            return re.sub(r"\{(\w+)\}", lambda found: places[found[1]], text)

        target = fill(fault.target)
        store = next((store for store in (rclone_tls, seaweed) if store.host in target), rclone)
        text = bench.server.configuration() + store.clearml_conf()
        for old, new in fault.edits.items():
            assert fill(old) in text
            text = text.replace(fill(old), fill(new))
        bench.configure(text)
        variables = CHECKSUM | gcs.environment() | fault.variables
        run = bench.begin("--output-uri", target, **variables)
        knows_more = (DOCTOR,) * (fault.row != FILE)
        bench.ends(run, fault.row, 1, *map(fill, fault.words), *knows_more, within=fault.within)
    assert run.stderr.splitlines() == [run.line]
    assert not re.search("epoch 1/|offline session|created new task", run.stdout)
    assert not list(bench.home.glob("outputs/*"))
    assert not bench.server.tasks
    assert [store.keys() for store in stores] == before
    assert seaweed.buckets() == ["models"]


# --- what the tests below start from and look at ----------------------------------------------------------------------
RECIPE = (*FEW, "--epochs", 12, "--lr", 0.1)


@dataclass
class Uninterrupted:
    """A training by RECIPE that nothing disturbed."""

    folder: Path  # with the model, and the first checkpoint as `saved.pt`
    curves: dict[tuple[str, str], dict[int, float]]  # that the server has

    def has_same_weights(self, model: Path) -> bool:
        """To the last bit."""
        weights, expected = read(model), read(self.folder / "model.pt")
        return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uninterrupted]:
    machine, server = Machine(tmp_path_factory.mktemp("home")), ClearMLServer(tmp_path_factory.mktemp("server"))
    server.start()
    machine.configure(server.configuration())
    run = machine.start("pytorch_mnist.py", *RECIPE)
    run.wait_for("epoch 1/12")
    folder = machine.outputs("checkpoint.pt").parent
    os.link(folder / "checkpoint.pt", folder / "saved.pt")
    assert run.end() == 0, run.everything
    yield Uninterrupted(folder, stored_curves(server, run.task))
    server.stop()


def is_whole(model: Path) -> bool:
    return read(model).keys() == pytorch_mnist.Net().state_dict().keys()


def stored_at(run: Run) -> str:
    return str(re.findall(r"^Stored: (.*)$", run.stdout, re.MULTILINE)[0])


# --- server and storage die -------------------------------------------------------------------------------------------
def test_a_server_that_dies_and_comes_back_has_everything(bench: Bench) -> None:
    """With another secret, too, so that no token is good any longer."""
    run = bench.train("--epochs", 4)
    run.wait_for("epoch 2/4")
    bench.server.stop()
    run.wait_for("waiting for the ClearML server to come back")
    bench.server.renew_secret()
    bench.server.start()
    bench.ends(run, "the server dies during training and comes back", 0)
    assert "the ClearML server is back" in run.stdout
    curves = stored_curves(bench.server, run.task)
    assert [*curves["loss", "train batch"]] == [*range(1, 13)]
    assert [*curves["accuracy", "test"]] == [3, 6, 9, 12]
    task = bench.read_task(run.task)
    assert all(task["console"].count(f"epoch {epoch}/4 ") == 1 for epoch in range(1, 5))
    assert {"confusion matrix", "per class"} <= task["plots"].keys()
    assert (len(task["samples"]), "predictions" in task["artifacts"]) == (1, True)
    (model,) = task["models"]
    assert Path(model["file"]).read_bytes() == bench.outputs("model.pt").read_bytes()


@pytest.mark.waits
def test_a_server_that_stays_away_costs_no_training(bench: Bench, tmp_path: Path) -> None:
    """The run waits a minute for it; here, by a copy of the script, ten seconds. `atexit` functions run even then."""
    script = copy_script(tmp_path / "copy")
    text = script.read_text().replace("\nDATA = ", "\nrun.PATIENCE = 10\nDATA = ")
    script.write_text(text.replace("\nimport gzip", "\nimport atexit; atexit.register(print, 'at exit')\nimport gzip"))
    alone = {"PYTHONHASHSEED": "0"}  # not in a fork, which has imported `logging` already: that waits at exit, too
    run = bench.train("--epochs", 4, "--output-uri", tmp_path, script=script, **alone)
    run.wait_for("epoch 2/4")
    bench.server.stop()
    run.wait_for("epoch 4/4")
    run.since = time.monotonic()
    assert promised("the server dies during training and stays away", 1)
    assert run.end(within=120 - 50) == 1, run.everything
    model = bench.outputs("model.pt")
    assert is_whole(model)
    assert f"the model is in {model.relative_to(bench.home)}, and the last reports did not reach" in run.line
    assert DOCTOR in run.line
    assert "at exit" in run.stdout
    assert bench.saved_epoch(run) == 4


@pytest.mark.parametrize("when", ["while training", "in the middle of the upload"])
def test_a_store_that_dies_costs_no_training(bench: Bench, tmp_path: Path, when: str) -> None:
    """The store has no half object, and the command of the last line uploads what is there."""
    with Rclone(tmp_path / "store") as store:
        plug = Plug(store.port)
        uri = f"s3://{plug.host}/{store.bucket}"
        bench.connect(store, host=plug.host)
        run = bench.train("--epochs", 12, "--output-uri", uri)
        run.wait_for("epoch 1/")
        plug.bytes_left = 100_000 if "upload" in when else 0  # of the 171,000 that the model has
        run.end()
        assert plug.pulled
        model = bench.outputs("model.pt")
        words = f"the model is in {model.relative_to(bench.home)}, but not at {uri}", "no answer: "
        bench.ends(run, "the storage dies during training", 1, *words, f"{DOCTOR} --output-uri {uri}")
        assert evaluate(model, 200) == pytest.approx(float(EPOCH.findall(run.stdout)[-1][4]), abs=0.005)
        assert bench.saved_epoch(run) == 12
        assert uri in bench.server.tasks[run.task]["status_reason"]
        assert not store.keys()

        bench.connect(store)  # mended: the store at its own port
        again = bench.begin("--resume", f"outputs/{run.task}", "--output-uri", store.uri())
        assert again.end() == 0, again.everything
        assert not list(bench.home.glob("outputs/*/checkpoint.pt"))
        assert bench.server.tasks[run.task]["status"] == "completed"
        assert "epoch 1/" not in again.stdout
        (key,) = [key for key in store.keys() if key.endswith("models/model.pt")]
        assert stored_at(again) == store.uri(key)
        assert store.get(key) == model.read_bytes()
        assert [entry["uri"] for entry in bench.server.models.values()] == [stored_at(again)]


def test_an_upload_in_the_background_that_fails_is_heard(bench: Bench, tmp_path: Path) -> None:
    """The SDK only logs it, and goes on."""
    with Rclone(tmp_path / "store") as store, Front(store, r"^0 PUT \S*predictions", "AccessDenied") as front:
        bench.connect(store, host=front.host)
        run = bench.train("--epochs", 1, "--output-uri", f"s3://{front.host}/{store.bucket}")
        bench.ends(run, "the picture of the mistakes or", 1, "AccessDenied", DOCTOR)
        assert bench.saved_epoch(run) == 1
        assert [key for key in store.keys() if key.endswith("/model.pt")]


# --- signals and the web UI -------------------------------------------------------------------------------------------
SIGNAL = "SIGTERM, SIGHUP"
SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


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
    bench: Bench, moment: str, number: signal.Signals, times: int
) -> None:
    run = bench.train("--epochs", 1 if moment == "Test accuracy " else LONG)
    run.wait_for(moment)
    for press in range(times):
        time.sleep(0.3 if press else 0)
        run.signal(number)
    bench.ends(run, SIGNAL, 128 + number, SAID[number], within=10)
    assert run.task
    if moment in ("epoch 1/", "Test accuracy "):
        assert bench.saved_epoch(run) >= 1


@pytest.mark.parametrize("object_", ["probe-", "model.pt"])
def test_sigterm_while_the_storage_is_silent(bench: Bench, rclone: Rclone, object_: str) -> None:
    """Before there is a task, and at the upload of the model."""
    with Front(rclone, rf"^0 PUT \S*/{object_}", silent=True) as store:
        bench.connect(rclone, host=store.host)
        run = bench.train("--epochs", 1, "--output-uri", f"s3://{store.host}/{rclone.bucket}")
        assert store.refused.wait(HANGS)
        run.signal(signal.SIGTERM)
        bench.ends(run, SIGNAL, 143, "terminated", within=10)
    if object_ == "model.pt":
        assert bench.saved_epoch(run) == 1
        assert is_whole(bench.outputs("model.pt"))
    else:
        assert not bench.server.tasks


def test_abort_in_the_web_ui_ends_the_training(bench: Bench) -> None:
    run = bench.train("--epochs", LONG)
    run.wait_for("epoch 1/")
    bench.server.tasks_stop(run.task)
    run.since = time.monotonic()
    within = 2 + 10  # the SDK asks every 2 s; from then on it is SIGTERM
    bench.ends(run, "the task is aborted in the web UI", 143, "aborted in the web UI", within=within)
    assert bench.saved_epoch(run) >= 1


# --- kill -9 and --resume ---------------------------------------------------------------------------------------------
def kill_after(words: str, run: Run) -> None:
    run.wait_for(words)
    run.kill()
    run.end()


def test_resume_after_kill_9_is_as_if_nothing_had_happened(bench: Bench, uninterrupted: Uninterrupted) -> None:
    first = bench.begin(*RECIPE, "--tags", "red", "blue")
    kill_after("epoch 2/12", first)
    (task,) = bench.server.tasks.values()
    assert task["status"] == "in_progress"
    hyperparameters = deepcopy(task["hyperparams"])
    path = bench.outputs("checkpoint.pt").relative_to(bench.home)
    second = bench.begin("--resume")
    second.wait_for("resumed after")
    assert task["hyperparams"] == hyperparameters
    kill_after("epoch 7/12", second)
    assert re.search(f"resumed after epoch [2-6] from {path}", second.stdout)
    bench.ends(bench.begin("--resume", path), "the process is killed", 0)
    assert [*bench.server.tasks] == [first.task]
    assert (task["status"], task["hyperparams"]) == ("completed", hyperparameters)
    assert uninterrupted.has_same_weights(bench.outputs("model.pt"))
    assert alike(stored_curves(bench.server, first.task), uninterrupted.curves)
    assert len(bench.read_task(first.task)["models"]) == 1


def test_a_checkpoint_waits_for_the_reports_that_it_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    order = Mock()
    order.flush.side_effect = lambda **_: [time.sleep(0.2), order.sent()]  # type: ignore[func-returns-value]
    monkeypatch.setattr("clearml_client.checkpoint.Task.current_task", lambda: order)
    checkpoint.flush_reports()
    order.sent.assert_called_once()


def test_resume_offline_goes_on_in_a_new_session_that_begins_there(
    begin: Begin, machine: Machine, uninterrupted: Uninterrupted
) -> None:
    kill_after("epoch 3/12", begin("--offline", *RECIPE))
    (older := machine.home / "outputs/older/checkpoint.pt").parent.mkdir()
    older.touch()
    os.utime(older, (0, 0))
    second = begin("--resume", "--device", "cpu")
    assert second.end() == 0, second.everything
    found = re.search(r"resumed after epoch (\d+) from \S+, in a new session, which begins there", second.stdout)
    assert found, second.everything
    assert uninterrupted.has_same_weights(machine.outputs("model.pt"))
    assert "ClearML: offline session, because the run to resume is offline\n" in second.stdout
    assert {*machine.home.glob("outputs/*")} == {older.parent, machine.home / "outputs" / second.task}
    assert older.exists()
    _, events, _ = read_session(machine.home / f".clearml/cache/offline/{second.task}.zip")
    assert {step for points in curves_in(events).values() for step in points} == {*range(3 * int(found[1]) + 1, 37)}


def test_what_is_finished_is_not_resumed_and_not_touched(bench: Bench, uninterrupted: Uninterrupted) -> None:
    """By the checkpoint that is gone, or by the task, which somebody may have completed or published, or deleted."""
    first = bench.train("--epochs", 1)
    assert first.end() == 0, first.everything
    model = bench.outputs("model.pt").relative_to(bench.home)
    torch.save(read(uninterrupted.folder / "saved.pt") | {"task": first.task}, bench.home / "left.pt")
    for status, file, words in (
        ("completed", model.with_name("checkpoint.pt"), f"a complete run keeps no checkpoint, but its model: {model}"),
        ("published", "left.pt", f"cannot resume: the task {first.task} is published; start a new run [left.pt]"),
    ):
        bench.server.tasks[first.task]["status"] = status
        before = deepcopy((bench.server.tasks, bench.server.models))
        again = bench.begin("--resume", file)
        bench.ends(again, GONE, 2)
        assert again.line.endswith(words)  # and it does not advise itself
        assert (bench.server.tasks, bench.server.models) == before
    del bench.server.tasks[first.task]
    bench.ends(
        bench.begin("--resume", "left.pt"),
        GONE,
        2,
        f"{first.task} is not on this server; --offline goes on in a new session [left.pt]",
    )


# --- checkpoints, options and data that are wrong ---------------------------------------------------------------------
GONE = "the run for `--resume`"
DAMAGED = "the file for `--resume` is damaged"


class Malice:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.path, "executed")


def save_cut(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


BAD_CHECKPOINTS: list[Callable[[Path, dict[str, Any]], object]] = [
    save_cut,
    lambda path, _: path.write_text("Hello, world!"),
    lambda path, good: torch.save(good["states"]["net"], path),  # a model
    lambda path, _: torch.save({"net": Malice(path.with_name("executed"))}, path),
]


def test_the_run_ends_at_a_checkpoint_of_another_network(bench: Bench, uninterrupted: Uninterrupted) -> None:
    path, good = bench.home / "checkpoint.pt", read(uninterrupted.folder / "saved.pt")
    name, weight = next(iter(good["states"]["net"].items()))
    good["states"]["net"][name] = torch.zeros(*weight.shape, 9)
    torch.save(good | {"task": ""}, path)
    run = bench.begin("--resume", path)
    bench.ends(run, DAMAGED, 1, f"cannot resume from {path}", "size mismatch")
    assert run.stderr.splitlines() == [run.line]


def test_what_is_refused_before_anything_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, uninterrupted: Uninterrupted
) -> None:
    """In this process: it is the start of one that takes seconds."""
    good, named = uninterrupted.folder / "saved.pt", "a name has slashes"
    few, many = "has three characters or more", "has at most 220 bytes"
    cases: list[tuple[str, int, Sequence[object], str]] = [
        (GONE, 2, ["--resume", "--output-dir", tmp_path / "none"], f"no checkpoint at {tmp_path}/none; name"),
        (GONE, 2, ["--resume", tmp_path / "none.pt"], f"no checkpoint at {tmp_path}/none.pt; name"),
        (GONE, 2, ["--resume", tmp_path], f"no checkpoint at {tmp_path}; .* model: {tmp_path}/done/model.pt$"),
        ("the storage is missing", 2, ["--output-uri", "http://store:9000/bucket"], "plain http is secure: false"),
        ("`--resume` comes with another", 2, ["--resume", good, "--epochs", 9], "--epochs was 12, and cannot change"),
        ("the device is not there", 2, ["--device", "cuda:99"], "no device 'cuda:99' on this machine"),
        *((named, 2, ["--project-name", text], few) for text in ("   ", "a/../b", '"quoted"')),
        (named, 2, ["--project-name", "p/mnist"], "each part of a project's name"),
        *((named, 2, ["--task-name", text], many) for text in ("n" * 221, "🚀" * 19)),
    ]
    (tmp_path / "done").mkdir()
    (tmp_path / "done/model.pt").touch()
    words = "it is damaged, or no checkpoint.pt of an earlier run"
    for number, make in enumerate(BAD_CHECKPOINTS):
        path = tmp_path / f"runs/{number}.pt"
        path.parent.mkdir(exist_ok=True)
        make(path, read(good))
        cases.append((DAMAGED, 1, ["--resume", path], f"error: cannot resume from {path}: .*{words}"))
    for row, code, arguments, words in cases:
        assert promised(row, code)
        monkeypatch.setattr(sys, "argv", ["pytorch_mnist.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            checkpoint.parse_args(pytorch_mnist.make_parser())
        assert re.search(words, capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.rglob("executed"))


TRAIN, TEST = ([f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")] for part in ("train", "t10k"))


def test_a_damaged_data_file_is_named_and_reading_writes_nothing(tmp_path: Path) -> None:
    """By sys.exit, which test_package.py shows to end a run so. One is cut, one has another byte, one is another's."""
    assert promised("a data file is damaged", 1)
    raw = Path(shutil.copytree(ROOT / "data", tmp_path / "data")) / "MNIST/raw"
    names = {path.name for path in raw.iterdir()}
    images, labels = ((raw / name).read_bytes() for name in TRAIN)
    half = len(labels) // 2
    bent = labels[:half] + bytes([labels[half] ^ 0xFF]) + labels[half + 1 :]
    for name, damaged in ((TRAIN[0], images[: len(images) // 2]), (TRAIN[1], bent), (TEST[1], labels)):
        (raw / name).write_bytes(damaged)
        with pytest.raises(SystemExit, match=f"no MNIST in {raw}: .*{name}"):
            pytorch_mnist.load_mnist(tmp_path / "data", name.partition("-")[0])
        shutil.copy(ROOT / "data/MNIST/raw" / name, raw)
    assert {path.name for path in raw.iterdir()} == names


@pytest.mark.waits
def test_without_data_and_mirror_it_says_how_to_get_the_files(bench: Bench, tmp_path: Path) -> None:
    names = [f"{protocol}_proxy" for protocol in ("http", "https", "all")]
    runs: dict[Path, Run] = {}
    with silent() as host:
        for folder, proxy in ((tmp_path / "refused", CLOSED), (tmp_path / "unanswered", host)):
            way_out = dict.fromkeys([*names, *map(str.upper, names)], f"http://{proxy}")
            options = way_out | {"no_proxy": "", "NO_PROXY": ""}
            runs[folder] = bench.begin("--offline", "--data-dir", folder, **options)
        for folder, run in runs.items():
            words = f"no MNIST in {folder}", ".gz", f"see {ROOT}/data"
            bench.ends(run, "the data folder is empty", 1, *words, within=60)


# --- disks, loss, devices ---------------------------------------------------------------------------------------------
def mount(*arguments: object) -> None:
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    done = subprocess.run([*root, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system (Linux, root or sudo): {done.stderr.strip()}")


@pytest.fixture
def small_disk(bench: Bench) -> Iterator[Callable[..., Path]]:
    """Makes `outputs` a file system with room for such files, and a little more for folders and for growth."""
    folder = bench.home / "outputs"
    folder.mkdir()

    def make(*files: Path) -> Path:
        size = sum(file.stat().st_size + 4096 for file in files) + 8192
        mount("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
        return folder

    yield make
    if folder.is_mount():
        mount("umount", "--lazy", folder)


@pytest.mark.parametrize(("epochs", "full_at"), [(2, "checkpoint.pt"), (1, "mistakes.png")])
def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoint_whole(
    bench: Bench, uninterrupted: Uninterrupted, small_disk: Callable[..., Path], epochs: int, full_at: str
) -> None:
    fits = ["saved.pt"] if full_at == "checkpoint.pt" else ["saved.pt", "model.pt"]
    small_disk(*(uninterrupted.folder / name for name in fits))
    run = bench.train("--epochs", epochs, "--batch-size", 20, "--lr", 0.1)  # with many mistakes, of which to draw some
    bench.ends(run, "the disk is full", 1, "cannot write ", ": No space left on device")
    if full_at == "checkpoint.pt":  # of the picture, the library that writes it names no file
        assert f"cannot write outputs/{run.task}/checkpoint.pt: No space" in run.line
    else:
        assert is_whole(bench.outputs("model.pt"))
    assert bench.saved_epoch(run) == 1
    assert not list(bench.home.glob("outputs/*/*.part"))


def test_a_disk_that_becomes_read_only(
    bench: Bench, uninterrupted: Uninterrupted, small_disk: Callable[..., Path]
) -> None:
    folder = small_disk(*[uninterrupted.folder / "saved.pt"] * 9)
    run = bench.train("--epochs", LONG)
    run.wait_for("epoch 1/")
    while subprocess.run(["mount", "-o", "remount,ro", folder], capture_output=True).returncode:
        time.sleep(0.02)  # refused while a file is open for writing
    bench.ends(run, "the disk is full", 1, "error: cannot write ", ": Read-only file system")
    assert bench.saved_epoch(run) >= 1


def test_an_output_folder_that_cannot_be_made(bench: Bench) -> None:
    (bench.home / "outputs").write_text("a file")
    bench.ends(bench.train("--epochs", 1), "the disk is full", 1, "Not a directory", "outputs/")


def test_a_loss_that_is_no_number_ends_the_run_in_that_epoch(bench: Bench) -> None:
    run = bench.train("--epochs", 100, "--lr", 1000, "--weight-decay", 0.1)  # the weights grow until they overflow
    bench.ends(run, "the loss becomes NaN", 1, "--lr")
    found = re.search(r"the loss is (?:nan|inf) in epoch (\d+)", run.line)
    assert found, run.line
    assert bench.saved_epoch(run) == int(found[1]) - 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory it fills")
def test_a_gpu_without_memory_ends_in_one_line(bench: Bench) -> None:
    rest = torch.cuda.mem_get_info()[0] - 700 * 2**20  # enough for the context
    filler = torch.empty(rest, dtype=torch.uint8, device="cuda")
    run = bench.begin("--device", "cuda", "--batch-size", 9999, "--epochs", 1)
    bench.ends(run, "the device is not there", 1, "out of memory")
    del filler


# --- names, and other programs ----------------------------------------------------------------------------------------
NAMES = [("group/sub group/Ü%1", "it's [run/1 of/2] № 1? 🚀 #2 (clone)"), ("p" * 220, "🚀" * 18)]


@pytest.mark.parametrize("where", ["file server", "S3"])
def test_any_name_works(bench: Bench, tmp_path: Path, where: str) -> None:
    """Model, picture and predictions lie where the SDK puts them: in a folder that has the task's id."""
    with Rclone(tmp_path / "rclone") as rclone:
        bench.connect(rclone)
        uri = rclone.uri("names") if where == "S3" else ""
        for project, name in NAMES:
            run = bench.begin("--dry-run", "--project-name", project, "--task-name", name, "--output-uri", uri)
            bench.ends(run, "a name has slashes", 0)
        stored = [*rclone.keys(), *(str(path) for path in bench.server.files_folder.rglob("*.*"))]
    for (task, record), (project, name) in zip(bench.server.tasks.items(), NAMES, strict=True):
        assert (record["name"], bench.server.projects[record["project"]]["name"]) == (name, project)
        assert sorted(Path(path).suffix for path in stored if f".{task}/" in path) == [".csv", ".png", ".pt"]


def test_a_reader_that_leaves_early_costs_nothing(bench: Bench) -> None:
    assert promised("the output is cut", 0)
    reader, writer = os.pipe()
    run = bench.start("pytorch_mnist.py", *FEW, "--epochs", 1, stdout=writer)
    os.close(writer)
    with open(reader) as output:
        assert output.readline()
    assert (run.end(), run.stderr) == (0, "")
    assert is_whole(bench.outputs("model.pt"))
    assert [task["status"] for task in bench.server.tasks.values()] == ["completed"]


def test_two_runs_at_once_with_the_same_names_are_both_whole(bench: Bench, tmp_path: Path) -> None:
    both = [bench.train("--epochs", 1, "--seed", seed, "--output-uri", tmp_path / "storage") for seed in (1, 2)]
    for run in both:
        bench.ends(run, "two runs start at once", 0)
    models = {model["task"]: model["uri"] for model in bench.server.models.values()}
    for run in both:
        content = bench.home.joinpath("outputs", run.task, "model.pt").read_bytes()
        assert models[run.task] == stored_at(run)
        assert Path(stored_at(run).removeprefix("file://")).read_bytes() == content
        assert [*stored_curves(bench.server, run.task)["loss", "train batch"]] == [1, 2, 3]
    assert len(models) == len(list(bench.home.glob("outputs/*"))) == 2
