"""The package, copied beside the script of its README: how that script ends, and what the modules may use."""

import ast
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any

import psutil
import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Begin, Machine, wait_until
from stores import Rclone

PACKAGE = ROOT / "clearml_client"

# Before what more code goes.
PLACES = {"top": "from pathlib", "above": "def main", "init": "        settings = ", "block": "        model = "}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write the README's script, with more code at some places, beside a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "elsewhere/clearml_client")

    def write(below: str = "", **more: str) -> Path:
        (text,) = re.findall("```python\n(.*?)```", (PACKAGE / "README.md").read_text(), re.DOTALL)
        for place, code in more.items():
            before, found, after = text.partition(PLACES[place])
            text = f"{before}{indent(code, found[: len(found) - len(found.lstrip())])}\n{found}{after}"
        (tmp_path / "elsewhere/script.py").write_text(text + below)
        return tmp_path / "elsewhere/script.py"

    return write


# --- what a script of one's own gets ----------------------------------------------------------------------------------
def test_copied_it_works(write: Write, machine: Machine, stand_in: ClearMLServer, tmp_path: Path) -> None:
    """With a server and a store, and without; a path may be a str."""
    script = write()
    script.write_text(script.read_text().replace("verify_upload(model)", 'verify_upload("line.pt")'))
    machine.run(script)
    assert machine.session().exists()
    with Rclone(tmp_path / "store") as store:
        target = f'sdk.development.default_output_uri: "{store.uri("x")}"'
        machine.configure(stand_in.configuration(), store.clearml_conf(), target)
        machine.run(write())
        (key,) = store.keys()
        assert store.get(key) == (machine.home / "line.pt").read_bytes()
    *_, task = stand_in.tasks.values()
    assert (task["status"], task["name"]) == ("completed", "own task")
    assert task["hyperparams"]["General"]["lr"]["value"] == "0.1"
    losses = [event for event in stand_in.events[task["id"]].values() if event["metric"] == "loss"]
    assert [event["iter"] for event in losses] == [0, 1, 2]


def test_after_a_failure_the_sdk_takes_the_same_task(write: Write, machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration())
    first = machine.run(write(block="raise SystemExit(3)"), code=3)
    second = machine.run(write())
    assert f"overwriting (reusing) task id={first.task}" in second.stdout
    assert stand_in.tasks[first.task]["status"] == "completed"


ATEXIT = "import atexit; atexit.register(print, 'atexit: {}')"
THREAD = """import threading, time; from clearml_client import ending
ending.LAST_RESORT = 5
threading.Thread(target=time.sleep, args=[600]).start()"""
UPLOAD = """Path("a ü.txt").write_text("any")
with guard.verify_upload("a ü.txt"): task.upload_artifact("text", "a ü.txt", wait_on_upload=True)"""
IN_TIME = """import faulthandler, time; from clearml_client.ending import limit
later = faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda seconds, **more: later(seconds - 10, **more)
with limit(0.5, "what ends in time"): pass
time.sleep(1)"""
STOP = """import os, signal, threading
threading.Timer(0.3, os.{kill}, [os.getpid(), signal.{name}]).start()
while True:
    for _ in loader:
        pass"""
ENDINGS = {
    "the end": (IN_TIME, 0, "completed", ""),
    "exit 0": (f"{UPLOAD}\nraise SystemExit(0)", 0, "completed", ""),
    "exit 3": ("raise SystemExit(3)", 3, "failed", "error: the script left with sys.exit(3)"),
    "exit 256": ("raise SystemExit(256)", 1, "failed", "error: the script left with sys.exit(256)"),
    "exit with words": ("raise SystemExit('words')", 1, "failed", "error: words"),
    "a mistake": ("1 / 0", 1, "failed", "error: ZeroDivisionError, see above"),
    "a mistaken call": ("import requests; requests.Session().mount(1, 2)", 1, "failed", "error: TypeError, see above"),
    "nested": ("with run.guard(): pass", 1, "failed", "run.guard was used before in this process"),
    "a full disk": ("raise OSError(28, 'No space left')", 1, "failed", "error: cannot write a file: No space left"),
    # Task.init sets handlers of the SDK's: the guard's are back as soon as it returns.
    "a signal at once": ("import signal; signal.raise_signal(15)\nwhile True: pass", 143, "stopped", "terminated"),
    "a thread": (f"{THREAD}\nraise SystemExit('words')", 1, "failed", "error: words"),
}
STOPS = {
    **{"killpg SIGINT": "interrupted", "kill SIGTERM": "terminated", "kill SIGHUP": "hung up"},
    **{"kill SIGUSR1": "stopped by SIGUSR1", "kill SIGXCPU": "out of CPU time"},
}
for case, words in STOPS.items():
    kill, name = case.split()
    ENDINGS[case] = (STOP.format(kill=kill, name=name), 128 + signal.Signals[name], "stopped", words)


