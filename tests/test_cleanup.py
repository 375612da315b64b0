"""The clean-up against a stand-in server and real stores: what goes, what stays and why, and what a kill -9 leaves."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, SECRETS, Machine
from stores import FakeGCS, Rclone, S3Store, SeaweedFS, Store, free_port

CLEANUP = ("-m", "clearml_client.cleanup")
DELETE = ("--delete", "--yes")
PROBE = ".cleanup-probe"
HOOK = ROOT / "tests/programs/hook.py"


def checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """What holds of every run: no traceback, no secret."""
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    assert not [secret for secret in SECRETS if secret in text]
    return done


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
        self.configure(*(store.clearml_conf() for store in stores if isinstance(store, S3Store)))
        for store in stores:
            if isinstance(store, FakeGCS):
                self.machine.variables |= store.environment()

    def configure(self, *parts: str) -> None:
        self.machine.configure(self.server.configuration(), *parts)

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        machine = Machine(self.machine.home, {**self.machine.variables, **variables})
        prelude = HOOK if "STEP" in variables else None
        return checked(machine.run(*CLEANUP, "--project-name", self.project, *arguments, timeout=120, prelude=prelude))

    def shell(self, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The command as "$@" in a line of a shell."""
        command = ["sh", "-c", line, "sh", sys.executable, *CLEANUP, "--project-name", self.project]
        environment = {**self.machine.environment, **variables}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return checked(done)

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

    def model(self, task: str, address: str, **more: Any) -> str:
        name = f"model {len(self.server.models)}"
        model: str = self.server.models_create(address, name, False, project=self.project_id, task=task, **more)["id"]
        outputs = self.server.tasks[task]["models"]["output"]
        outputs.append({"name": name, "model": model})
        return model

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

    def full_task(self, name: str, store: "Store | str", **more: Any) -> str:
        """A task with one of each kind in a store."""
        task = self.task(name, **more)
        for kind in ("model", "artifact", "image", "plot"):
            getattr(self, kind)(task, self.put(store, f"{self.project}/{name}.{task}/{kind}s/{kind}.bin"))
        return task

    def put(self, store: "Store | str", key: str) -> str:
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

    def pause(self, step: int) -> "subprocess.Popen[str]":
        """Start a run that waits before its step-th change."""
        hook = {"STEP": str(step), "ACTION": "pause"}
        machine = Machine(self.machine.home, {**self.machine.variables, **hook})
        process = machine.start(*CLEANUP, "--project-name", self.project, *DELETE, prelude=HOOK)
        deadline = time.monotonic() + 60
        while not (self.machine.home / "paused").exists():
            assert time.monotonic() < deadline, process.communicate()
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    def go_on(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        (self.machine.home / "paused").unlink()
        stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stdout + stderr, stderr
        return process.returncode, stdout


@pytest.fixture
def lab(stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone) -> Lab:
    return Lab(stand_in, tmp_path, rclone)


# --- what goes ------------------------------------------------------------------------------------------------------
def test_only_lists_without_delete(lab: Lab, rclone: Rclone) -> None:
    task = lab.full_task("first", rclone)
    before = lab.left()
    asked = len(lab.server.requests)
    done = lab.run()
    assert done.returncode == 0
    assert lab.left() == before
    assert not [r for r in lab.server.requests[asked:] if "delete" in r.path or r.method in ("DELETE", "PUT")]
    assert f"first ({task}), 40 days: 1 model, 1 artifact, 2 images, 4 KB in {rclone.uri()}" in done.stdout
    assert "add --delete" in done.stdout


def test_deletes_from_every_kind_of_store(
    stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone, seaweed: SeaweedFS, gcs: FakeGCS
) -> None:
    """Several stores in one task, by the entries of clearml.conf."""
    lab = Lab(stand_in, tmp_path, rclone, seaweed, gcs)
    entries = [re.findall(r"\[ (.*) \]", store.clearml_conf())[0] for store in (rclone, seaweed)]
    lab.configure(f"sdk {{ aws {{ s3 {{ credentials: [ {', '.join(entries)} ] }} }} }}")
    for store in (rclone, seaweed, gcs, "files", "folder"):
        lab.full_task("one store", store)
    mixed = lab.task("all of them")
    for store in (rclone, seaweed, gcs, "files", "folder"):
        lab.model(mixed, lab.put(store, f"{lab.project}/all of them.{mixed}/models/model.bin"))
    lab.artifact(mixed, lab.put("folder", f"{lab.project}/all of them.offline-{uuid4().hex}/models/model.bin"))
    asked = len(stand_in.requests)
    done = lab.run(*DELETE, "--folder", lab.folder)
    assert done.returncode == 0, done.stdout
    assert lab.left() == ([], [], [])
    assert not [*lab.folder.rglob("*all of them*")], "an empty folder was left"
    assert "Deleted: 6 tasks" in done.stdout
    assert "Left: 0" in done.stdout
    deletions = [r for r in stand_in.requests[asked:] if r.path == "tasks.delete"]
    assert all(not r.data["delete_external_artifacts"] for r in deletions), "the server must not delete on its own"


@pytest.mark.parametrize("profile", [False, True])
def test_aws_form_by_variables_alone(lab: Lab, rclone: Rclone, profile: bool) -> None:
    lab.configure()
    variables = rclone.environment()
    if profile:
        keys = [f"{name.lower()} = {variables.pop(name)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        (lab.machine.home / ".aws").mkdir()
        (lab.machine.home / ".aws/credentials").write_text("\n".join(["[mnist]", *keys]))
        variables["AWS_PROFILE"] = "mnist"
    task = lab.task("aws form")
    key = f"{lab.project}/aws.{task}/models/model.bin"
    lab.put(rclone, key)
    lab.model(task, f"s3://{rclone.bucket}/{key}")
    done = lab.run(*DELETE, **variables)
    assert done.returncode == 0, done.stdout
    assert lab.left() == ([], [], [])


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
    done = lab.run(*DELETE, "--folder", lab.folder)
    assert done.returncode == 0, done.stdout
    assert "already gone" not in done.stdout
    assert (lab.tasks(), lab.models(), stored()) == ([], [], [])


def test_what_an_offline_session_stored_goes_with_its_last_import(lab: Lab, rclone: Rclone) -> None:
    """Each import is a task with an id of its own, and the model's address has that of the session."""
    names = ("--project-name", lab.project, "--task-name", "offline")
    run = lab.machine.train("--offline", "--dry-run", *names, "--output-uri", rclone.uri("runs"))
    assert run.returncode == 0, run.stderr
    (model,) = lab.objects()
    for _ in range(2):
        clearml_task = Path(sys.executable).with_name("clearml-task")
        done = lab.machine.run(clearml_task, "--import-offline-session", lab.machine.session())
        assert done.returncode == 0, done.stderr
    first, second = lab.tasks()
    lab.archive(first)
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert "1 not its own" in done.stdout
    assert lab.tasks() == [second]
    assert model in lab.objects()
    lab.archive(second)
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert lab.left() == ([], [], [])


def test_an_object_that_is_gone_already_is_no_trouble(lab: Lab, rclone: Rclone) -> None:
    task = lab.full_task("half gone", rclone)
    for store in (rclone, "files", "folder"):
        address = lab.put(store, f"{lab.project}/gone.{task}/models/gone.bin")
        lab.model(task, address.replace("gone.bin", "never.bin"))
        lab.model(task, address)
    done = lab.run(*DELETE, "--folder", lab.folder)
    assert done.returncode == 0, done.stdout
    assert "3 already gone" in done.stdout
    assert lab.left() == ([], [], [])


def test_every_image_goes_and_every_image_of_a_plot(lab: Lab, rclone: Rclone) -> None:
    """More than the 100 that the SDK deletes; recycled addresses once."""
    task = lab.task("many images")
    addresses = [lab.put(rclone, f"{lab.project}/x.{task}/metrics/{number}.png") for number in range(130)]
    for iteration, address in enumerate(addresses[:120] * 2):
        lab.image(task, address, iteration)
    lab.plot(task, *addresses[120:], "data:image/png;base64,AAAA")
    lab.server.events[task]["odd"] = {**lab.server.events[task].popitem()[1], "plot_str": "{no json", "iter": 1}
    lab.plot(task, *addresses[120:])
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert "130 images" in done.stdout
    assert lab.left() == ([], [], [])


def test_520_tasks(lab: Lab, rclone: Rclone) -> None:
    """More than the server gives at once; another project's and younger ones stay."""
    tasks = [lab.task(f"task {number:03}") for number in range(520)]
    for task in tasks[::40]:
        lab.model(task, lab.put(rclone, f"{lab.project}/x.{task}/models/model.bin"))
    young = [lab.task("young", days=20), lab.task("not archived", archived=False)]
    below = lab.server.projects_create(f"{lab.project}/below")["id"]
    other = lab.task("in the project below")
    lab.server.tasks[other]["project"] = below
    started = time.monotonic()
    done = lab.run(*DELETE)
    print(f"520 tasks: {time.monotonic() - started:.1f} s")
    assert done.returncode == 0, done.stdout
    assert len(re.findall("^deleted ", done.stdout, re.M)) == 520
    assert lab.left() == (young, [], [])
    assert other in lab.server.tasks


def test_nothing_to_do(lab: Lab) -> None:
    lab.task("young", days=20)
    done = lab.run(*DELETE)
    assert done.returncode == 0
    assert "0 archived tasks" in done.stdout
    assert done.stderr == ""


def test_older_than_counts_from_the_change_of_status(lab: Lab) -> None:
    old, young = lab.task("eight days", days=8), lab.task("six days", days=6)
    assert lab.run(*DELETE, "--older-than", "7").returncode == 0
    assert lab.tasks() == [young]
    assert old not in lab.server.tasks


# --- what stays, and why --------------------------------------------------------------------------------------------
def test_published_and_running_tasks_and_models_in_use_stay(lab: Lab, rclone: Rclone) -> None:
    def keep(name: str, status: str = "completed") -> str:
        return lab.full_task(name, rclone, status=status)

    reasons = {}
    for status in ("published", "publishing", "in_progress", "queued"):
        reasons[keep(status, status)] = f"it is {status.replace('in_progress', 'running')}"
    with_published_model = keep("published model")
    lab.server.models[lab.server.tasks[with_published_model]["models"]["output"][0]["model"]]["ready"] = True
    reasons[with_published_model] = "is published"
    used = keep("used model")
    user = lab.task("user", archived=False)
    model = lab.server.tasks[used]["models"]["output"][0]["model"]
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model}]
    reasons[used] = f"is used by task {user}"
    parent = keep("parent")
    child = lab.task("child", status="published", archived=False, parent=parent)
    reasons[parent] = f"its child {child} is published"
    data = keep("data set")
    lab.server.tasks[data]["system_tags"] = ["archived", "dataset"]
    reasons[data] = "data set"
    before = lab.left()
    done = lab.run(*DELETE)
    assert done.returncode == 1
    assert lab.left() == before
    for task, reason in reasons.items():
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("left") and task in line]
        assert reason in line
    assert lab.server.models[model]["task"] == used
    assert lab.server.tasks[child]["parent"] == parent


