"""The clean-up against a stand-in server and real stores: what goes, what stays and why, and what a kill -9 leaves."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run, silent
from stores import FakeGCS, Rclone, S3Store, SeaweedFS, Store

from clearml_client import cleanup, storage

CLEANUP = ("-m", "clearml_client.cleanup", "--project-name")
DELETE = ("--delete", "--yes")
PROBE = ".cleanup-probe"
HOOKED = ("tests/programs/hook.py", "--project-name")
GONE: tuple[list[str], ...] = ([], [], [])


def entry(store: Store, **changes: str) -> str:
    """The store's entry for sdk.aws.s3.credentials."""
    return re.findall(r"\[ (.*) \]", store.clearml_conf(**changes))[0] if isinstance(store, S3Store) else ""


class Lab:
    """A team's project: tasks as the SDK would have left them, and their objects in real stores."""

    def __init__(self, server: ClearMLServer, folder: Path, *stores: Store) -> None:
        self.server, self.stores, self.project = server, stores, f"cleanup/{uuid4().hex[:8]}"
        self.project_id = server.projects_create(self.project)["id"]
        self.made: list[str] = []
        self.folder = folder / "disk"
        self.folder.mkdir()
        self.machine = Machine(folder / "home")
        self.machine.home.mkdir(exist_ok=True)
        self.configure(*filter(None, map(entry, stores)))
        for store in stores:
            if isinstance(store, FakeGCS):
                self.machine.variables |= store.environment()

    def configure(self, *entries: str) -> None:
        self.machine.configure(self.server.configuration(), f"sdk.aws.s3.credentials: [ {', '.join(entries)} ]")

    def run(self, *arguments: object, **variables: str) -> Run:
        machine = Machine(self.machine.home, {**self.machine.variables, **variables})
        command = HOOKED if "STEP" in variables else CLEANUP
        done = machine.run(*command, self.project, *arguments)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def delete(self, *arguments: object, **variables: str) -> str:
        """A run that deletes all that it lists, and what it says."""
        done = self.run(*DELETE, *arguments, **variables)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def keep(self, *arguments: object) -> str:
        """A run that should delete, and leaves everything, with exit code 1; and what it says."""
        before = self.left()
        done = self.run(*DELETE, *arguments)
        assert (done.returncode, self.left()) == (1, before), done.stdout
        return done.stdout

    def run_by(self, command: list[str], *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """A fresh process, started by another command that deprives it of something."""
        whole = [*command, sys.executable, *CLEANUP, self.project, *map(str, arguments)]
        environment = {**self.machine.environment, **variables}
        return subprocess.run(whole, env=environment, cwd=ROOT, capture_output=True, text=True)

    def archive(self, task: str, days: float = 40) -> None:
        changed = datetime.now(UTC) - timedelta(days=days)
        self.server.tasks[task] |= {"status_changed": changed.isoformat(), "system_tags": ["archived"]}

    def task(self, name: str, status: str = "completed", days: float = 40, archived: bool = True, **more: Any) -> str:
        server = self.server
        task: str = server.tasks_create(name, "training", project=self.project_id, **more)["id"]
        self.made.append(task)
        self.archive(task, days)
        server.tasks[task] |= {"status": status, "system_tags": ["archived"] if archived else []}
        return task

    def model(self, task: str, address: str) -> None:
        name = f"model {len(self.server.models)}"
        model = self.server.models_create(address, name, False, project=self.project_id, task=task)["id"]
        self.server.tasks[task]["models"]["output"].append({"name": name, "model": model})

    def artifact(self, task: str, address: str, mode: str = "output") -> None:
        artifacts = self.server.tasks[task]["execution"]["artifacts"]
        artifacts.append({"key": f"artifact {len(artifacts)}", "mode": mode, "uri": address})

    def image(self, task: str, address: str, iteration: int = 0) -> None:
        event = {"type": "training_debug_image", "task": task, "url": address, "iter": iteration, "metric": "images"}
        event |= {"variant": address, "timestamp": iteration}
        self.server.events[task][uuid4().hex] = event

    def plot(self, task: str, *addresses: str) -> None:
        text = json.dumps({"data": [], "layout": {"images": [{"source": address} for address in addresses]}})
        event = {"type": "plot", "task": task, "plot_str": text, "iter": 0, "metric": "plots", "variant": text}
        self.server.events[task][uuid4().hex] = event

    def full_task(self, name: str, store: Store | str, **more: Any) -> str:
        """A task with one of each kind in a store."""
        task = self.task(name, **more)
        for kind in ("model", "artifact", "image", "plot"):
            getattr(self, kind)(task, self.put(store, f"{self.project}/{name}.{task}/{kind}s/{kind}.bin"))
        return task

    def put(self, store: Store | str, key: str) -> str:
        """Write an object of 1000 bytes and return its address."""
        data = b"x" * 1000
        if isinstance(store, S3Store):
            with closing(store.client()) as s3:
                s3.put_object(Bucket=store.bucket, Key=key, Body=data)
            return store.uri(key)
        if isinstance(store, FakeGCS):
            with closing(store.client()) as gcs:
                gcs.bucket(store.bucket).blob(key).upload_from_string(data, timeout=5, retry=None)
            return store.uri(key)
        path = (self.server.files_folder if store == "files" else self.folder) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"{self.server.files_url}/{key}" if store == "files" else f"file://{path}"

    def objects(self) -> list[str]:
        """Every object of this project, in every store."""
        keys = [key for store in self.stores for key in store.keys()]
        for folder in (self.folder, self.server.files_folder):
            keys += [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        mine = (self.project, *(f"{PROBE}-{task}" for task in self.made))
        return sorted(key for key in keys if any(words in key for words in mine))

    def tasks(self) -> list[str]:
        return [task["id"] for task in self.server.tasks.values() if task["project"] == self.project_id]

    def models(self) -> list[str]:
        return [model["id"] for model in self.server.models.values() if model["project"] == self.project_id]

    def left(self) -> tuple[list[str], list[str], list[str]]:
        return self.tasks(), self.models(), self.objects()

    def pause(self, step: int) -> subprocess.Popen[str]:
        """Start a run that waits before its step-th change."""
        hook = {"STEP": str(step), "ACTION": "pause"}
        machine = Machine(self.machine.home, {**self.machine.variables, **hook})
        process = machine.start(*HOOKED, self.project, *DELETE)
        while not (self.machine.home / "paused").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    def go_on(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        (self.machine.home / "paused").unlink()
        stdout, stderr = process.communicate()
        assert "Traceback" not in stdout + stderr, stderr
        return process.returncode, stdout


@pytest.fixture
def lab(stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone) -> Lab:
    return Lab(stand_in, tmp_path, rclone)


# --- what goes ------------------------------------------------------------------------------------------------------
def test_only_lists_without_delete(lab: Lab, rclone: Rclone) -> None:
    """Also where the output lacks a letter."""
    task = lab.full_task("näme", rclone)
    before = lab.left()
    asked = len(lab.server.requests)
    done = lab.run(PYTHONIOENCODING="ascii")
    assert (done.returncode, lab.left()) == (0, before)
    assert not [r for r in lab.server.requests[asked:] if "delete" in r.path or r.method in ("DELETE", "PUT")]
    assert rf"n\xe4me ({task}), 40 days: 1 model, 1 artifact, 2 images, 4 KB in {rclone.uri()}" in done.stdout
    assert "add --delete" in done.stdout


def test_deletes_from_every_kind_of_store(
    stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone, seaweed: SeaweedFS, gcs: FakeGCS
) -> None:
    """Several in one task, by the entries of clearml.conf and by variables; what is gone already is no trouble."""
    lab = Lab(stand_in, tmp_path, rclone, seaweed, gcs)
    mixed = lab.task("all of them")
    for store in (rclone, seaweed, gcs, "files", "folder"):
        lab.full_task("one store", store)
        address = lab.put(store, f"{lab.project}/all of them.{mixed}/models/model.bin")
        lab.model(mixed, address)
        lab.model(mixed, address.replace("model.bin", "never.bin"))
    by_variables = lab.put(rclone, f"{lab.project}/all of them.{mixed}/models/variables.bin")
    lab.model(mixed, by_variables.replace(f"{rclone.host}/", ""))
    lab.artifact(mixed, lab.put("folder", f"{lab.project}/all of them.offline-{uuid4().hex}/models/model.bin"))
    asked = len(stand_in.requests)
    text = lab.delete("--folder", lab.folder, **rclone.environment())
    assert lab.left() == GONE
    assert not [*lab.folder.rglob("*all of them*")], "an empty folder was left"
    assert re.search(r"^deleted all of them .*5 already gone", text, re.MULTILINE)
    assert re.search(r"^Deleted: 6 tasks, .*Left: 0 tasks\.$", text, re.MULTILINE)
    deletions = [r for r in stand_in.requests[asked:] if r.path == "tasks.delete"]
    assert all(not r.data["delete_external_artifacts"] for r in deletions), "the server must not delete on its own"


def test_names_with_special_characters_as_the_sdk_writes_them(lab: Lab, rclone: Rclone, gcs: FakeGCS) -> None:
    """The SDK's own tasks. The file server's addresses are quoted, except those of models."""
    lab.stores += (gcs,)
    lab.machine.variables |= gcs.environment()
    lab.project += " ä #1 ?%"
    targets = (rclone.uri("runs"), gcs.uri("runs"), lab.server.files_url, lab.folder)
    made = lab.machine.run("tests/programs/make_tasks.py", lab.project, *targets)
    assert made.returncode == 0, made.stderr
    (project,) = [project for project in lab.server.projects.values() if project["name"] == lab.project]
    lab.project_id = project["id"]
    for task in lab.tasks():
        lab.archive(task)

    def stored() -> list[str]:
        files = [path for folder in (lab.server.files_folder, lab.folder) for path in folder.rglob("*")]
        keys = [*rclone.keys(), *gcs.keys(), *(str(path) for path in files if path.is_file())]
        return [key for key in keys if "%231" in key]

    assert len(stored()) == 4 * 5, stored()
    assert "already gone" not in lab.delete("--folder", lab.folder)
    assert (lab.tasks(), lab.models(), stored()) == ([], [], [])


@pytest.mark.parametrize("where", ["S3", "folder"])
def test_what_an_offline_session_stored_goes_with_its_last_import(lab: Lab, rclone: Rclone, where: str) -> None:
    """Each import is a task with an id of its own, and the model's address has that of the session."""
    names = ("--project-name", lab.project, "--task-name", "offline")
    target = rclone.uri("runs") if where == "S3" else lab.folder
    run = lab.machine.train("--offline", "--dry-run", *names, "--output-uri", target)
    assert run.returncode == 0, run.stderr
    (model,) = lab.objects()
    for _ in range(2):
        clearml_task = Path(sys.executable).with_name("clearml-task")
        done = lab.machine.run(clearml_task, "--import-offline-session", lab.machine.session())
        assert done.returncode == 0, done.stderr
    first, second = lab.tasks()
    lab.archive(first)
    assert "1 not its own" in lab.delete("--folder", lab.folder)
    assert lab.tasks() == [second]
    assert model in lab.objects()
    lab.archive(second)
    lab.delete("--folder", lab.folder)
    assert lab.left() == GONE


def test_every_image_goes_and_every_image_of_a_plot(lab: Lab) -> None:
    """More events than the server gives at once, and more than the 100 that the SDK deletes; each address once."""
    task = lab.task("many images")
    addresses = [lab.put("files", f"{lab.project}/x.{task}/metrics/{number}.png") for number in range(130)]
    for iteration in range(1100):
        lab.image(task, addresses[iteration if iteration < 120 else 0], iteration)
    lab.plot(task, *addresses[120:], "data:image/png;base64,AAAA")
    lab.server.events[task]["odd"] = {**lab.server.events[task].popitem()[1], "plot_str": "{no json", "iter": 1}
    lab.plot(task, *addresses[120:])
    assert "130 images" in lab.delete()
    assert lab.left() == GONE


def test_more_tasks_than_the_server_gives_at_once(lab: Lab) -> None:
    for number in range(501):
        lab.task(f"task {number}")
    done = lab.run()
    assert "501 archived tasks" in done.stdout
    assert len(set(re.findall("^task [0-9]+ ", done.stdout, re.MULTILINE))) == 501


def test_only_old_and_archived_tasks_of_the_project_go(lab: Lab) -> None:
    lab.task("eight days", days=8)
    kept = [lab.task("six days", days=6), lab.task("not archived", archived=False)]
    below = lab.task("in the project below", days=8)
    lab.server.tasks[below]["project"] = lab.server.projects_create(f"{lab.project}/below")["id"]
    lab.delete("--older-than", "7")
    assert lab.tasks() == kept
    assert below in lab.server.tasks


def test_nothing_to_do(lab: Lab) -> None:
    done = lab.run(*DELETE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 archived tasks" in done.stdout


# --- what stays, and why --------------------------------------------------------------------------------------------
def test_what_is_in_use_published_or_elsewhere_stays_with_the_reason(lab: Lab, rclone: Rclone) -> None:
    def keep(name: str, status: str = "completed", store: Store | str = rclone) -> str:
        return lab.full_task(name, store, status=status)

    def model_of(task: str) -> str:
        return str(lab.server.tasks[task]["models"]["output"][0]["model"])

    reasons = {}
    for status in ("published", "publishing", "in_progress", "queued"):
        reasons[keep(status, status)] = f"it is {status.replace('in_progress', 'running')}"
    with_published_model = keep("published model")
    lab.server.models[model_of(with_published_model)]["ready"] = True
    reasons[with_published_model] = f"({model_of(with_published_model)}) is published"
    used = keep("used model")
    user = lab.task("user", archived=False)
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model_of(used)}]
    reasons[used] = f"is used by task {user}"
    parent = keep("parent")
    child = lab.task("child", status="published", archived=False, parent=parent)
    reasons[parent] = f"its child {child} is published"
    data = keep("data set")
    lab.server.tasks[data]["system_tags"] = ["archived", "dataset"]
    reasons[data] = "it is a ClearML dataset"
    owner = keep("owner")
    linker = lab.task("linker", archived=False)
    lab.artifact(linker, lab.server.tasks[owner]["execution"]["artifacts"][0]["uri"])
    reasons[owner] = f"task {linker} has a link to its artifact"
    reasons[keep("in a folder", store="folder")] = "is not below a --folder"
    for address, reason in {
        "https://old-files.invalid": "https://old-files.invalid is not a file server of this configuration",
        "azure://account.invalid/container": "azure:// is no storage that this command knows",
    }.items():
        elsewhere = lab.task(address)
        lab.model(elsewhere, f"{address}/x.{elsewhere}/model.bin")
        reasons[elsewhere] = reason
    said = lab.keep().splitlines()
    for task, reason in reasons.items():
        (line,) = [line for line in said if line.startswith("left") and f"({task})" in line]
        assert reason in line
    assert lab.server.models[model_of(used)]["task"] == used
    assert lab.server.tasks[child]["parent"] == parent


def test_what_is_its_own_goes_and_what_it_only_points_to_stays(lab: Lab, rclone: Rclone) -> None:
    """A model and its user go together; a data set, an input artifact and another web site's image are not its own."""
    task, user = lab.full_task("maker", rclone), lab.full_task("user", rclone)
    model = lab.server.tasks[task]["models"]["output"][0]["model"]
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model}]
    lab.server.tasks[task] |= {"created": "2026-01-01T00:00:00.000000+00:00"}
    lab.server.tasks[task]["models"]["input"] = [{"name": "checkpoint", "model": model}]  # it went on from its own
    data = lab.put(rclone, f"{lab.project}/data/set.zip")
    lab.artifact(task, data)
    lab.artifact(task, f"{data}.2", mode="input")
    lab.image(task, "https://example.invalid/cat.png")
    lab.model(task, "https://example.invalid/pretrained.bin")
    registered = lab.put(rclone, f"{lab.project}/registered.bin")
    lab.model(task, registered)  # this one is its own, whatever links to it besides
    lab.artifact(task, registered)
    assert "3 not its own" in lab.delete()
    assert lab.left() == ([], [], [f"{lab.project}/data/set.zip"])