@pytest.mark.parametrize("case", ENDINGS)
def test_every_end_is_true_and_leaves_nothing(
    write: Write, machine: Machine, stand_in: ClearMLServer, case: str
) -> None:
    """Two workers live when it comes, but for a signal at once; `atexit` runs, also what was registered early."""
    code, number, status, words = ENDINGS[case]
    machine.configure(stand_in.configuration())
    place = "init" if case == "a signal at once" else "block"
    run = machine.start(write(top=ATEXIT.format("early"), **{place: f"{ATEXIT.format('late')}\n{code}"}))
    assert run.end() == number, run.everything
    left = processes_of_session(run.process.pid)
    assert not left, run.everything
    said = [line for line in run.stderr.splitlines() if line.startswith("script.py: ")]
    assert len(said) == bool(words), run.everything
    assert words in run.stderr
    assert "ABORTED" not in run.stdout + run.stderr  # as the SDK has it of any task that does not run
    assert ("Traceback" in run.stderr) == case.startswith("a mistake"), run.everything
    assert ("atexit: late\natexit: early\n" in run.stdout) == (case != "a thread")  # which the process waits for
    *_, task = stand_in.tasks.values()
    assert task["status"] == status


def processes_of_session(number: int) -> list[list[str]]:
    """List the command lines of what lives on, and end it."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
                process.kill()
    return [line for line in found if line]  # one that is just dying has none


@pytest.mark.parametrize(
    ("below", "words"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("main()", "run.guard was used before in this process, and a process has one run"),
    ],
)
def test_below_the_block_the_process_is_the_scripts(write: Write, machine: Machine, below: str, words: str) -> None:
    run = machine.run(write(below=below, top=ATEXIT.format("early")), code=1)
    assert "atexit: early" in run.stdout
    assert run.stderr.splitlines()[-1] == words


def test_the_block_may_stand_outside_of_any_function(write: Write, machine: Machine) -> None:
    """Below it the script has its own exit code, and what was written to an open file arrives."""
    below = "late = open('late.txt', 'w'); late.write('flushed')\nraise SystemExit(3)"
    script = write(below, top=ATEXIT.format("early"))
    script.write_text(script.read_text().replace("def main():", "if True:").replace("    main()", "    pass"))
    machine.variables["PYTHONHASHSEED"] = "0"  # a process of its own: a fork has more frames, and another end
    run = machine.run(script, code=3)
    assert run.stderr == ""
    assert "atexit: early" in run.stdout
    assert (machine.home / "late.txt").read_text() == "flushed"


DRIVER = """import subprocess, sys
from clearml import Task
Task._report_subprocess_enabled = False  # which takes ten seconds to end
Task.init("own project", "driver")
sys.exit(subprocess.run([sys.executable, f"{sys.path[0]}/driven.py"]).returncode)
"""
DRIVEN = """import clearml_client
clearml_client.prepare_environment()
from clearml import Task
from clearml_client import run
with run.guard() as guard:
    Task.init("own project", "driven", output_uri=guard.output_uri)
"""


def test_a_run_that_another_program_starts_has_a_task_of_its_own(
    write: Write, machine: Machine, stand_in: ClearMLServer
) -> None:
    """By the variable of the program that started it, the SDK would have it take that program's task."""
    machine.configure(stand_in.configuration())
    before = set(stand_in.tasks)
    driver = write().with_name("driver.py")
    driver.write_text(DRIVER)
    driver.with_name("driven.py").write_text(DRIVEN)
    machine.run(driver)
    new = [task for key, task in stand_in.tasks.items() if key not in before]
    assert [(task["name"], task["status"]) for task in new] == [("driver", "completed"), ("driven", "completed")]