def test_a_model_and_its_user_go_together(lab: Lab, rclone: Rclone) -> None:
    maker = lab.full_task("maker", rclone)
    user = lab.full_task("user", rclone)
    model = lab.server.tasks[maker]["models"]["output"][0]["model"]
    lab.server.tasks[user]["models"]["input"] = [{"name": "in", "model": model}]
    lab.server.tasks[maker] |= {"created": "2026-01-01T00:00:00.000000+00:00"}
    lab.server.tasks[maker]["models"]["input"] = [{"name": "checkpoint", "model": model}]  # it went on from its own
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert lab.left() == ([], [], [])


def test_an_object_of_several_tasks_goes_with_the_last(lab: Lab, rclone: Rclone) -> None:
    address = lab.put(rclone, f"{lab.project}/shared/model.bin")
    for name in ("one", "two"):
        lab.model(lab.task(name), address)
    alive = lab.task("alive", archived=False)
    lab.model(alive, address)
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("1 not its own") == 2 * 2  # of two tasks, when listed and when deleted
    assert lab.tasks() == [alive]
    assert len(lab.objects()) == 1
    lab.archive(alive)
    lab.model(lab.task("five"), address)
    assert lab.run(*DELETE).returncode == 0
    assert lab.left() == ([], [], [])


