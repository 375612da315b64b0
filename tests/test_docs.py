"""The blocks of docs/beyond-one-machine.md that stand for themselves, as a reader copies them."""

import re
from pathlib import Path

from clearml_server import ClearMLServer
from conftest import ROOT, Machine, blocks, mnist
from reading import stored_curves
from stores import Rclone

# A finished search is a task of the project, too, and has no accuracy.
SEARCH = """
from clearml import Task
Task.create("mnist-training-poc", "search", "optimizer").mark_completed(force=True)
"""
TOP = """
class search:
    get_top_experiments = lambda count: Task.get_tasks(project_name="mnist-training-poc")
    stop = lambda wait_for_reporter: None
"""


def test_models_and_scores_come_back(machine: Machine, online: ClearMLServer, rclone: Rclone, tmp_path: Path) -> None:
    """The model of the newest run of a name from wherever it was stored, the best run, and what a search prints."""
    machine.configure(online.configuration(), rclone.clearml_conf())
    training = ["--data-dir", mnist(1000, 200), "--batch-size", 25, "--epochs", 1]
    targets = {"in a store": rclone.uri("models"), "on the file server": "", "in a folder": tmp_path / "models"}
    assert machine.train("--task-name", "in a store", "--dry-run", "--lr", 0.001).returncode == 0  # neither
    for name, target in targets.items():
        run = machine.train("--task-name", name, *training, "--output-uri", target)
        assert run.returncode == 0, run.stderr

    newest, best = (f"{block}print(task.id)" for block in blocks("Use the model"))
    newest_of_each = [newest.replace('"first"', repr(name)) for name in targets]
    (search,) = blocks("A search over many runs")
    top = search[search.index("for task in search") :]
    program = "\n".join([*newest_of_each, SEARCH, best, TOP, top]).replace("demo-project", "mnist-training-poc")
    for module in ("pytorch_mnist.py", "clearml_client"):  # "in the checkout"
        (machine.home / module).symlink_to(ROOT / module)
    (machine.home / "use.py").write_text(program)
    used = machine.run(machine.home / "use.py")
    assert used.returncode == 0, used.stderr
    assert {task["status"] for task in online.tasks.values()} == {"completed"}
    _, *tasks, _ = online.tasks
    scores = {task: stored_curves(online, task).get(("accuracy", "test"), {}) for task in online.tasks}
    accuracies = {task: list(curve.values())[-1] for task, curve in scores.items() if curve}
    printed = [line for task in tasks for line in ("7 is read as 7", task)]
    expected = [*printed, max(accuracies, key=accuracies.__getitem__)]
    lines = used.stdout[used.stdout.index("7 is read") :].splitlines()
    assert lines[: len(expected)] == expected
    assert {line.split()[0] for line in lines[len(expected) :]} == set(accuracies)


def test_the_search_has_the_names_that_a_run_has() -> None:
    """A run of it takes minutes and an agent: it was made by hand."""
    (search,) = blocks("A search over many runs")
    compile(search, "search", "exec")
    source = (ROOT / "pytorch_mnist.py").read_text()
    for option in re.findall(r"Args/(\w+)", search):
        assert f'"--{option}"' in source
    assert 'report_scalar("accuracy", "test", accuracy' in source
