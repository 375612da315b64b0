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
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run
from stores import FakeGCS, Rclone, S3Store, SeaweedFS

from clearml_client import cleanup

CLEANUP = ("-m", "clearml_client.cleanup", "--project-name")
HOOKED = ("tests/programs/hook.py", "--project-name")
DELETE = ("--delete", "--yes")
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

    def run(self, *arguments: object, **variables: str) -> Run:
        machine = replace(self.machine, variables={**self.machine.variables, **variables})
        done = machine.run(*HOOKED, self.project, *arguments)
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        return done

    def delete(self, *arguments: object, **variables: str) -> str:
        """What a run says that can do all that it should."""
        done = self.run(*DELETE, *arguments, **variables)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def disturb(self, step: int, disturbance: Callable[[], object], code: int = 1) -> str:
        """What a run says that something happens to before its step-th change."""
        variables = {**self.machine.variables, "STEP": str(step), "ACTION": "pause"}
        run = Run(replace(self.machine, variables=variables).start(*HOOKED, self.project, *DELETE))
        paused = self.machine.home / "paused"
        while not paused.exists():
            assert run.process.poll() is None, run.everything
            time.sleep(0.02)
        disturbance()
        paused.unlink()
        assert run.end() == code, run.everything
        assert "Traceback" not in run.everything
        return run.stdout

    def archive(self, task: str, days: float = 40) -> None:
        changed = datetime.now(UTC) - timedelta(days=days)
        self.server.tasks[task] |= {"status_changed": changed.isoformat(), "system_tags": ["archived"]}

    def task(self, name: str, status: str = "completed", days: float = 40, archived: bool = True, **more: Any) -> str:
        server = self.server
        task: str = server.tasks_create(name, "training", project=self.project_id, **more)["id"]
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

    def full_task(self, name: str, store: str = "s3", **more: Any) -> str:
        """A task with one of each kind in a store."""
        task = self.task(name, **more)
        for kind in ("model", "artifact", "image", "plot"):
            getattr(self, kind)(task, self.put(f"{name}.{task}/{kind}s/{kind}.bin", store))
        return task

    def model_of(self, task: str) -> str:
        return str(self.server.tasks[task]["models"]["output"][0]["model"])

    def put(self, path: str, store: str = "s3") -> str:
        """Write an object of 1000 bytes into s3, gcs, files or folder, and return its address."""
        key, data = f"{self.project}/{path}", b"x" * 1000
        if store == "s3":
            with closing(self.s3.client()) as s3:
                s3.put_object(Bucket=self.s3.bucket, Key=key, Body=data)
            return self.s3.uri(key)
        if store == "gcs":
            with closing(self.gcs.client()) as gcs:
                gcs.bucket(self.gcs.bucket).blob(key).upload_from_string(data, timeout=5, retry=None)
            return self.gcs.uri(key)
        file = (self.server.files_folder if store == "files" else self.folder) / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return f"{self.server.files_url}/{key}" if store == "files" else f"file://{file}"

    def objects(self) -> list[str]:
        """Every object of this project, in every store."""
        keys = [*self.s3.keys(), *self.gcs.keys()]
        for folder in (self.folder, self.server.files_folder):
            keys += [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return sorted(key for key in keys if self.project in key)

    def tasks(self) -> list[str]:
        return [task["id"] for task in self.server.tasks.values() if task["project"] == self.project_id]

    def models(self) -> list[str]:
        return [model["id"] for model in self.server.models.values() if model["project"] == self.project_id]

    def left(self) -> tuple[list[str], list[str], list[str]]:
        return self.tasks(), self.models(), self.objects()


class NoList(SeaweedFS):
    """Its second user may read, write and delete, but not list."""

    KEY, SECRET = SeaweedFS.READER

    def command(self) -> list[str]:
        command, config = super().command(), self.folder / "identities.json"
        config.write_text(config.read_text().replace('["Read", "List"]', '["Read", "Write"]'))
        return command


@pytest.fixture
def lab(stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone, gcs: FakeGCS) -> Lab:
    return Lab(stand_in, tmp_path, rclone, gcs)


# --- what goes ------------------------------------------------------------------------------------------------------
def test_without_delete_it_lists_everything_and_deletes_nothing(lab: Lab) -> None:
    """More tasks than the server gives at once, on an output that lacks a letter."""
    for number in range(500):
        lab.task(f"task {number}")
    task = lab.full_task("näme")
    before, asked = lab.left(), len(lab.server.requests)
    done = lab.run(PYTHONIOENCODING="ascii")
    assert (done.returncode, lab.left()) == (0, before)
    assert not [r for r in lab.server.requests[asked:] if "delete" in r.path or r.method in ("DELETE", "PUT")]
    assert "501 archived tasks" in done.stdout
    assert len(set(re.findall("^task [0-9]+ ", done.stdout, re.MULTILINE))) == 500
    assert rf"n\xe4me ({task}), 40 days: 1 artifact, 2 images, 1 model, 4.00kB in {lab.s3.uri()}" in done.stdout
    assert "add --delete" in done.stdout


def test_deletes_from_every_kind_of_store(lab: Lab) -> None:
    """Several in one task, by the entry of clearml.conf and by variables; what is gone already is no trouble."""
    mixed = lab.task("all of them")
    for store in ("s3", "gcs", "files", "folder"):
        lab.full_task("one store", store)
        address = lab.put(f"all of them.{mixed}/models/model.bin", store)
        lab.model(mixed, address)
        lab.model(mixed, address.replace("model.bin", "never.bin"))
    by_variables = lab.put(f"all of them.{mixed}/models/variables.bin")
    lab.model(mixed, by_variables.replace(f"{lab.s3.host}/", ""))
    asked = len(lab.server.requests)
    said = lab.delete("--folder", lab.folder, **lab.s3.environment())
    assert lab.left() == GONE
    assert not [*lab.folder.rglob("*all of them*")], "an empty folder was left"
    assert re.search(r"^deleted all of them .*4 missing objects", said, re.MULTILINE)
    assert "unrecorded" not in said, "two spellings of one address are one object"
    assert re.search(r"^Deleted: 5 tasks, .*Left: 0 tasks\.$", said, re.MULTILINE)
    deletions = [r for r in lab.server.requests[asked:] if r.path == "tasks.delete"]
    assert all(not r.data["delete_external_artifacts"] for r in deletions), "the server must not delete on its own"


def test_names_with_special_characters_as_the_sdk_writes_them(lab: Lab) -> None:
    """The SDK's own tasks. The file server's addresses are quoted, except those of models.

    The second task in each store that can be listed has lost all records, as if it had been killed before any.
    """
    lab.project += " ä #1 ?%"
    targets = (
        lab.server.files_url,
        *(uri for uri in (lab.s3.uri("runs"), lab.gcs.uri("runs"), lab.folder) for _ in "12"),
    )
    made = lab.machine.run("tests/programs/make_tasks.py", lab.project, *targets)
    assert made.returncode == 0, made.stderr
    (project,) = [project for project in lab.server.projects.values() if project["name"] == lab.project]
    lab.project_id = project["id"]
    for task in lab.tasks():
        lab.archive(task)
    for task in lab.tasks()[2::2]:
        lab.server.events[task].clear()
        lab.server.tasks[task]["execution"]["artifacts"].clear()
        lab.server.tasks[task]["models"]["output"].clear()
        lab.server.models = {id_: model for id_, model in lab.server.models.items() if model["task"] != task}

    def stored() -> list[str]:
        files = [path for folder in (lab.server.files_folder, lab.folder) for path in folder.rglob("*")]
        keys = [*lab.s3.keys(), *lab.gcs.keys(), *(str(path) for path in files if path.is_file())]
        return [key for key in keys if "%231" in key]

    assert len(stored()) == 7 * 5, stored()
    said = lab.delete("--folder", lab.folder)
    assert len(re.findall("^deleted .*: 5 unrecorded objects, [^,]*$", said, re.MULTILINE)) == 3
    assert "missing" not in said
    assert (lab.tasks(), lab.models(), stored()) == ([], [], [])


def test_what_an_offline_session_stored_goes_with_its_last_import(lab: Lab) -> None:
    """Each import is a task with an id of its own, and the model's address has that of the session."""
    for target in (lab.s3.uri("runs"), lab.folder):
        names = ("--project-name", lab.project, "--task-name", "offline")
        run = lab.machine.train("--offline", "--dry-run", *names, "--output-uri", target)
        assert run.returncode == 0, run.stderr
        session = lab.machine.session()
        for _ in range(2):
            clearml_task = Path(sys.executable).with_name("clearml-task")
            done = lab.machine.run(clearml_task, "--import-offline-session", session)
            assert done.returncode == 0, done.stderr
        session.unlink()
    models = [key for key in lab.objects() if "offline-" in key]
    assert len(models) == 2
    firsts, seconds = lab.tasks()[::2], lab.tasks()[1::2]
    for task in firsts:
        lab.archive(task)
    assert lab.delete("--folder", lab.folder).count("1 foreign object") == 2 * 2  # when listed and when deleted
    assert lab.tasks() == seconds
    assert {*models} <= {*lab.objects()}
    for task in seconds:
        lab.archive(task)
    lab.delete("--folder", lab.folder)
    assert lab.left() == GONE
    assert not [*lab.folder.rglob("offline*")], "an empty folder was left"


def test_every_image_goes_and_every_image_of_a_plot(lab: Lab) -> None:
    """More events than the server gives at once, and more than the 100 that the SDK deletes; each address once."""
    task = lab.task("many images")
    addresses = [lab.put(f"x.{task}/metrics/{number}.png", "files") for number in range(130)]
    for iteration in range(1100):
        lab.image(task, addresses[iteration if iteration < 120 else 0], iteration)
    lab.plot(task, *addresses[120:], "data:image/png;base64,AAAA")
    lab.server.events[task]["odd"] = {**lab.server.events[task].popitem()[1], "plot_str": "{no json", "iter": 1}
    lab.plot(task, *addresses[120:])
    assert "130 images" in lab.delete()
    assert lab.left() == GONE


def test_only_old_and_archived_tasks_of_the_project_go_and_json_has_each_with_its_reason(lab: Lab) -> None:
    task = lab.full_task("eight days", days=8)
    lab.server.tasks[task]["name"] = 'with token: "a-wrong-secret"'
    published = lab.full_task("published", status="published")
    kept = [published, lab.task("six days", days=6), lab.task("not archived", archived=False)]
    below = lab.task("in the project below")
    lab.server.tasks[below]["project"] = lab.server.projects_create(f"{lab.project}/below")["id"]
    done = lab.run(*DELETE, "--json", "--older-than", "7")
    assert (done.returncode, lab.tasks()) == (0, kept)
    assert below in lab.server.tasks
    found = {item["id"]: item for item in json.loads(done.stdout)["tasks"]}
    assert found.keys() == {task, published}
    assert [*found[task]["objects"].values()] == [1000] * 4
    outcome = {id_: (item["deleted"], item["failed"], item["reason"]) for id_, item in found.items()}
    assert outcome == {task: (True, False, ""), published: (False, False, "it is published")}


# --- what stays, and why --------------------------------------------------------------------------------------------
def test_what_is_in_use_published_or_elsewhere_stays_with_the_reason(lab: Lab) -> None:
    reasons = {}
    for status in ("published", "publishing", "in_progress", "queued"):
        reasons[lab.full_task(status, status=status)] = f"it is {status.replace('in_progress', 'running')}"
    with_published_model = lab.full_task("published model")
    lab.server.models[lab.model_of(with_published_model)]["ready"] = True
    reasons[with_published_model] = f"({lab.model_of(with_published_model)}) is published"
    used = lab.full_task("used model")
    user = lab.task("user", archived=False)
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": lab.model_of(used)}]
    reasons[used] = f"is used by task {user}"
    parent = lab.full_task("parent")
    child = lab.task("child", status="published", archived=False, parent=parent)
    reasons[parent] = f"its child {child} is published"
    data = lab.full_task("data set")
    lab.server.tasks[data]["system_tags"] = ["archived", "dataset"]
    reasons[data] = "it is a ClearML dataset"
    owner = lab.full_task("owner")
    linker = lab.task("linker", archived=False)
    lab.artifact(linker, lab.server.tasks[owner]["execution"]["artifacts"][0]["uri"])
    reasons[owner] = f"task {linker} has a link to its artifact"
    reasons[lab.full_task("in a folder", "folder")] = "is not below a --folder"
    reasons[lab.task("its folder", output_dest=f"file://{lab.folder}")] = "is not below a --folder"
    reasons[lab.task("in Azure", output_dest="azure://account/box")] = "azure:// is no storage that this command knows"
    before, said = lab.left(), lab.delete()
    assert lab.left() == before
    for task, reason in reasons.items():
        (line,) = [line for line in said.splitlines() if line.startswith("left") and f"({task})" in line]
        assert reason in line
    assert lab.server.models[lab.model_of(used)]["task"] == used
    assert lab.server.tasks[child]["parent"] == parent


def test_what_cannot_be_asked_is_a_failure(lab: Lab) -> None:
    """A bucket that is missing, in which all seems gone, included; the other tasks go."""
    reasons = {}
    for address, reason in {
        "https://old-files.invalid": "https://old-files.invalid is not a file server of this configuration",
        f"s3://{lab.s3.host}/nonesuch": "no such bucket",
        "s3://127.0.0.1:1/models": "no keys",
    }.items():
        for path in ("x.{}/model.bin", "{}.bin"):
            task = lab.task(f"{address}/{path}")
            lab.model(task, f"{address}/{path}".format(task))
            reasons[task] = reason
    reasons[lab.task("no record yet", output_dest=f"s3://{lab.s3.host}/nonesuch")] = "no such bucket"
    lab.full_task("fine")
    done = lab.run(*DELETE, "--json")
    assert (done.returncode, lab.tasks(), lab.objects()) == (1, [*reasons], [])
    for item in json.loads(done.stdout)["tasks"]:
        assert item["failed"] == (not item["deleted"]) == (item["id"] in reasons)
        assert reasons.get(item["id"], "") in item["reason"]


# --- what no record knows --------------------------------------------------------------------------------------------
def test_what_no_record_knows_goes_from_the_tasks_own_folder_only(lab: Lab, tmp_path: Path) -> None:
    """Found by the folder of a recorded object, or by the output destination; the file server lists nothing."""
    stays, roots = [], {"s3": lab.s3.uri(), "gcs": lab.gcs.uri(), "folder": f"file://{lab.folder}"}
    for store, root in roots.items():
        killed = lab.task("killed", output_dest=root)
        for path in ("models/model.bin", "artifacts/a b/ä #1.bin"):
            lab.put(f"killed.{killed}/{path}", store)
        for path in (f"killed.{killed}0", f"killed.{killed[:-1]}", "killed", f"other.{uuid4().hex}", f"x.{killed} y"):
            stays.append(lab.put(f"{path}/models/model.bin", store))
        recorded = lab.full_task("recorded", store)
        lab.put(f"recorded.{recorded}/models/unrecorded.bin", store)
    on_server = lab.full_task("recorded", "files", output_dest=lab.server.files_url)
    stays.append(lab.put(f"recorded.{on_server}/models/unrecorded.bin", "files"))
    before = len(lab.objects())
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (lab.folder / f"{lab.project}/killed.{killed}/way out").symlink_to(tmp_path / "precious")
    said = lab.delete("--folder", lab.folder)
    assert len(re.findall(r"^deleted killed .* days: 2 unrecorded objects, 2.00kB in", said, re.MULTILINE)) == 3
    assert len(re.findall(r"^deleted recorded .* 1 unrecorded object, 5.00kB in", said, re.MULTILINE)) == 3
    assert lab.tasks() == []
    assert len(lab.objects()) == len(stays) == before - 3 * (2 + 4 + 1) - 4
    assert (tmp_path / "precious/file").exists()
    assert "file server cannot list" in " ".join(lab.run("--help").stdout.split())


def test_what_others_point_to_stays_in_the_folder(lab: Lab) -> None:
    """Whether a record of the task itself knows it or not."""
    task, alive = lab.task("killed", output_dest=lab.s3.uri()), lab.task("alive", archived=False)
    models = [lab.put(f"killed.{task}/models/{number}.bin") for number in range(3)]
    lab.model(task, models[0])
    for address in models[:2]:
        lab.model(alive, address)
    linked = lab.task("linked", output_dest=lab.s3.uri())
    lab.artifact(alive, lab.put(f"linked.{linked}/artifacts/data.bin"))
    said = lab.delete()
    assert re.search("^deleted killed .* 2 foreign objects, 1 unrecorded object, 1.00kB", said, re.MULTILINE)
    assert re.search(f"^left linked .* task {alive} has a link to its unrecorded object", said, re.MULTILINE)
    assert lab.tasks() == [alive, linked]
    assert len(lab.objects()) == 3


def test_keys_that_may_not_list_delete_what_is_recorded(lab: Lab, tmp_path: Path) -> None:
    with NoList(tmp_path / "store") as store:
        lab.s3 = store
        task = lab.full_task("recorded")
        unrecorded = lab.put(f"recorded.{task}/models/unrecorded.bin")
        lab.machine.configure(lab.server.configuration(), store.clearml_conf(key=NoList.KEY, secret=NoList.SECRET))
        assert re.search("^deleted recorded .* 4.00kB.*; .*cannot list.*AccessDenied", lab.delete(), re.MULTILINE)
        assert (lab.tasks(), [store.uri(key) for key in lab.objects()]) == ([], [unrecorded])


# --- what stays, and why --------------------------------------------------------------------------------------------
def test_what_is_its_own_goes_and_what_it_shares_or_only_points_to_stays(lab: Lab) -> None:
    """A model and its user go together; a data set, an input artifact and another web site's image are not its own."""
    task, user = lab.full_task("maker"), lab.full_task("user")
    model = lab.model_of(task)
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model}]
    lab.server.tasks[task] |= {"created": "2026-01-01T00:00:00.000000+00:00"}
    lab.server.tasks[task]["models"]["input"] = [{"name": "checkpoint", "model": model}]  # it went on from its own
    data = lab.put("data/set.zip")
    lab.artifact(task, data)
    lab.artifact(task, f"{data}.2", mode="input")
    lab.image(task, "https://example.invalid/cat.png")
    lab.model(task, "https://example.invalid/pretrained.bin")
    registered = lab.put("registered.bin")
    lab.model(task, registered)  # this one is its own, whatever links to it besides
    lab.artifact(task, registered)
    shared = lab.put("shared/model.bin")
    alive = lab.task("alive", archived=False)
    for sharer in (lab.task("one"), lab.task("two"), alive):
        lab.model(sharer, shared)
    said = lab.delete()
    assert re.search("^deleted maker .* 3 foreign objects", said, re.MULTILINE)
    assert len(re.findall("^deleted (one|two) .* 1 foreign object", said, re.MULTILINE)) == 2
    assert lab.tasks() == [alive]
    assert lab.objects() == [f"{lab.project}/data/set.zip", f"{lab.project}/shared/model.bin"]
    lab.archive(alive)
    lab.model(lab.task("another"), shared)
    lab.delete()
    assert lab.left() == ([], [], [f"{lab.project}/data/set.zip"])


