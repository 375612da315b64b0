"""The clean-up against a stand-in server and real stores: what goes, what stays and why, and what a kill -9 leaves."""

import io
import json
import os
import pty
import re
import signal
import sys
import termios
import time
from collections.abc import Callable
from contextlib import closing, suppress
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from clearml_server import ClearMLServer
from conftest import Machine, Run
from stores import FakeGCS, Front, Rclone, S3Store

from clearml_client import cleanup

CLEANUP = ("-m", "clearml_client.cleanup", "--project-name")
HOOKED = ("tests/programs/hook.py", "--project-name")
GONE: tuple[list[str], ...] = ([], [], [])


class Lab:
    """A team's project: tasks as the SDK would have left them, and their objects in every kind of store."""

    def __init__(self, server: ClearMLServer, folder: Path, s3: S3Store, gcs: FakeGCS) -> None:
        self.server, self.s3, self.gcs, self.project = server, s3, gcs, f"cleanup/{uuid4().hex[:8]}"
        self.project_id = server.projects_create(self.project)["id"]
        self.folder = folder / "disk"
        self.folder.mkdir()
        self.machine = Machine(folder / "home", gcs.environment())
        self.machine.home.mkdir()
        self.machine.configure(server.configuration(), s3.clearml_conf())

    @property
    def roots(self) -> dict[str, str]:
        """The address of each store."""
        files = {"folder": f"file://{self.folder}", "files": self.server.files_url}
        return {"s3": self.s3.uri(), "gcs": self.gcs.uri(), **files}

    def run(self, *arguments: object, code: int = 0) -> Run:
        done = self.machine.run(*HOOKED, self.project, *arguments, code=code)
        assert "Traceback" not in done.everything
        return done

    def delete(self, *arguments: object, code: int = 0) -> str:
        """What a run says that deletes all that it may."""
        return self.run("--delete", "--yes", *arguments, code=code).stdout

    def disturb(self, step: int, disturbance: Callable[[], object], code: int = 1) -> str:
        """What a run says that something happens to before its step-th change."""
        variables = {**self.machine.variables, "STEP": str(step), "ACTION": "pause"}
        run = replace(self.machine, variables=variables).start(*HOOKED, self.project, "--delete", "--yes")
        paused = self.machine.home / "paused"
        while not paused.exists():
            assert run.waiting.is_alive(), run.everything
            time.sleep(0.02)
        disturbance()
        paused.unlink()
        assert (run.end(), "Traceback" in run.everything) == (code, False), run.everything
        return run.stdout

    def archive(self, *tasks: str, days: float = 40) -> None:
        changed = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        for task in tasks:
            self.server.tasks[task] |= {"status_changed": changed, "system_tags": ["archived"]}

    def task(self, name: str, status: str = "completed", days: float = 40, archived: bool = True, **more: Any) -> str:
        task: str = self.server.tasks_create(name, "training", project=self.project_id, **more)["id"]
        self.archive(task, days=days)
        self.server.tasks[task] |= {"status": status} | ({} if archived else {"system_tags": []})
        return task

    def model(self, task: str, address: str) -> str:
        name = f"model {len(self.server.models)}"
        model: str = self.server.models_create(address, name, False, project=self.project_id, task=task)["id"]
        self.server.tasks[task]["models"]["output"].append({"name": name, "model": model})
        return model

    def artifact(self, task: str, address: str, mode: str = "output") -> None:
        artifacts = self.server.tasks[task]["execution"]["artifacts"]
        artifacts.append({"key": f"artifact {len(artifacts)}", "mode": mode, "uri": address})

    def image(self, task: str, address: str, iteration: int = 0, **more: str) -> None:
        event = {"type": "training_debug_image", "task": task, "iter": iteration, "metric": "m", "variant": "v"}
        self.server.events[task][uuid4().hex] = {**event, "url": address, **more}

    def plot(self, task: str, *addresses: str, text: str = "") -> None:
        images = [{"source": address} for address in addresses]
        self.image(task, "", type="plot", plot_str=text or json.dumps({"data": [], "layout": {"images": images}}))

    def full_task(self, name: str, store: str = "s3", **more: Any) -> str:
        """A task with one of each kind in a store."""
        task = self.task(name, **more)
        for add in (self.model, self.artifact, self.image, self.plot):
            add(task, self.put(f"{name}.{task}/{add.__name__}.bin", store))
        return task

    def model_of(self, task: str) -> str:
        return str(self.server.tasks[task]["models"]["output"][0]["model"])

    def put(self, path: str, store: str = "s3") -> str:
        """Write an object of 1000 bytes into s3, gcs, files or folder, and return its address."""
        key, data = f"{self.project}/{path}", b"x" * 1000
        if store == "s3":
            with closing(self.s3.client()) as s3:
                s3.put_object(Bucket=self.s3.bucket, Key=key, Body=data)
        elif store == "gcs":
            with closing(self.gcs.client()) as gcs:
                gcs.bucket(self.gcs.bucket).blob(key).upload_from_string(data, timeout=60)
        else:
            file = (self.server.files_folder if store == "files" else self.folder) / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return f"{self.roots[store]}/{key}"

    def objects(self) -> list[str]:
        """Every object of this project, in every store."""
        keys = [*self.s3.keys(), *self.gcs.keys()]
        for folder in (self.folder, self.server.files_folder):
            keys += [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return sorted(key for key in keys if self.project[:16] in key)  # before what the SDK quotes

    def tasks(self) -> list[str]:
        return [task["id"] for task in self.server.tasks.values() if task["project"] == self.project_id]

    def left(self) -> tuple[list[str], list[str], list[str]]:
        models = [model["id"] for model in self.server.models.values() if model["project"] == self.project_id]
        return self.tasks(), models, self.objects()


@pytest.fixture
def lab(stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone, gcs: FakeGCS) -> Lab:
    return Lab(stand_in, tmp_path, rclone, gcs)


# --- what goes ------------------------------------------------------------------------------------------------------
def test_without_delete_it_lists_everything_and_deletes_nothing(lab: Lab) -> None:
    """On an output that lacks a letter. What keeps a task stands behind more tasks than the server gives at once."""
    linker, task, linked = lab.task("linker", archived=False), lab.full_task("näme"), lab.full_task("linked")
    lab.artifact(linker, lab.server.tasks[linked]["execution"]["artifacts"][0]["uri"])
    for number in range(500):
        lab.task(f"task {number}", archived=False)
    before, asked = lab.left(), len(lab.server.requests)
    lab.machine.variables["PYTHONIOENCODING"] = "ascii"
    said = lab.run().stdout
    assert lab.left() == before
    assert not [r for r in lab.server.requests[asked:] if "delete" in r.path or r.method in ("DELETE", "PUT")]
    assert "2 archived tasks, unchanged for more than 30 days\n" in said
    owned = f"40 days: 1 artifact, 2 images, 1 model, 4.00kB in {lab.s3.uri()}"
    assert rf"n\xe4me ({task}), {owned}" in said
    assert re.search(rf"^linked \({linked}\), {owned}; stays: task {linker} has a link to", said, re.MULTILINE)
    assert "add --delete" in said


def test_deletes_from_every_kind_of_store(lab: Lab, tmp_path: Path) -> None:
    """What is recorded, and what is not in the tasks' own folders; nothing in other folders, or behind a link."""
    mixed, stays = lab.task("mixed"), [lab.put("mixed/model.bin", store) for store in lab.roots]
    for store, root in lab.roots.items():
        address = lab.put(f"mixed.{mixed}/models/model.bin", store)
        lab.model(mixed, address)
        lab.model(mixed, address.replace("model.bin", "never.bin"))
        recorded, killed = lab.full_task("recorded", store), lab.task("killed", output_dest=root)
        for path in (f"recorded.{recorded}/models/left.bin", f"killed.{killed}/ä #1/1.bin", f"killed.{killed}/2.bin"):
            left = lab.put(path, store)
            stays += [left] if store == "files" else []  # it cannot list
        for path in (f"killed.{killed}0", f"killed.{killed[:-1]}", "killed", f"other.{uuid4().hex}", f"x.{killed} y"):
            stays.append(lab.put(f"{path}/model.bin", store))
    by_variables = lab.put(f"mixed.{mixed}/models/variables.bin")
    lab.server.models[lab.model(mixed, by_variables.replace(f"{lab.s3.host}/", ""))].pop("task")  # only its list has it
    (tmp_path / "precious").touch()
    (lab.folder / "link").symlink_to(tmp_path / "precious")
    lab.model(mixed, f"file://{lab.folder}/link")
    lab.server.tasks[mixed]["models"]["output"].pop()  # only the model says whose it is
    linked = lab.task("linked", output_dest=f"file://{lab.folder}")
    (lab.folder / lab.project / f"linked.{linked}").symlink_to(lab.folder / lab.project / "killed")
    asked = len(lab.server.requests)
    lab.machine.variables |= lab.s3.environment()
    said = lab.delete("--folder", lab.folder)
    assert lab.left() == ([], [], sorted(address[address.index(lab.project) :] for address in stays))
    assert [path.name for path in lab.folder.iterdir()] == ["cleanup"], "of a link the link goes"
    assert (tmp_path / "precious").exists()
    assert not [*lab.folder.rglob("recorded*")], "an empty folder was left"
    assert re.search("^deleted mixed .* days: 4 missing objects, 6 models, [0-9.]+kB in", said, re.MULTILINE)
    assert len(re.findall("^deleted recorded .* 1 unrecorded object, 5.00kB in", said, re.MULTILINE)) == 3
    assert len(re.findall("^deleted killed .* days: 2 unrecorded objects, 2.00kB in", said, re.MULTILINE)) == 3
    assert re.search(r"^Deleted: 10 tasks, .*Left: 0 tasks\.$", said, re.MULTILINE)
    deletions = [r for r in lab.server.requests[asked:] if r.path == "tasks.delete"]
    assert all(not r.data["delete_external_artifacts"] for r in deletions), "the server must not delete on its own"
    assert "file server cannot list" in lab.run("--help").stdout


def test_names_with_special_characters_as_the_sdk_writes_them(lab: Lab) -> None:
    """The SDK's own tasks. The file server's addresses are quoted, except those of models.

    The second task in each store that can be listed has lost all records, as if it had been killed before any.
    """
    lab.project += " ä #1 ?%"
    listable = (lab.s3.uri("runs"), lab.gcs.uri("runs"), lab.folder)
    targets = [lab.server.files_url, *(target for target in listable for _ in range(2))]
    lab.machine.run("tests/programs/make_tasks.py", lab.project, *targets)
    (project,) = [project for project in lab.server.projects.values() if project["name"] == lab.project]
    lab.project_id = project["id"]
    lab.archive(*lab.tasks())
    for task in lab.tasks()[2::2]:
        lab.server.events[task].clear()
        lab.server.tasks[task] |= {"execution": {"artifacts": []}, "models": {"input": [], "output": []}}
        lab.server.models = {id_: model for id_, model in lab.server.models.items() if model["task"] != task}
    assert len(lab.objects()) == 7 * 5
    said = lab.delete("--folder", lab.folder)
    assert len(re.findall("^deleted .*: 5 unrecorded objects, [^,]*$", said, re.MULTILINE)) == 3
    assert "missing" not in said
    assert lab.left() == GONE


def test_what_an_offline_session_stored_goes_with_its_last_import(lab: Lab) -> None:
    """Each import is a task with an id of its own, and the model's address has that of the session."""
    names = ("--project-name", lab.project, "--task-name", "offline")
    lab.machine.train("--offline", "--dry-run", *names, "--output-uri", lab.folder)
    for _ in range(2):
        clearml_task = Path(sys.executable).with_name("clearml-task")
        lab.machine.run(clearml_task, "--import-offline-session", lab.machine.session())
    first, second = lab.tasks()
    (model,) = lab.folder.glob("offline-*/model.pt")
    lab.archive(first)
    assert lab.delete("--folder", lab.folder).count("1 linked object") == 2 * 2  # the task's and the sum's, twice
    assert (lab.tasks(), model.exists()) == ([second], True)
    lab.archive(second)
    lab.delete("--folder", lab.folder)
    assert (lab.left(), [*lab.folder.iterdir()]) == (GONE, []), "an empty folder was left"


def test_every_image_goes_and_every_image_of_a_plot(lab: Lab) -> None:
    """More events than the server gives at once, and more than the 100 that the SDK deletes; each address once."""
    task = lab.task("many images")
    addresses = [lab.put(f"x.{task}/metrics/{number}.png", "files") for number in range(130)]
    for iteration in range(1100):
        lab.image(task, addresses[iteration if iteration < 120 else 0], iteration)
    lab.plot(task, *addresses[120:], "data:image/png;base64,AAAA")
    lab.plot(task, text="{no json")
    lab.plot(task, *addresses[120:])
    assert "130 images" in lab.delete()
    assert lab.left() == GONE


# --- what stays, and why --------------------------------------------------------------------------------------------
def test_all_that_is_old_and_archived_goes_or_has_a_reason(lab: Lab, tmp_path: Path) -> None:
    """In JSON. A good reason is no failure; a bucket that is missing is one, though all seems gone there."""
    reasons, failures = {}, {}
    for status in ("published", "publishing", "in_progress", "queued"):
        reasons[lab.full_task(status, status=status)] = f"it is {status.replace('in_progress', 'running')}"
    with_published_model = lab.full_task("published model")
    lab.server.models[lab.model_of(with_published_model)]["ready"] = True
    reasons[with_published_model] = f"({lab.model_of(with_published_model)}) is published"
    used, parent, data, owner = (lab.full_task(name) for name in ("used", "parent", "data set", "owner"))
    user = lab.task("user", archived=False)
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": lab.model_of(used)}]
    child = lab.task("child", status="published", archived=False, parent=parent)
    lab.server.tasks[data]["system_tags"] = ["archived", "dataset"]
    lab.artifact(user, lab.server.tasks[owner]["execution"]["artifacts"][0]["uri"])
    reasons |= {used: f"is used by task {user}", parent: f"its child {child} is published"}
    reasons |= {data: "it is a ClearML dataset", owner: f"task {user} has a link to its artifact"}
    (lab.folder / "way out").symlink_to(tmp_path)
    (tmp_path / "precious.bin").touch()
    (lab.folder / lab.project).mkdir(parents=True)
    linked = lab.task("linked", output_dest=f"file://{lab.folder}")
    (lab.folder / lab.project / f"linked.{linked}").symlink_to(tmp_path)
    reasons[linked] = "is not below a --folder"
    for path in (tmp_path, f"file://{tmp_path}", f"file://{lab.folder}/..", f"file://{lab.folder}/way out"):
        outside = lab.task(str(path))
        lab.model(outside, f"{path}/precious.bin")
        reasons[outside] = "precious.bin is not below a --folder"
    reasons[lab.task("its folder", output_dest=f"file://{tmp_path}")] = "is not below a --folder"
    reasons[lab.task("in Azure", output_dest="azure://account/box")] = "azure:// is no storage that this command knows"
    nowhere = f"s3://{lab.s3.host}/nonesuch"
    failures[lab.task("no record yet", output_dest=nowhere)] = "no such bucket"
    (unmounted := lab.folder.with_name("mount")).mkdir()  # the point where it is mounted is there, and empty
    empty, unknown = (f"file://{unmounted}", "is it mounted?"), ("s3://127.0.0.1:1/models", "no keys")
    for address, why in ((nowhere, "no such bucket"), unknown, ("https://x", "server"), empty):
        for path in ("x.{}/model.bin", "{}.bin"):
            task = lab.task(f"{address}/{path}")
            lab.model(task, f"{address}/{path}".format(task))
            failures[task] = why
    kept = [lab.task("six days", days=6), lab.task("in the project below")]
    lab.server.tasks[kept[1]]["project"] = lab.server.projects_create(f"{lab.project}/below")["id"]
    goes = lab.full_task("eight days", days=8)
    lab.server.tasks[goes]["name"] = 'with token: "a-wrong-secret"'
    arguments = ("--folder", lab.folder, "--folder", unmounted, "--older-than", "7")
    before, found = lab.objects(), json.loads(lab.delete(*arguments, "--json", code=1))["tasks"]
    assert (tmp_path / "precious.bin").exists()
    assert {*lab.server.tasks} >= {*kept, user, child, *reasons, *failures}
    assert lab.objects() == [key for key in before if goes not in key]
    assert {item["id"] for item in found} == {goes, *reasons, *failures}
    for item in found:
        assert (reasons | failures).get(item["id"], "") in item["reason"]
        assert (item["deleted"], item["failed"]) == (item["id"] == goes, item["id"] in failures)
        assert item["id"] != goes or [*item["objects"].values()] == [1000] * 4
    for task in failures:
        del lab.server.tasks[task]
    said = lab.delete(*arguments)
    assert len(re.findall("^left ", said, re.MULTILINE)) == len(reasons), "exit code 0"
    assert re.search(r"^its folder \(\w+\), \d+ days; stays: file://", said, re.MULTILINE), "with a count"


@pytest.mark.parametrize("denied", ["GET .*[?&]prefix=", "DELETE"])
def test_keys_that_may_not_list_or_delete(lab: Lab, denied: str) -> None:
    """Without a listing what is recorded can still be deleted."""
    with Front(lab.s3, f"^0 {denied}", "AccessDenied") as front:
        lab.s3 = copy(lab.s3)
        lab.s3.host = front.host
        lab.machine.configure(lab.server.configuration(), lab.s3.clearml_conf())
        task = lab.full_task("recorded")
        unrecorded, before = lab.put(f"recorded.{task}/unrecorded.bin"), lab.left()
        if denied == "DELETE":
            assert re.search("^left recorded .*cannot delete: forbidden: ", lab.delete(code=1), re.MULTILINE)
            assert lab.left() == before
        else:
            assert re.search("^deleted recorded .* 4.00kB.*; .*cannot list.*AccessDenied", lab.delete(), re.MULTILINE)
            assert (lab.tasks(), [lab.s3.uri(key) for key in lab.objects()]) == ([], [unrecorded])


def test_what_is_its_own_goes_and_what_it_shares_or_only_points_to_stays(lab: Lab) -> None:
    """A model and its user go together; a data set, an input artifact and another web site's image are not its own."""
    task, user, long_ago = lab.full_task("maker"), lab.full_task("user"), "2026-01-01T00:00:00.000000+00:00"
    model = lab.model_of(task)
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model}]
    lab.server.tasks[task]["created"] = long_ago
    lab.server.tasks[task]["models"]["input"] = [{"name": "checkpoint", "model": model}]  # it went on from its own
    data = lab.put("data/set.zip")
    lab.artifact(task, data)
    lab.artifact(task, f"{data}.2", mode="input")
    lab.image(task, f"https://example.invalid/offline-{'0' * 32}/cat.png")
    lab.model(task, "https://example.invalid/pretrained.bin")
    registered = lab.put("registered.bin")
    lab.model(task, registered)  # this one is its own, whatever links to it besides
    lab.artifact(task, registered)
    shared = lab.put("shared/model.bin")
    killed, linked = (lab.task(name, output_dest=lab.s3.uri()) for name in ("killed", "linked"))
    alive = lab.task("alive", archived=False)
    for sharer in (lab.task("one"), lab.task("two"), alive):
        lab.model(sharer, shared)
    lab.put(f"killed.{killed}/unrecorded.bin")
    recorded, used = (lab.put(f"killed.{killed}/{number}.bin") for number in range(2))
    for owner, address in ((killed, recorded), (alive, recorded), (alive, used)):
        lab.model(owner, address)
    lab.artifact(alive, lab.put(f"linked.{linked}/data.bin"))
    said = lab.delete()
    assert re.search("^deleted maker .* 3 linked objects", said, re.MULTILINE)
    assert len(re.findall("^deleted (one|two) .* 1 linked object", said, re.MULTILINE)) == 2
    assert re.search("^deleted killed .* 2 linked objects, 1 unrecorded object, 1.00kB", said, re.MULTILINE)
    assert re.search(f"^left linked .* task {alive} has a link to its unrecorded object", said, re.MULTILINE)
    assert lab.tasks() == [linked, alive]
    assert {re.sub(".*/", "", key) for key in lab.objects()} == {"set.zip", "model.bin", "0.bin", "1.bin", "data.bin"}
    lab.archive(alive)
    lab.server.tasks[alive]["created"] = long_ago
    lab.model(lab.task("another"), shared)
    lab.delete()
    assert lab.tasks() == [linked], "newer than what linked to it, it came first, and goes with the next run"
    lab.delete()
    assert lab.left() == ([], [], [f"{lab.project}/data/set.zip"])


