"""The package beside the example: copied, it works; its imports go one way; what it holds of every run."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine
from stores import Rclone, free_port

PACKAGE = ROOT / "clearml_client"

FIVE_LINES = """
import sys
import clearml_client
clearml_client.prepare_environment()
from clearml import Task
from clearml_client import run

@run.guarded
def main():
    with run.starting():
        task = Task.init("a project", "a task", auto_connect_frameworks=False)
    storage = run.prove_storage(task, sys.argv[1])
    exec(sys.argv[2])
    run.finish(task)

main()
"""

# What each module may import of the package. "" is its __init__.
ARROWS = {
    "errors": set(),
    "sdk": set(),
    "configuration": {"", "sdk", "errors"},
    "server": {"sdk", "configuration", "errors"},
    "storage": {"sdk", "server", "configuration", "errors"},
    "agent": {"sdk", "server", "configuration", "errors"},
    "ranks": {"errors"},
    "run": {"sdk", "server", "storage", "configuration", "errors", "agent", "ranks"},
    "arguments": {"storage", "errors", "ranks"},
    "checkpoint": {"run", "errors", "arguments", "ranks"},
    "doctor": {"", "sdk", "server", "storage", "configuration", "errors"},
    "cleanup": {"", "sdk", "server", "storage", "configuration", "errors"},
    "__init__": set(),
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A script that trains nothing, with the package beside it."""
    shutil.copytree(PACKAGE, tmp_path / "elsewhere/clearml_client")
    (tmp_path / "elsewhere/script.py").write_text(FIVE_LINES)
    return tmp_path / "elsewhere/script.py"


def imports(path: Path) -> set[str]:
    """The modules of the package that a module of it imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {"" for name in node.names if name.name == "clearml_client"}
        elif isinstance(node, ast.ImportFrom) and node.module == "clearml_client":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("clearml_client."):
            found.add(str(node.module).partition(".")[2])
    return found


def test_imports_go_one_way() -> None:
    assert {path.stem: imports(path) for path in PACKAGE.glob("*.py")} == ARROWS


def test_private_names_of_the_sdk_stand_in_one_module() -> None:
    """Whatever else imports clearml takes its public names only."""
    for path in [*PACKAGE.glob("*.py"), ROOT / "pytorch_mnist.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            deep = isinstance(node, ast.ImportFrom) and str(node.module).startswith("clearml.")
            deep |= isinstance(node, ast.Import) and any(name.name.startswith("clearml.") for name in node.names)
            assert path.stem == "sdk" or not deep, f"{path}: {ast.unparse(node)}"


def test_copied_it_works(copied: Path, machine: Machine, stand_in: ClearMLServer, tmp_path: Path) -> None:
    with Rclone(tmp_path / "store") as store:
        machine.configure(stand_in.configuration(), store.clearml_conf())
        model = "open('m.pt', 'w').write('w'); a = storage.folder + '/models/m.pt'\n"
        model += "from clearml import StorageManager; from pathlib import Path\n"
        model += "with run.delivering(Path('m.pt'), a): StorageManager.upload_file('m.pt', a)"
        done = machine.run(copied, store.uri("x"), model)
        assert done.returncode == 0, done.stdout + done.stderr
        (key,) = store.keys()
        assert store.get(key) == b"w"
    task = list(stand_in.tasks.values())[-1]
    assert (task["status"], task["name"]) == ("completed", "a task")


SIGNAL = "import signal; signal.raise_signal(signal.{})"


@pytest.mark.parametrize(
    ("code", "number", "status", "words"),
    [
        ("raise ValueError('a defect')", 1, "failed", "error: ValueError, see above"),
        ("raise OSError(28, 'No space left on device')", 1, "failed", "No space left on device"),
        ("sys.exit(3)", 3, "failed", "error: the script left with sys.exit(3)"),
        (SIGNAL.format("SIGHUP"), 129, "stopped", "hung up"),
        (SIGNAL.format("SIGUSR1"), 138, "stopped", "stopped by SIGUSR1"),
        (SIGNAL.format("SIGXCPU"), 152, "stopped", "out of CPU time"),
    ],
)
def test_copied_it_ends_truthfully(
    copied: Path, machine: Machine, stand_in: ClearMLServer, code: str, number: int, status: str, words: str
) -> None:
    machine.configure(stand_in.configuration())
    done = machine.run(copied, machine.home / "models", code)
    if sys.platform == "linux":  # elsewhere the signals have other numbers
        assert done.returncode == number, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("script.py: ")]
    assert words in line
    assert list(stand_in.tasks.values())[-1]["status"] == status


def test_copied_it_fails_fast(copied: Path, machine: Machine, stand_in: ClearMLServer) -> None:
    machine.configure(stand_in.configuration().replace(stand_in.api_url, f"http://127.0.0.1:{free_port()}"))
    done = machine.run(copied, "", "")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("script.py: error: no answer from the ClearML API server")
    assert f"uv run --directory {copied.parent} -m clearml_client.doctor" in line


def test_copied_the_doctor_is_there(copied: Path, machine: Machine) -> None:
    command = [sys.executable, "-m", "clearml_client.doctor", "--only", "configuration"]
    done = subprocess.run(command, cwd=copied.parent, env=machine.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok       configuration: cache folder" in done.stdout


@pytest.mark.parametrize("held", [False, True], ids=["a thread that waits", "the interpreter's lock held"])
def test_a_hang_ends_with_the_stacks_of_all_threads(copied: Path, machine: Machine, tmp_path: Path, held: bool) -> None:
    machine.variables["TMPDIR"] = str(tmp_path)
    hang = "import ctypes; ctypes.PyDLL(None).sleep(600)" if held else "import time; time.sleep(600)"
    done = machine.run(copied, "", f"with run.watchdog(1, 'nothing comes'): {hang}")
    assert done.returncode == 1
    (stacks,) = tmp_path.glob("stacks-*.txt")
    assert "in main" in stacks.read_text()
    if not held:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("script.py: ")]
        assert f"nothing comes: no answer for 1 s; where each thread stands is in {stacks}" in line


def test_the_users_own_settings_win(copied: Path, machine: Machine) -> None:
    keys = "'api.http.retries.backoff_max', 'sdk.development.report_use_subprocess', 'sdk.aws.boto3.read_timeout', "
    keys += "'api.http.retries.total'"
    code = f"from clearml_client import sdk; print(list(map(sdk.setting, [{keys}])))"
    done = machine.run(copied, "", code)
    assert "[10, False, None, 240]" in done.stdout, done.stdout + done.stderr
    machine.configure("api.http.retries { backoff_max: 77, total: 100 }", "sdk.aws.boto3.read_timeout: 300")
    assert "[77, False, 300, 100]" in machine.run(copied, "", code).stdout