def test_files_outside_the_folder_stay(lab: Lab, tmp_path: Path) -> None:
    lab.full_task("inside", "folder")
    precious = tmp_path / "precious.bin"
    precious.write_text("precious")
    (lab.folder / "link.bin").symlink_to(precious)
    (lab.folder / "way out").symlink_to(tmp_path)
    lab.model(lab.task("through a link"), f"file://{lab.folder}/link.bin")
    outside = []
    for path in (precious, f"{lab.folder}/../precious.bin", f"{lab.folder}/way out/precious.bin"):
        outside.append(lab.task(f"by {path}"))
        lab.model(outside[-1], f"file://{path}")
    outside.append(lab.task("without file://"))
    lab.model(outside[-1], str(precious))
    said = lab.delete("--folder", lab.folder)
    assert lab.tasks() == outside
    assert said.count("is not below a --folder") == 2 * 4
    assert precious.read_text() == "precious"
    assert not (lab.folder / "link.bin").is_symlink()


def test_a_user_without_home_and_without_permission_to_delete(lab: Lab) -> None:
    """As in a container that runs by number. Root may delete everything, and becomes another user."""
    root = os.geteuid() == 0
    if root and not shutil.which("setpriv"):
        pytest.skip("root may do everything")
    with tempfile.TemporaryDirectory() as folder:  # others may not look into pytest's
        lab.folder = Path(folder)
        lab.full_task("read-only", "folder")
        before = lab.left()
        for path in (lab.folder, *lab.folder.rglob("*")):
            path.chmod(0o555)
        user = ["setpriv", "--reuid=54321", "--clear-groups"] if root else []
        command = ["env", "-u", "HOME", *user, sys.executable, *CLEANUP, lab.project, *DELETE, "--folder", folder]
        keys = {"CLEARML_API_ACCESS_KEY": lab.server.access_key, "CLEARML_API_SECRET_KEY": lab.server.secret_key}
        environment = {**lab.machine.environment, **keys, "CLEARML_API_HOST": lab.server.api_url}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "cannot delete: forbidden" in done.stdout
        assert lab.left() == before