# --- kill -9, and what changes meanwhile -----------------------------------------------------------------------------
def test_kill_9_at_any_step_leaves_nothing_that_the_next_run_does_not_find(lab: Lab) -> None:
    """Each run is killed one change later than the one before, and goes on with what that one has left.

    The changes: four objects, one of them in no record, two folders, the record.
    """
    task = lab.task("victim", output_dest=lab.gcs.uri())
    lab.put(f"victim.{task}/artifacts/unrecorded.bin", "gcs")
    for store in ("s3", "folder"):
        lab.model(task, lab.put(f"victim.{task}/models/model.bin", store))
    lab.image(task, lab.put(f"victim.{task}/metrics/image.png"))
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        machine = replace(lab.machine, variables={**lab.machine.variables, "STEP": str(step), "ACTION": "kill"})
        code = machine.run(*HOOKED, lab.project, "--delete", "--yes", "--folder", lab.folder, code=None).returncode
        assert lab.tasks() or not lab.objects(), "the record goes last"
        assert len(lab.left()[1]) == 2 or not lab.objects()
    assert (code, lab.left()) == (0, GONE)
    assert step > 4
    assert not [*lab.folder.rglob("victim*")]


def test_a_task_that_changes_after_it_was_listed_stays(lab: Lab) -> None:
    changed = [lab.full_task("published"), lab.full_task("no longer archived")]
    lab.full_task("the newest, which goes first")

    def change() -> None:
        lab.server.tasks[changed[0]]["status"] = "published"
        lab.server.tasks[changed[1]]["system_tags"] = []

    said = lab.disturb(1, change, code=0)
    assert lab.tasks() == changed
    assert len(lab.objects()) == 8
    assert re.search(f"^left .*{changed[0]}.*it is published", said, re.MULTILINE)
    assert re.search(f"^left .*{changed[1]}.*no longer", said, re.MULTILINE)