def test_links_are_not_followed(lab: Lab, rclone: Rclone) -> None:
    """A link to a data set, an input artifact, an image of another web site: none is the task's own."""
    data = lab.put(rclone, f"{lab.project}/data/set.zip")
    task = lab.full_task("links", rclone)
    lab.artifact(task, data)
    lab.artifact(task, data + ".2", mode="input")
    lab.image(task, "https://example.invalid/cat.png")
    lab.model(task, "https://example.invalid/pretrained.bin")
    registered = lab.put(rclone, f"{lab.project}/registered.bin")
    lab.model(task, registered)  # this one is its own, whatever links to it besides
    lab.artifact(task, registered)
    done = lab.run(*DELETE)
    assert done.returncode == 0, done.stdout
    assert "3 not its own" in done.stdout
    assert lab.left() == ([], [], [f"{lab.project}/data/set.zip"])


def test_an_object_that_another_task_links_to_stays(lab: Lab, rclone: Rclone) -> None:
    task = lab.full_task("owner", rclone)
    address = lab.server.tasks[task]["execution"]["artifacts"][0]["uri"]
    linker = lab.task("linker", archived=False)
    lab.artifact(linker, address)
    before = lab.left()
    done = lab.run(*DELETE)
    assert done.returncode == 1
    assert f"task {linker} has a link to its artifact" in done.stdout
    assert lab.left() == before