def test_a_signal_to_a_child_is_the_childs(write: Write, machine: Machine) -> None:
    """However early it comes: a child that is forked begins with what the guard has set for its own process.

    A child's way out of the block is its own, too, and SIGHUP is nobody's under nohup.
    """
    top = """import atexit, multiprocessing, os, signal, subprocess, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
early = []
os.register_at_fork(after_in_child=lambda: early and os.kill(os.getpid(), signal.SIGTERM))"""
    block = """child = subprocess.Popen(["sleep", "600"])
child.terminate()
early.append(True)
forked = multiprocessing.Process(target=time.sleep, args=[600])
forked.start()
forked.join()
early.clear()
if not (left := os.fork()):
    atexit._clear()  # by which it would end the workers
    raise SystemExit(3)
os.kill(os.getpid(), signal.SIGHUP)
print("ended by", child.wait(), forked.exitcode, os.waitstatus_to_exitcode(os.waitpid(left, 0)[1]))"""
    run = machine.run(write(top=top, block=block))
    assert "ended by -15 -15 3" in run.stdout
    assert run.stderr == ""


WAIT = "import time\nPath('ready').touch()\nwhile Path('ready').exists(): time.sleep(0.1)\n"
CALL = "task.upload_artifact('notes', {'a': 1}, wait_on_upload=True)"
NOT_REGISTERED = "ClearML lost something: .*/line.pt was not registered: no answer from the ClearML API server"


@pytest.mark.parametrize(
    ("left_out", "call", "code", "words"),
    [(", auto_connect_frameworks=False", "", 1, NOT_REGISTERED), ("", CALL, 0, "")],
)
def test_a_server_that_is_away_for_a_while(
    write: Write,
    begin: Begin,
    machine: Machine,
    own_server: ClearMLServer,
    left_out: str,
    call: str,
    code: int,
    words: str,
) -> None:
    """By default torch.save makes a model: it is left out, and the run fails at its end. A call waits, and says so."""
    script = write(block=WAIT + call)
    script.write_text(script.read_text().replace(left_out, ""))
    run = begin(script=script, CLEARML_OUTPUT_URI=str(machine.home))
    wait_until((machine.home / "ready").exists, run)
    own_server.stop()
    (machine.home / "ready").unlink()
    run.wait_for("waiting for the ClearML server")
    own_server.start()
    assert run.end() == code, run.everything
    assert re.search(words, run.stderr), run.stderr
    assert ("notes" in machine.read_task(run.task)["artifacts"]) == bool(call)


def test_a_name_that_the_server_refuses_has_a_cure(write: Write, machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration())
    script = write()
    script.write_text(script.read_text().replace('"own project"', '"p/quu"'))
    assert re.search("cannot be blank.*each part of a project's name", machine.run(script, code=1).stderr)


def test_a_store_that_dies_is_not_taken_for_the_server(
    write: Write, begin: Begin, machine: Machine, own_server: ClearMLServer, tmp_path: Path
) -> None:
    with Rclone(tmp_path / "store") as store:
        machine.configure(own_server.configuration(), store.clearml_conf())
        script = write(block=f"{WAIT}task.upload_artifact('notes', {{'a': 1}})\nraise SystemExit(0)")
        run = begin(script=script, CLEARML_OUTPUT_URI=store.uri("x"))
        wait_until((machine.home / "ready").exists, run)
    (machine.home / "ready").unlink()
    assert run.end() == 1, run.everything
    assert re.search(r"error: cannot see whether s3://.*/notes.* is complete: cannot check: no answer", run.stderr)


ASYNC = "async_enable=False"
REMOVED = "line.pt was removed before .*auto_delete_file=False. keeps it"


@pytest.mark.parametrize(
    ("left_out", "code", "words"), [(ASYNC, 0, ""), (f"auto_delete_file=False, {ASYNC}", 1, REMOVED)]
)
def test_an_upload_in_the_background_is_waited_for(
    write: Write, machine: Machine, stand_in: ClearMLServer, left_out: str, code: int, words: str
) -> None:
    """By default update_weights() uploads there, and removes the file."""
    machine.configure(stand_in.configuration())
    script = write()
    text = script.read_text()
    assert text.count(f", {left_out})") == 1
    script.write_text(text.replace(f", {left_out})", ")"))
    run = machine.run(script, code=code)
    assert re.search(words, (run.stderr.splitlines() or [""])[-1]), run.stderr


