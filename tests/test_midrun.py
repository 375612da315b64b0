"""What somebody does to a run while it goes on, or left for it to find: it names the cause, and loses nothing else.

What machines do to it (a server, a store or a disk that fails, a signal) is in test_faults.py.
"""

import re
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from typing import Any
from unittest.mock import Mock

import pytest
from clearml_server import ApiError, ClearMLServer, Doc
from conftest import FEW, Begin, Machine
from stores import Rclone


def revoke_keys(server: ClearMLServer, _: str) -> None:
    server.revoke_keys()
    server.renew_secret()


def delete(server: ClearMLServer, task: str) -> None:
    del server.tasks[task]


def refuse_events(server: ClearMLServer, _: str) -> None:
    server.events_add_batch = Mock(side_effect=ApiError("no room"))  # type: ignore[method-assign]


def forget_the_end(server: ClearMLServer, _: str) -> None:
    server.tasks_completed = lambda **_: {"updated": 0}  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (revoke_keys, r"invalid credentials.*new ones: http://\S+/settings/workspace-configuration"),
        (delete, "somebody has deleted the task on the ClearML server"),
        (refuse_events, "ClearML lost something: .*no room"),
        (forget_the_end, "the ClearML server has the task as in_progress"),
    ],
)
def test_whatever_becomes_of_keys_or_task_the_training_goes_on(
    begin: Begin, machine: Machine, own_server: ClearMLServer, do: Callable[[ClearMLServer, str], None], words: str
) -> None:
    """Said once, and the storage is not blamed."""
    run = begin(*FEW, "--epochs", 12, "--output-uri", machine.home / "store")
    run.wait_for("epoch 2/")
    do(own_server, run.task)
    assert run.end() == 1, run.everything
    assert re.search(words, run.line), run.line
    assert run.stderr.count("failed logging") <= 1, run.stderr
    assert len(run.stderr) < 3000
    assert machine.outputs("model.pt").is_file()
    assert machine.outputs("checkpoint.pt").is_file()


@pytest.mark.parametrize("kind", ["file server", "folder", "s3"])
def test_an_object_that_the_store_empties_or_loses_fails_the_run(
    begin: Begin, machine: Machine, own_server: ClearMLServer, rclone: Rclone, kind: str
) -> None:
    """Each artifact is registered after its upload: then the picture is emptied, or in the folder the model lost."""
    folder = machine.home / "store"
    uri, store = {
        "file server": ("", own_server.files_folder),
        "folder": (str(folder), folder),
        "s3": (rclone.uri("emptied"), rclone.folder / "data"),
    }[kind]
    machine.configure(own_server.configuration(), rclone.clearml_conf())
    register = own_server.tasks_add_or_update_artifacts

    def empty_and_register(**asked: Any) -> Doc:
        for path in store.rglob("model.pt" if kind == "folder" else "mistakes.png"):
            if kind == "s3":  # it remembers the sizes of its files
                with closing(rclone.client()) as s3:
                    s3.put_object(Bucket=rclone.bucket, Key=str(path.relative_to(store / rclone.bucket)), Body=b"")
            elif kind == "folder":
                path.unlink()
            else:
                path.write_bytes(b"")
        return register(**asked)

    own_server.tasks_add_or_update_artifacts = empty_and_register  # type: ignore[assignment,method-assign]
    run = begin("--dry-run", "--output-uri", uri)
    assert run.end() == 1, run.everything
    words = r"artifacts/mistakes/mistakes.png has 0 bytes, and not \d+"
    assert re.search("models/model.pt is missing" if kind == "folder" else words, run.line), run.line
    assert ("--output-uri" in run.line) == bool(uri)  # the doctor takes no address of the file server
    assert own_server.tasks[run.task]["status"] == "failed"


# --- a task that is there already -------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", ["completed", ""])
def test_a_task_id_that_was_left_over_is_refused_and_nothing_is_touched(
    begin: Begin, own_server: ClearMLServer, status: str
) -> None:
    """Of a task that has ended, or of none."""
    task, words = "0" * 32, f"there is no task {'0' * 32}, which CLEARML_TASK_ID names: unset CLEARML_TASK_ID"
    if status:
        project = own_server.projects_create("old")["id"]
        task = own_server.tasks_create("an old one", "training", project=project)["id"]
        own_server.tasks[task]["status"] = status
        words = f"the task an old one ({task}), which CLEARML_TASK_ID names, is {status}: unset CLEARML_TASK_ID"
    before = deepcopy((own_server.tasks, own_server.models))
    run = begin("--dry-run", CLEARML_TASK_ID=task)
    assert run.end() == 2, run.everything
    assert run.stderr.splitlines() == [run.line]
    assert run.line.endswith(f"error: {words}")
    if status:
        doctor = begin("clearml_client.doctor", "--only", "server", script="-m", CLEARML_TASK_ID=task)
        assert doctor.end() == 0
        warning = f"^warning +server: task .*in the task an old one, which is {status} .*CLEARML_TASK"
        assert re.search(warning, doctor.stdout, re.MULTILINE)
    assert (own_server.tasks, own_server.models) == before
    assert not any(own_server.events.values())


def test_a_clone_is_used_and_its_own_destination_wins(
    begin: Begin, machine: Machine, own_server: ClearMLServer
) -> None:
    """Over Args/output_uri, which somebody has edited."""
    first = begin("--dry-run", "--output-uri", machine.home / "store")
    assert first.end() == 0, first.everything
    for edited in ("", "/var/tmp"):
        clone = own_server.tasks_clone(first.task)["id"]
        own_server.tasks[clone]["hyperparams"]["Args"]["output_uri"]["value"] = edited
        run = begin("--output-dir", "clone", CLEARML_TASK_ID=clone)
        assert run.end() == 0, run.everything
        name = own_server.tasks[clone]["name"]
        assert run.stdout.count(f"ClearML: this run is the task {name} ({clone}), which CLEARML_TASK_ID names\n") == 1
        own = "Storage: the task's own output destination wins over --output-uri"
        assert run.stdout.count(own) == run.stdout.count(f"{own} {edited}\n") == bool(edited), run.stdout
        where = rf"^Storage: file://{machine.home}/store \(the task's output destination: "
        assert re.search(where, run.stdout, re.MULTILINE), run.stdout