def test_an_object_of_several_tasks_goes_with_the_last(lab: Lab, rclone: Rclone) -> None:
    address = lab.put(rclone, f"{lab.project}/shared/model.bin")
    for name in ("one", "two"):
        lab.model(lab.task(name), address)
    alive = lab.task("alive", archived=False)
    lab.model(alive, address)
    assert lab.delete().count("1 not its own") == 2 * 2  # of two tasks, when listed and when deleted
    assert lab.tasks() == [alive]
    assert len(lab.objects()) == 1
    lab.archive(alive)
    lab.model(lab.task("five"), address)
    lab.delete()
    assert lab.left() == GONE


def test_files_outside_the_folder_stay(lab: Lab, tmp_path: Path) -> None:
    lab.full_task("inside", "folder")
    precious = tmp_path / "precious.bin"
    precious.write_text("precious")
    (lab.folder / "link.bin").symlink_to(precious)
    (lab.folder / "way out").symlink_to(tmp_path)
    lab.model(lab.task("through a link"), f"file://{lab.folder}/link.bin")
    ways = (f"file://{precious}", f"file://{lab.folder}/../precious.bin", f"file://{lab.folder}/way out/precious.bin")
    outside = [lab.task(f"by {address}") for address in (*ways, str(precious))]
    for task, address in zip(outside, (*ways, str(precious)), strict=True):
        lab.model(task, address)
    done = lab.run(*DELETE, "--folder", lab.folder)
    assert done.returncode == 1
    assert lab.tasks() == outside
    assert done.stdout.count("is not below a --folder") == 2 * 4
    assert precious.read_text() == "precious"
    assert not (lab.folder / "link.bin").is_symlink()