def test_what_dies_in_the_middle_is_no_loss_and_the_next_run_goes_on(lab: Lab) -> None:
    """First the store, then the server. What a task has elsewhere stays with the rest of it; the others go."""
    lab.full_task("all of it elsewhere", "gcs")
    tasks = [lab.full_task(f"task {number}") for number in range(3)]
    lab.model(tasks[1], lab.put(f"task 1.{tasks[1]}/models/elsewhere.bin", "gcs"))

    def lose_the_store() -> None:
        while len(lab.objects()) == 4 + 3 * 4 + 1:
            time.sleep(0.02)
        lab.s3.stop()

    said = lab.disturb(2, lose_the_store)  # one object is being deleted
    lab.s3.start()
    assert len(re.findall("^left .*no answer", said, re.MULTILINE)) == 3
    assert lab.tasks() == tasks
    assert len(lab.objects()) == 3 * 4 + 1 - 1
    said = lab.disturb(7, lab.server.stop)  # that task is gone, the next one's first object is about to be deleted
    lab.server.start()
    assert said.count("left ") == said.count("no answer to models.delete") == 1, "the third task is not even tried"
    assert len(lab.objects()) == 4
    assert re.search(f"{tasks[1]}.* 5 missing objects", lab.delete())
    assert lab.left() == GONE


