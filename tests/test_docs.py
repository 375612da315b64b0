"""The blocks of docs/beyond-one-machine.md that stand for themselves, as a reader copies them."""

import re
from pathlib import Path

from clearml_server import ClearMLServer
from conftest import ROOT, Machine, blocks, mnist
from reading import stored_curves
from stores import Rclone


def test_the_model_comes_back_from_wherever_it_was_stored(
    machine: Machine, online: ClearMLServer, rclone: Rclone, tmp_path: Path
) -> None:
    """That of the newest run of the name, and of the best run of the project."""
    machine.configure(online.configuration(), rclone.clearml_conf())
    training = ["--data-dir", mnist(1000, 200), "--batch-size", 25, "--epochs", 1]
    targets = {"in a store": rclone.uri("models"), "on the file server": "", "in a folder": tmp_path / "models"}
    assert machine.train("--task-name", "in a store", "--dry-run", "--lr", 0.001).returncode == 0  # neither
    for name, target in targets.items():
        run = machine.train("--task-name", name, *training, "--output-uri", target)
        assert run.returncode == 0, run.stderr

    newest, best = (f"{block}print(task.id)" for block in blocks("Use the model"))
    program = "\n".join([*(newest.replace('"first"', repr(name)) for name in targets), best])
    program = program.replace("demo-project", "mnist-training-poc").replace('Path("data")', f'Path("{ROOT}/data")')
    for module in ("pytorch_mnist.py", "clearml_client"):  # "in the checkout"
        (machine.home / module).symlink_to(ROOT / module)
    (machine.home / "use.py").write_text(program)
    used = machine.run(machine.home / "use.py")
    assert used.returncode == 0, used.stderr
    _, *tasks = online.tasks
    accuracies = {task: [*stored_curves(online, task)["accuracy", "test"].values()][-1] for task in online.tasks}
    printed = [line for task in tasks for line in ("7 is read as 7", task)]
    assert used.stdout.splitlines()[-7:] == [*printed, max(accuracies, key=accuracies.__getitem__)]


def test_the_search_has_the_names_that_a_run_has() -> None:
    """A run of it takes minutes and an agent: it was made by hand."""
    (search,) = blocks("A search over many runs")
    assert len(search.splitlines()) <= 20
    compile(search, "search", "exec")
    source = (ROOT / "pytorch_mnist.py").read_text()
    for option in re.findall(r"Args/(\w+)", search):
        assert f'add("--{option}"' in source
    assert '("accuracy", "test", accuracy, done)' in source