# --- stores that say no ---------------------------------------------------------------------------------------------
def test_what_lies_in_a_store_that_is_down_or_silent_stays_whole(stand_in: ClearMLServer, tmp_path: Path) -> None:
    """Also what these tasks have elsewhere; the others go."""
    with Rclone(tmp_path / "rclone") as rclone, FakeGCS(tmp_path / "gcs") as gcs, silent() as quiet:
        lab = Lab(stand_in, tmp_path, rclone, gcs)
        lab.configure(entry(rclone), entry(rclone, host=quiet))
        tasks = [lab.full_task("down", rclone), lab.full_task("down, too", rclone), lab.full_task("cloud", gcs)]
        lab.artifact(tasks[0], lab.put("files", f"{lab.project}/x.{tasks[0]}/artifacts/a.bin"))
        tasks.append(lab.task("silent"))
        lab.model(tasks[-1], f"s3://{quiet}/models/x.{tasks[-1]}/model.bin")
        before = lab.objects()
        lab.full_task("well", "files")
        rclone.stop()
        gcs.stop()
        done = lab.run(*DELETE)
        assert done.returncode == 1
        assert done.stdout.count("no answer") == 2 * len(tasks), done.stdout
        assert lab.tasks() == tasks
        rclone.start()
        gcs.start()
        assert lab.objects() == before