# --- kill -9, and what changes meanwhile -----------------------------------------------------------------------------
def test_kill_9_at_any_step_leaves_nothing_that_the_next_run_does_not_find(lab: Lab) -> None:
    """Each run is killed one change later than the one before, and goes on with what that one has left.

    The changes: five objects, one of them in no record, two folders, the record.
    """
    task = lab.task("victim", output_dest=lab.gcs.uri())
    lab.put(f"victim.{task}/artifacts/unrecorded.bin", "gcs")
    for store in ("s3", "folder"):
        lab.model(task, lab.put(f"victim.{task}/models/model.bin", store))
    lab.image(task, lab.put(f"victim.{task}/metrics/image.png"))
    step, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        step += 1
        code = lab.run(*DELETE, "--folder", lab.folder, STEP=str(step), ACTION="kill").returncode
        assert lab.tasks() or not lab.objects(), "the record goes last"
        assert len(lab.models()) == 2 * len(lab.tasks())
    assert code == 0
    assert step > 4
    assert lab.left() == GONE
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


def test_what_dies_in_the_middle_is_no_loss_and_the_next_run_goes_on(tmp_path: Path, gcs: FakeGCS) -> None:
    """First the store, then the server. What a task has elsewhere stays with the rest of it; the others go."""
    server = ClearMLServer(tmp_path / "server")
    server.start()
    with Rclone(tmp_path / "rclone") as store:
        lab = Lab(server, tmp_path, store, gcs)
        lab.full_task("all of it elsewhere", "gcs")
        tasks = [lab.full_task(f"task {number}") for number in range(3)]
        lab.model(tasks[1], lab.put(f"task 1.{tasks[1]}/models/elsewhere.bin", "gcs"))

        def lose_the_store() -> None:
            while len(lab.objects()) == 4 + 3 * 4 + 1:
                time.sleep(0.02)
            store.stop()

        said = lab.disturb(2, lose_the_store)  # one object is being deleted
        assert len(re.findall("^left .*no answer", said, re.MULTILINE)) == 3
        store.start()
        assert lab.tasks() == tasks
        assert len(lab.objects()) == 3 * 4 + 1 - 1
        said = lab.disturb(6, server.stop)  # that task is gone, the next one's first object is about to be deleted
        assert said.count("left ") == said.count("no answer to tasks.delete") == 1, "the third task is not even tried"
        assert len(lab.objects()) == 4
        server.start()
        assert re.search(f"{tasks[1]}.* 5 missing objects", lab.delete())
        assert lab.left() == GONE
    server.stop()