def test_files_outside_the_folder_stay(lab: Lab, tmp_path: Path) -> None:
    inside, outside = lab.full_task("inside", "folder"), lab.task("outside")
    other = tmp_path / "precious.bin"
    other.write_text("precious")
    (lab.folder / "link.bin").symlink_to(other)
    (lab.folder / "way out").symlink_to(tmp_path)
    for path in (other, f"{lab.folder}/../precious.bin", f"{lab.folder}/way out/precious.bin"):
        lab.model(lab.task(f"by {path}"), f"file://{path}")
    lab.model(outside, str(other))  # without file://
    through_link = lab.task("through a link")
    lab.model(through_link, f"file://{lab.folder}/link.bin")
    done = lab.run(*DELETE)
    assert done.returncode == 1
    assert len(lab.tasks()) == 6
    assert done.stdout.count("is not below a --folder") == 2 * 6
    done = lab.run(*DELETE, "--folder", lab.folder)
    assert done.returncode == 1
    assert inside not in lab.tasks()
    assert through_link not in lab.tasks()
    assert len(lab.tasks()) == 4
    assert other.read_text() == "precious"
    assert not (lab.folder / "link.bin").is_symlink()


def test_other_addresses_stay(lab: Lab) -> None:
    """A file server that is no longer configured, and a kind of storage that the script does not know."""
    task = lab.task("old")
    lab.model(task, f"https://old-files.invalid/x.{task}/model.bin")
    task = lab.task("azure")
    lab.model(task, f"azure://account.invalid/container/x.{task}/model.bin")
    before = lab.left()
    done = lab.run(*DELETE)
    assert done.returncode == 1
    assert lab.left() == before
    assert "https://old-files.invalid is not a file server of this configuration" in done.stdout
    assert "azure:// is no storage that this command knows" in done.stdout