def test_a_store_that_dies_in_the_middle_is_finished_by_the_next_run(stand_in: ClearMLServer, tmp_path: Path) -> None:
    with Rclone(tmp_path / "store") as store:
        lab = Lab(stand_in, tmp_path, store)
        lab.full_task("first", store)
        second = lab.full_task("second", store)
        process = lab.pause(step=4)  # a probe was written and deleted, and one object deleted
        assert len(lab.objects()) == 7
        store.stop()
        code, text = lab.go_on(process)
        assert code == 1
        assert "no answer" in text
        assert len(lab.tasks()) == 2
        store.start()
        assert re.search(f"{second}.* already gone", lab.delete())
        assert lab.left() == GONE


READER = dict(zip(("key", "secret"), SeaweedFS.READER, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"secret": "a-wrong-secret"}, "forbidden"), (READER, "AccessDenied"), ({"host": "other:1"}, "no keys")],
    ids=["wrong keys", "no permission to delete", "no entry"],
)
def test_a_store_that_refuses_is_named(
    stand_in: ClearMLServer, tmp_path: Path, seaweed: SeaweedFS, changes: dict[str, str], words: str
) -> None:
    lab = Lab(stand_in, tmp_path, seaweed)
    task = lab.full_task("whole", seaweed)
    lab.configure(entry(seaweed, **changes))
    assert re.search(f"^left .*{task}.*{words}", lab.keep(), re.MULTILINE)