# --- use ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("full", [True, False], ids=["a disk that is full", "a reader that has left"])
def test_an_output_that_takes_nothing_costs_the_doctor_nothing_and_ends_the_clean_up(lab: Lab, full: bool) -> None:
    """In one line, or silence. The doctor's exit code is that of what it found."""
    lab.task("first")
    storage = ("--only", "storage", "--output-uri", "/no/such/folder")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as disk:
        output = disk if full else writer
        process = lab.machine.start(*CLEANUP, lab.project, stdout=output)
        doctor = lab.machine.start("-m", "clearml_client.doctor", *storage, stdout=output)
    os.close(writer)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert re.fullmatch(r"clearml_client\.cleanup: error: .*No space left on device.*\n" if full else "", errors)
    assert (doctor.communicate()[1], doctor.returncode) == ("", 1)


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


def test_without_a_task_or_a_project_or_a_server_it_says_so(lab: Lab) -> None:
    assert "0 archived tasks, unchanged for more than 1 day\n" in lab.delete("--older-than", "1")
    lab.project = "no such.project"
    done = lab.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "clearml_client.cleanup: error: no project 'no such.project' on the server\n"
    (lab.machine.home / "clearml.conf").unlink()
    done = lab.run()
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
    assert ("deleted:   0%" in shown) == (code == 0)
    assert {"no\n": "Nothing was deleted.", "\x04": "stopped; the same command", "yes\n": "Left: 0 tasks"}[
        answer
    ] in shown