def test_no_worker_is_forked_while_the_sdk_asks_git(write: Write, machine: Machine, tmp_path: Path) -> None:
    """It would hold the pipe to git open, and the SDK would wait for it at the end."""
    git, asked = tmp_path / "bin/git", tmp_path / "asked"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\nsleep 1\ntouch {asked}\nexit 1\n")
    git.chmod(0o755)
    machine.variables["PATH"] = f"{git.parent}:{os.environ['PATH']}"
    hook = f"import os; os.register_at_fork(before=lambda: print('asked:', os.path.exists('{asked}')))"
    run = machine.run(write(top=hook))
    assert "asked: True" in run.stdout
    assert "asked: False" not in run.stdout


# --- what waits for ever ----------------------------------------------------------------------------------------------
LIMIT = "from clearml_client.ending import LIMITS, limit; import ctypes, time\n"
RESUME = "Task.query_tasks = lambda **_: time.sleep(600); run.limit = lambda _, what: limit(1, what)\n"
RESUME += "run.check_resumable('abc')"
STACKS = "the stacks of all threads are in "
HANGS = {
    "a thread that waits": ("block", "with limit(1, 'a'): time.sleep(600)", f"error: a: no answer for 1 s; {STACKS}"),
    "the interpreter's lock held": ("above", "with limit(1, 'a'): ctypes.PyDLL(None).sleep(600)", "Timeout (0:00:11)!"),
    "the task to resume": ("block", RESUME, f"error: the task abc: no answer for 1 s; {STACKS}"),
    "Task.init": ("above", "LIMITS['init'] = 2", "error: Task.init waits for the ClearML server, or for git: no"),
}


@pytest.mark.parametrize("case", HANGS)
def test_a_hang_ends_with_the_stacks_of_all_threads(
    write: Write, machine: Machine, stand_in: ClearMLServer, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    place, code, words = HANGS[case]
    released = threading.Event()
    if case == "Task.init":
        monkeypatch.setattr(stand_in, "tasks_create", lambda **_: released.wait(60) and {})
    machine.configure(stand_in.configuration())
    run = machine.run(write(**{place: f"{LIMIT}{code}"}), code=1)
    released.set()
    assert words in run.stderr
    if place == "block":
        assert [*stand_in.tasks.values()][-1]["status"] == "failed"
    stacks = re.search(f"{STACKS}(.*)", run.stderr)
    assert re.search("script.py.* in (main|<module>)", Path(stacks[1]).read_text() if stacks else run.stderr)


START = "import clearml_client\nclearml_client.prepare_environment()"


def test_the_users_own_settings_win(write: Write, machine: Machine) -> None:
    keys = "'api.http.retries.backoff_max', 'sdk.development.report_use_subprocess', 'sdk.aws.boto3.read_timeout', "
    keys += "'api.http.retries.total'"
    script = write().with_name("settings.py")
    script.write_text(f"{START}\nfrom clearml_client import sdk\nprint(list(map(sdk.setting, [{keys}])))")
    run = machine.run(script)
    assert "[10, False, None, 240]" in run.stdout, run.everything
    machine.configure("api.http.retries { backoff_max: 77, total: 100 }", "sdk.aws.boto3.read_timeout: 300")
    assert "[77, False, 300, 100]" in machine.run(script).stdout
    machine.variables["CLEARML_CONFIG_PATH"] = str(machine.home)  # a folder of the user's own, without such defaults
    assert "[77, None, 300, 100]" in machine.run(script).stdout


# --- what the modules may use -----------------------------------------------------------------------------------------
def private(node: Any) -> bool:
    """Tell a name of the SDK that is not public: a module below clearml, or an attribute with an underscore."""
    if isinstance(node, ast.ImportFrom):
        return str(node.module).startswith("clearml.")
    if isinstance(node, ast.Import):
        return any(name.name.startswith("clearml.") for name in node.names)
    is_private = isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)
    return bool(is_private) and ast.unparse(node.value) not in ("os", "sys", "self", "atexit")


@pytest.mark.parametrize("path", [*PACKAGE.glob("*.py"), ROOT / "pytorch_mnist.py"], ids=lambda path: path.stem)
def test_private_names_of_the_sdk_stand_in_one_module(path: Path) -> None:
    found = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if private(node)]
    assert bool(found) == (path.name == "sdk.py"), found