def test_a_missing_bucket_is_no_proof_that_an_object_is_gone(
    stand_in: ClearMLServer, tmp_path: Path, seaweed: SeaweedFS, gcs: FakeGCS
) -> None:
    """The name or the store may be wrong."""
    lab = Lab(stand_in, tmp_path, seaweed, gcs)
    for store in (seaweed, gcs):
        task = lab.task(type(store).__name__)
        lab.model(task, store.uri().replace(store.bucket, "another") + f"/x.{task}/model.bin")
    assert lab.keep().count("no such bucket") == 2
    assert "another" not in seaweed.buckets()


def test_a_folder_without_permission_to_delete_is_named(lab: Lab) -> None:
    lab.full_task("read-only", "folder")
    before = lab.left()
    # root may do everything, unless told otherwise
    command = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if command and not shutil.which("setpriv"):
        pytest.skip("root may do everything")
    folders = [path for path in lab.folder.rglob("*") if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    done = lab.run_by(command, *DELETE, "--folder", lab.folder)
    for path in folders:
        path.chmod(0o755)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cannot write: forbidden" in done.stdout
    assert lab.left() == before


def test_an_object_that_is_still_there_was_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.Folder, "_remove", lambda *_: None)
    (tmp_path / "model.bin").touch()
    with pytest.raises(storage.StorageError, match="was deleted, but is still there"):
        storage.Folder(str(tmp_path)).erase(str(tmp_path / "model.bin"))


