"""The blocks of docs/beyond-one-machine.md that stand for themselves, as a reader copies them."""

import re
from pathlib import Path

import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, blocks
from stores import Rclone


@pytest.mark.parametrize("where", ["an S3 store", "file server", "folder"])
def test_the_model_comes_back_from_wherever_it_was_stored(
    machine: Machine, online: ClearMLServer, rclone: Rclone, few: list[object], tmp_path: Path, where: str
) -> None:
    machine.configure(online.configuration(), rclone.clearml_conf())
    target = {"an S3 store": rclone.uri("models"), "file server": "", "folder": str(tmp_path / "models")}[where]
    names = ["--project-name", where, "--task-name", "first"]
    assert machine.train(*names, "--dry-run", "--lr", 0.001).returncode == 0  # an older one of the same name
    run = machine.train(*names, *few, "--batch-size", 100, "--epochs", 1, "--output-uri", target)
    assert run.returncode == 0, run.stderr

    newest, best = blocks("Use the model")
    use = newest + best.replace("task = ", "best = ") + "print(best.id == task.id)\n"
    (machine.home / "use.py").write_text(
        use.replace("demo-project", where).replace('Path("data")', f'Path("{ROOT}/data")')
    )
    machine.variables["PYTHONPATH"] = str(ROOT)
    used = machine.run(machine.home / "use.py")
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines()[-2:] == ["7 is read as 7", "True"]


def test_the_search_has_the_names_that_a_run_has() -> None:
    """A run of it takes minutes and an agent: it was made by hand."""
    (search,) = blocks("A search over many runs")
    assert len(search.splitlines()) <= 20
    compile(search, "search", "exec")
    source = (ROOT / "pytorch_mnist.py").read_text()
    for option in re.findall(r"Args/(\w+)", search):
        assert f'add("--{option}"' in source
    assert '("accuracy", "test", accuracy, done)' in source