# --- use ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("full", [True, False], ids=["a disk that is full", "a reader that has left"])
def test_an_output_that_takes_nothing_ends_the_clean_up_in_a_line_or_silence(lab: Lab, full: bool) -> None:
    """The doctor's exit code is that of what it found."""
    lab.task("first")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if full else writer, "w") as output:
        run = lab.machine.start(*CLEANUP, lab.project, stdout=output.fileno())
        broken = ("--only", "storage", "--output-uri", "/no/such/folder")
        doctor = lab.machine.start("-m", "clearml_client.doctor", *broken, stdout=output.fileno())
    assert (run.end(), doctor.end(), doctor.stderr) == (1, 1, "")
    assert re.fullmatch(r"clearml_client\.cleanup: error: .*No space left on device.*\n" if full else "", run.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("--delete", "--yes"), ("--older-than -1", "not between"), ("--older-than nan", "not between")]
    + [(f"--folder {folder}", "no folder") for folder in ("/does/not/exist", "/")],
)
def test_wrong_use_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    monkeypatch.setattr(sys, "argv", ["cleanup", "--project-name", "x", *arguments.split()])
    with pytest.raises(SystemExit, match="2"):
        cleanup.parse_args()
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_without_a_task_or_a_project_or_a_server_it_says_so(lab: Lab) -> None:
    assert "0 archived tasks, unchanged for more than 1 day\n" in lab.delete("--older-than", "1")
    lab.project = lab.project.replace("/", ".")
    done = lab.run(code=2)
    assert done.stdout == ""
    assert done.stderr == f"clearml_client.cleanup: error: no project '{lab.project}' on the server\n"
    (lab.machine.home / "clearml.conf").unlink()
    error = lab.run(code=1).stderr
    assert error.startswith("clearml_client.cleanup: error: no ClearML server: no server is configured")


ANSWERS = [("y\n", 1, "Nothing was deleted."), ("\x04", 1, "stopped; the same"), ("yes\n", 0, "Left: 0 tasks.")]


@pytest.mark.parametrize(("answer", "code", "words"), ANSWERS)
def test_asks_on_a_terminal_and_shows_a_bar_there(lab: Lab, answer: str, code: int, words: str) -> None:
    for number in range(3):
        lab.task(f"task {number}")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    ends: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    run = lab.machine.start(*CLEANUP, lab.project, "--delete", **ends)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # the other end is closed
        while data := os.read(ours, 10_000):
            text += data
            if text.endswith(b"for good: "):
                os.write(ours, answer.encode())
    os.close(ours)
    assert run.end() == code
    shown = text.decode()
    assert "To delete: 3 tasks" in shown.partition("Type yes")[0]
    assert len(lab.tasks()) == (3 if code else 0)
    assert ("deleted:   0%" in shown) == (code == 0)
    assert words in shown