# --- kill -9, and what changes meanwhile -----------------------------------------------------------------------------
def test_kill_9_at_any_step_leaves_nothing_that_the_next_run_does_not_find(lab: Lab, rclone: Rclone) -> None:
    """Each run is killed one change later than the one before, and goes on with what that one has left.

    The changes: a probe in each of three stores is written and deleted, four objects, two folders, the record.
    """
    task = lab.task("victim")
    for store in (rclone, "files", "folder"):
        lab.model(task, lab.put(store, f"{lab.project}/victim.{task}/models/model.bin"))
    lab.image(task, lab.put(rclone, f"{lab.project}/victim.{task}/metrics/image.png"))
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        code = lab.run(*DELETE, "--folder", lab.folder, STEP=str(step), ACTION="kill").returncode
        assert lab.tasks() or not lab.objects(), "the record goes last"
        assert len(lab.models()) == 3 * len(lab.tasks())
        if step <= 7:
            assert len(lab.objects()) == (5 if step in (2, 4, 6) else 4), "objects go after all probes"
    assert code == 0
    assert step > 10
    assert lab.left() == GONE
    assert not [*lab.folder.rglob("victim*")]


def test_a_task_that_changes_after_it_was_listed_stays(lab: Lab, rclone: Rclone) -> None:
    lab.full_task("first", rclone)
    second = lab.full_task("second", rclone)
    third = lab.full_task("third", rclone)
    for number, task in enumerate((third, second)):
        lab.server.tasks[task]["created"] = f"2026-01-0{number + 1}T00:00:00+00:00"
    process = lab.pause(step=1)
    lab.server.tasks[second]["system_tags"] = []
    lab.server.tasks[third]["status"] = "published"
    code, text = lab.go_on(process)
    assert code == 1
    assert lab.tasks() == [second, third]
    assert len(lab.objects()) == 8
    assert "no longer" in text
    assert "it is published" in text