# --- stores that say no ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [Rclone, FakeGCS])
def test_store_down_from_the_start(stand_in: ClearMLServer, tmp_path: Path, kind: type[Store]) -> None:
    """The tasks there stay whole, also what they have elsewhere; the others go."""
    with kind(tmp_path / "store") as store:
        lab = Lab(stand_in, tmp_path, store)
        tasks = [lab.full_task("down", store), lab.full_task("down, too", store)]
        lab.artifact(tasks[0], lab.put("files", f"{lab.project}/x.{tasks[0]}/artifacts/a.bin"))
        well = lab.full_task("well", "files")
        before = lab.objects()
        store.stop()
        started = time.monotonic()
        done = lab.run(*DELETE)
        assert time.monotonic() - started < 30
        assert done.returncode == 1
        assert done.stdout.count("no answer") == 2 * 2, done.stdout
        assert lab.tasks() == tasks
        store.start()
        assert lab.objects() == [key for key in before if well not in key]
        assert lab.run(*DELETE).returncode == 0
        assert lab.left() == ([], [], [])


def test_silent_store(lab: Lab) -> None:
    """It takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        host = f"127.0.0.1:{listener.getsockname()[1]}"
        entry = {"host": host, "key": "k", "secret": "s", "secure": False}
        lab.configure(f"sdk {{ aws {{ s3 {{ credentials: [ {json.dumps(entry)} ] }} }} }}")
        tasks = [lab.task(f"silent {number}") for number in range(3)]
        for task in tasks:
            lab.model(task, f"s3://{host}/models/x.{task}/model.bin")
        started = time.monotonic()
        done = lab.run(*DELETE)
        print(f"silent store: {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 40
        assert done.returncode == 1
        assert lab.tasks() == tasks


def test_store_down_in_the_middle(stand_in: ClearMLServer, tmp_path: Path) -> None:
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
        assert len(lab.objects()) >= 4
        done = lab.run(*DELETE)
        assert done.returncode == 0
        assert re.search(f"{second}.* already gone", done.stdout)
        assert lab.left() == ([], [], [])


def test_wrong_keys_and_no_permission_to_delete(stand_in: ClearMLServer, tmp_path: Path, seaweed: SeaweedFS) -> None:
    lab = Lab(stand_in, tmp_path, seaweed)
    task = lab.full_task("whole", seaweed)
    before = lab.left()
    reader, secret = SeaweedFS.READER
    cases = {
        seaweed.clearml_conf(secret="a-wrong-secret"): "forbidden",
        seaweed.clearml_conf(key="AKIANOBODY"): "forbidden",
        seaweed.clearml_conf(key=reader, secret=secret): "AccessDenied",
        seaweed.clearml_conf(host="other:1"): "no keys",
        seaweed.clearml_conf(host="127.0.0.1:" + str(seaweed.port)[:2]): "is taken for",
    }

    for configuration, word in cases.items():
        lab.configure(configuration)
        done = lab.run(*DELETE)
        assert done.returncode == 1
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("left")]
        assert task in line
        assert word in line, line
    lab.configure(seaweed.clearml_conf())
    assert lab.left() == before
    assert lab.run(*DELETE).returncode == 0
    assert lab.left() == ([], [], [])


def test_missing_bucket(
    stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone, seaweed: SeaweedFS, gcs: FakeGCS
) -> None:
    """An object in a bucket that is not there is not proven to be gone: the name or the store may be wrong."""
    lab = Lab(stand_in, tmp_path, seaweed, gcs)
    for store in (seaweed, gcs):
        task = lab.task(type(store).__name__)
        lab.model(task, store.uri().replace(store.bucket, "another") + f"/x.{task}/model.bin")
    before = lab.left()
    done = lab.run(*DELETE)
    assert done.returncode == 1
    assert done.stdout.count("no such bucket") == 2, done.stdout
    assert lab.left() == before
    with closing(seaweed.client()) as s3:
        assert "another" not in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]


def test_folder_without_permission_to_delete(lab: Lab) -> None:
    lab.full_task("read-only", "folder")
    before = lab.left()
    command = [sys.executable, *CLEANUP, "--project-name", lab.project, *DELETE]
    command += ["--folder", str(lab.folder)]
    if os.geteuid() == 0:  # who may do everything, unless told otherwise
        if not shutil.which("setpriv"):
            pytest.skip("root may do everything")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    folders = [path for path in lab.folder.rglob("*") if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    done = subprocess.run(command, env=lab.machine.environment, capture_output=True, text=True, check=False, cwd=ROOT)
    for path in folders:
        path.chmod(0o755)
    assert checked(done).returncode == 1, done.stdout + done.stderr
    assert "cannot write: forbidden" in done.stdout
    assert lab.left() == before


# --- kill -9 --------------------------------------------------------------------------------------------------------
def test_kill_9_at_every_step(stand_in: ClearMLServer, tmp_path: Path, rclone: Rclone) -> None:
    """Whatever was changed when the run died, the next one ends with no record, no object, no probe and no folder."""
    # How many objects there are before each change: a probe in each of the three stores is written and deleted, four
    # objects (side by side: from the second on, the one before may not be gone yet), two folders, and the record.
    objects = [4, 5, 4, 5, 4, 5, 4, 3, 2, 1, 0, 0, 0]
    for step, expected in enumerate([*objects, 0], start=1):
        (tmp_path / str(step)).mkdir()
        lab = Lab(stand_in, tmp_path / str(step), rclone)
        task = lab.task("victim")
        for store in (rclone, "files", "folder"):
            lab.model(task, lab.put(store, f"{lab.project}/victim.{task}/models/model.bin"))
        lab.image(task, lab.put(rclone, f"{lab.project}/victim.{task}/metrics/image.png"))
        done = lab.run(*DELETE, "--folder", lab.folder, STEP=str(step), ACTION="kill")
        assert expected <= len(lab.objects()) <= (4 if 7 < step <= 10 else expected)
        if step <= len(objects):
            assert done.returncode == -signal.SIGKILL
            assert (len(lab.tasks()), len(lab.models())) == (1, 3), "the record goes last"
            done = lab.run(*DELETE, "--folder", lab.folder)
        assert done.returncode == 0, f"step {step}: {done.stdout}"
        assert lab.left() == ([], [], []), f"step {step}"
        assert not [*lab.folder.rglob("victim*")], f"step {step}"


def test_killed_while_the_server_deletes_the_record(lab: Lab, rclone: Rclone) -> None:
    """The answer never arrives; the record is gone, and with it nothing else is left."""
    lab.full_task("last", rclone)
    process = lab.pause(step=7)  # two for the probe and four objects: next is the record
    assert lab.objects() == []
    lab.server.tasks_delete(lab.tasks()[0])
    process.kill()
    process.communicate()
    assert lab.run(*DELETE).returncode == 0
    assert lab.left() == ([], [], [])


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
def test_clearml_server_dead_silent_or_not_ours(lab: Lab) -> None:
    lab.task("kept")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, ThreadPoolExecutor(5) as pool:
        silent = f"127.0.0.1:{listener.getsockname()[1]}"
        addresses = (f"http://127.0.0.1:{free_port()}", f"http://{silent}", f"https://{silent}", lab.server.web_url)
        runs = {address: pool.submit(lab.run, *DELETE, CLEARML_API_HOST=address) for address in addresses}
        password = lab.server.api_url.replace("://", "://user:a-wrong-secret@").rpartition(":")[0]
        runs["://***@"] = pool.submit(lab.run, *DELETE, CLEARML_API_HOST=f"{password}:{free_port()}")
        runs["401"] = pool.submit(lab.run, *DELETE, CLEARML_API_SECRET_KEY="a-wrong-secret")
    for words, run in runs.items():
        done = run.result()
        assert (done.returncode, done.stdout) == (1, "")
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert words in done.stderr
    assert len(lab.tasks()) == 1


def test_clearml_server_dies_in_the_middle(tmp_path: Path, rclone: Rclone) -> None:
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
    done = lab.run(*DELETE)
    server.stop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 already gone" in done.stdout
    assert lab.left() == ([], [], [])


# --- use ------------------------------------------------------------------------------------------------------------
def test_json(lab: Lab, rclone: Rclone) -> None:
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


def test_output_that_goes_nowhere(lab: Lab) -> None:
    """`| head -1`, closed by whoever started it, on a disk that is full."""
    for number in range(50):
        lab.task(f"task {number}")
    head = lab.shell('"$@" | head -1')
    assert (len(head.stdout.splitlines()), head.stderr) == (1, "")
    closed = lab.shell('"$@" >&-')
    assert (closed.returncode, closed.stderr) == (0, "")
    full = lab.shell('"$@" >/dev/full')
    assert (full.returncode, full.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in full.stderr


def test_output_that_lacks_a_letter(lab: Lab) -> None:
    lab.task("näme")
    done = lab.run(PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"n\xe4me" in done.stdout


def test_a_user_without_home(lab: Lab) -> None:
    """As in a container that runs by number."""
    lab.task("first")
    keys = {"CLEARML_API_ACCESS_KEY": lab.server.access_key, "CLEARML_API_SECRET_KEY": lab.server.secret_key}
    user = "setpriv --reuid 54321 --clear-groups" if os.geteuid() == 0 and shutil.which("setpriv") else ""
    done = lab.shell(f'env -u HOME {user} "$@"', CLEARML_API_HOST=lab.server.api_url, **keys)
    assert done.returncode == 0, done.stderr
    assert "1 archived task" in done.stdout


def test_wrong_use(lab: Lab) -> None:
    lab.task("kept")
    wrong = {
        ("--delete",): "--yes",
        ("--older-than", "-1"): "not between",
        ("--older-than", "nan"): "not between",
        ("--folder", "/does/not/exist"): "no folder",
        ("--folder", "/"): "no folder",
        (
            "--project-name",
            "no such.project",
        ): "clearml_client.cleanup: error: no project 'no such.project' on the server\n",
    }
    for arguments, words in wrong.items():
        done = lab.run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
    assert lab.machine.run(*CLEANUP).returncode == 2
    assert len(lab.tasks()) == 1


def test_no_configuration(machine: Machine) -> None:
    done = machine.run(*CLEANUP, "--project-name", "anything")
    assert done.returncode == 1
    assert done.stderr.startswith("clearml_client.cleanup: error: no ClearML server: no server is configured")
    machine.configure('api { api_server: oops\nsdk.aws.s3: { secret: "a-wrong-secret" ]')
    done = checked(machine.run(*CLEANUP, "--project-name", "anything"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{machine.home}/clearml.conf, line " in done.stderr
    assert "clearml_client.doctor" in done.stderr


@pytest.mark.parametrize(("answer", "code"), [("no\n", 1), ("\x04", 1), ("yes\n", 0)])
def test_asks_on_a_terminal_and_shows_a_bar_there(lab: Lab, answer: str, code: int) -> None:
    for number in range(3):
        lab.task(f"task {number}")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    ends: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = lab.machine.start(*CLEANUP, "--project-name", lab.project, "--delete", **ends)
    os.close(theirs)
    text = b""
    while True:
        try:
            data = os.read(ours, 10_000)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data
        if b"[yes/no]" in data:
            os.write(ours, answer.encode())
    os.close(ours)
    assert process.wait(timeout=60) == code
    shown = text.decode()
    assert "To delete: 3 tasks" in shown.partition("[yes/no]")[0]
    assert len(lab.tasks()) == (3 if code else 0)
    assert ("tasks:   0%" in shown) == (code == 0)
    assert ("Nothing was deleted." in shown) == (code == 1)
