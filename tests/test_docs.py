"""The blocks of docs/beyond-one-machine.md that stand for themselves, as a reader copies them."""

import re
from pathlib import Path

from clearml_server import ClearMLServer
from conftest import ROOT, Machine, blocks
from reading import stored_curves
from stores import Rclone


def test_the_model_comes_back_from_wherever_it_was_stored(
    machine: Machine, online: ClearMLServer, rclone: Rclone, few: list[object], tmp_path: Path
) -> None:
    """That of the newest run of the name, and of the best run of the project."""
    machine.configure(online.configuration(), rclone.clearml_conf())
    newest, best = blocks("Use the model")
    use = newest.replace('Path("data")', f'Path("{ROOT}/data")') + best.replace("task = ", "best = ")
    (machine.home / "use.py").write_text(f"{use}print(task.id, best.id)\n")
    machine.variables["PYTHONPATH"] = str(ROOT)
    names = ["--project-name", "demo-project", "--task-name", "first"]
    assert machine.train(*names, "--dry-run", "--lr", 0.001).returncode == 0  # neither

    for target in (rclone.uri("models"), "", tmp_path / "models"):
        run = machine.train(*names, *few, "--batch-size", 100, "--epochs", 1, "--output-uri", target)
        assert run.returncode == 0, run.stderr
        used = machine.run(machine.home / "use.py")
        assert used.returncode == 0, used.stderr
        accuracies = {task: [*stored_curves(online, task)["accuracy", "test"].values()][-1] for task in online.tasks}
        ids = f"{[*online.tasks][-1]} {max(accuracies, key=accuracies.__getitem__)}"
        assert used.stdout.splitlines()[-2:] == ["7 is read as 7", ids]


def test_the_search_has_the_names_that_a_run_has() -> None:
    """A run of it takes minutes and an agent: it was made by hand."""
    (search,) = blocks("A search over many runs")
    assert len(search.splitlines()) <= 20
    compile(search, "search", "exec")
    source = (ROOT / "pytorch_mnist.py").read_text()
    for option in re.findall(r"Args/(\w+)", search):
        assert f'add("--{option}"' in source
    assert '("accuracy", "test", accuracy, done)' in source