# --- servers that say no --------------------------------------------------------------------------------------------
def test_a_server_that_dies_in_the_middle_is_no_loss(tmp_path: Path, rclone: Rclone) -> None:
    server = ClearMLServer(tmp_path / "server")
    server.start()
    lab = Lab(server, tmp_path, rclone)
    for number in range(3):
        lab.full_task(f"task {number}", rclone)
    process = lab.pause(step=8)  # one task is gone, the next one's probe is about to be written
    server.stop()
    code, text = lab.go_on(process)
    assert code == 1
    assert text.count("no answer to tasks.delete") == 2, "the third task is not even tried"
    assert len(lab.objects()) == 4
    server.start()
    assert "4 already gone" in lab.delete()
    server.stop()
    assert lab.left() == GONE


# --- use ------------------------------------------------------------------------------------------------------------
def test_json_has_every_task_with_its_bytes_and_its_reason(lab: Lab, rclone: Rclone) -> None:
    task = lab.full_task("first", rclone)
    lab.server.tasks[task]["name"] = 'with token: "a-wrong-secret"'
    kept = lab.full_task("second", rclone, status="published")
    done = lab.run(*DELETE, "--json")
    assert done.returncode == 1
    found = {item["id"]: item for item in json.loads(done.stdout)["tasks"]}
    assert found.keys() == {task, kept}
    assert found[task]["deleted"] is True
    assert found[task]["bytes"] == {rclone.uri(): 4000}
    assert len(found[task]["objects"]) == 4
    assert (found[kept]["deleted"], found[kept]["reason"]) == (False, "it is published")


@pytest.mark.parametrize("full", [True, False], ids=["a disk that is full", "a reader that has left"])
def test_an_output_that_takes_nothing_ends_the_run_in_silence_or_one_line(lab: Lab, full: bool) -> None:
    lab.task("first")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as disk:
        process = lab.machine.start(*CLEANUP, lab.project, stdout=disk if full else writer)
    os.close(writer)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"clearml_client\.cleanup: error: .*No space left on device.*\n" if full else "", errors)


def test_a_user_without_home(lab: Lab) -> None:
    """As in a container that runs by number."""
    lab.task("first")
    keys = {"CLEARML_API_ACCESS_KEY": lab.server.access_key, "CLEARML_API_SECRET_KEY": lab.server.secret_key}
    user = ["setpriv", "--reuid=54321", "--clear-groups"] if os.geteuid() == 0 and shutil.which("setpriv") else []
    done = lab.run_by(["env", "-u", "HOME", *user], CLEARML_API_HOST=lab.server.api_url, **keys)
    assert done.returncode == 0, done.stderr
    assert "1 archived task" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--project-name x --delete", "--yes"),
        ("--project-name x --older-than -1", "not between"),
        ("--project-name x --older-than nan", "not between"),
        ("--project-name x --folder /does/not/exist", "no folder"),
        ("--project-name x --folder /", "no folder"),
        ("", "--project-name"),
    ],
)
def test_wrong_use_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cleanup", *arguments.split()])
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # no terminal
    with pytest.raises(SystemExit) as ended:
        cleanup.parse_args()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_project_that_is_not_there_is_wrong_use(lab: Lab) -> None:
    lab.project = "no such.project"
    done = lab.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clearml_client.cleanup: error: no project 'no such.project' on the server\n"


def test_no_configuration_is_an_error(machine: Machine) -> None:
    done = machine.run(*CLEANUP, "anything")
    assert done.returncode == 1
    assert done.stderr.startswith("clearml_client.cleanup: error: no ClearML server: no server is configured")


@pytest.mark.parametrize(("answer", "code"), [("no\n", 1), ("\x04", 1), ("yes\n", 0)])
def test_asks_on_a_terminal_and_shows_a_bar_there(lab: Lab, answer: str, code: int) -> None:
    for number in range(3):
        lab.task(f"task {number}")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    ends: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = lab.machine.start(*CLEANUP, lab.project, "--delete", **ends)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # the other end is closed
        while data := os.read(ours, 10_000):
            text += data
            if text.endswith(b"[yes/no] "):
                os.write(ours, answer.encode())
    os.close(ours)
    assert process.wait() == code
    shown = text.decode()
    assert "To delete: 3 tasks" in shown.partition("[yes/no]")[0]
    assert len(lab.tasks()) == (3 if code else 0)
    assert ("tasks:   0%" in shown) == (code == 0)
    assert ("Nothing was deleted." in shown) == (code == 1)
