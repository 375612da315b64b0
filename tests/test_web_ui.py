"""What a run shows in the web UI, read back through the SDK: of a run with a server, and of an imported session."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from clearml_server import ClearMLServer
from conftest import ROOT, LiveServer, Machine
from PIL import Image
from reading import EPOCH, evaluate, read_session

import pytorch_mnist

DIGITS = [str(digit) for digit in range(10)]


class Shown(NamedTuple):
    """A run, and what a server has of it."""

    machine: Machine
    run: subprocess.CompletedProcess[str]
    task: dict[str, Any]
    imported: bool


@pytest.fixture(scope="module", params=["online", "imported"])
def shown(
    request: pytest.FixtureRequest,
    server: ClearMLServer | LiveServer,
    project: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Shown:
    machine = Machine(tmp_path_factory.mktemp(request.param) / "home")
    machine.home.mkdir()
    machine.configure(server.configuration())
    imported = request.param == "imported"
    arguments = ["--project-name", project, "--task-name", request.param, "--epochs", 2, "--batch-size", 256]
    run = machine.train(*arguments, "--tags", "red", "blue", *(["--offline"] if imported else []))
    assert run.returncode == 0, run.stderr
    output = run.stdout
    if imported:  # by the very command that the run prints
        command = re.search(r"uv run (clearml-task --import-offline-session .*)", output)
        assert command
        program, *options = shlex.split(command[1])
        output = subprocess.check_output(
            [Path(sys.executable).with_name(program), *options], env=machine.environment, cwd=machine.home, text=True
        )
    task_id = re.search(r"/tasks/(\w+)/", output)
    assert task_id
    return Shown(machine, run, machine.read_task(task_id[1]), imported)


def last_epoch(run: subprocess.CompletedProcess[str]) -> tuple[float, float, float]:
    """Train loss, test loss and test accuracy of the last epoch, as printed."""
    *_, loss, test_loss, accuracy = EPOCH.findall(run.stdout)[-1]
    return float(loss), float(test_loss), float(accuracy) / 100


def predictions(shown: Shown) -> torch.Tensor:
    """Columns index, label, prediction, confidence."""
    with open(shown.task["artifacts"]["predictions"]["file"], newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "label", "prediction", "confidence"]
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def test_info(shown: Shown, project: str) -> None:
    task = shown.task
    assert task["status"] == "completed"
    assert (task["project"], task["name"]) == (project, "imported" if shown.imported else "online")
    assert sorted(task["tags"]) == ["blue", "red"]


def test_hyperparameters(shown: Shown) -> None:
    parameters = shown.task["parameters"]
    given = {name.removeprefix("Args/"): value for name, value in parameters.items() if name.startswith("Args/")}
    assert given["epochs"] == "2"
    assert given["batch_size"] == "256"
    assert given["lr"] == "0.3"
    assert {name for name in parameters if not name.startswith("Args/")} == {"Recipe/shift", "Recipe/nesterov"}


def test_configuration_objects(shown: Shown) -> None:
    assert shown.task["network"] == str(pytorch_mnist.Net())
    setup = shown.task["setup"]
    assert setup["device"] == str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    assert setup["threads"] == "1"  # OMP_NUM_THREADS in conftest.py
    assert setup["torch"] == version("torch")
    assert "momentum: 0.9" in setup["optimizer"]


def test_scalars(shown: Shown) -> None:
    scalars, (loss, test_loss, accuracy) = shown.task["scalars"], last_epoch(shown.run)
    curves = {(title, name): curve for title, group in scalars.items() for name, curve in group.items()}
    expected = {
        ("loss", "train"): loss,
        ("loss", "test"): test_loss,
        ("accuracy", "test"): accuracy,
    }
    for name, value in expected.items():
        assert curves[name]["x"] == [235, 470]
        assert curves[name]["y"][-1] == pytest.approx(value, abs=1e-4)
    for name in (("loss", "train batch"), ("learning rate", "OneCycleLR")):
        assert curves[name]["x"] == [100, 200, 335, 435]
    assert curves["images per second", "train"]["x"] == [235, 470]
    assert min(curves["images per second", "train"]["y"]) > 0
    assert shown.task["single"]["final accuracy"] == pytest.approx(accuracy, abs=5e-5)
    assert shown.task["single"]["final loss"] == pytest.approx(test_loss, abs=5e-5)
    assert shown.task["single"]["seconds"] > 1


def test_the_model_evaluated_again_has_the_reported_accuracy(shown: Shown) -> None:
    accuracy = shown.task["single"]["final accuracy"]
    if shown.imported:  # OutputModel does not work offline, so the model is an artifact
        model = shown.task["artifacts"]["model"]
        assert model["size"] == shown.machine.outputs("model.pt").stat().st_size
    else:
        (model,) = shown.task["models"]
        assert (model["name"], model["framework"]) == ("online", "PyTorch")
        assert model["labels"] == {digit: int(digit) for digit in DIGITS}
        assert model["design"] == str(pytorch_mnist.Net())
        metadata = {name: entry["value"] for name, entry in model["metadata"].items()}
        assert float(metadata["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
        assert metadata.keys() == {"accuracy", "epochs", "lr", "seed"}
        assert (metadata["epochs"], metadata["lr"]) == ("2", "0.3")
        assert f"Stored: {model['url']}" in shown.run.stdout
        assert model["url"].startswith(shown.task["output_uri"])
        assert "model" not in shown.task["artifacts"]
    assert evaluate(Path(model["file"])) == pytest.approx(accuracy * 100, abs=1e-4)


def test_predictions(shown: Shown) -> None:
    index, label, prediction, confidence = predictions(shown).T
    assert index.tolist() == list(range(10_000))
    _, labels = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    assert torch.equal(label.long(), labels)
    assert (label == prediction).double().mean() == pytest.approx(shown.task["single"]["final accuracy"], abs=1e-6)
    assert 0.1 <= confidence.min() <= confidence.max() <= 1


def test_plots(shown: Shown) -> None:
    matrix = shown.task["plots"]["confusion matrix"]
    (heatmap,) = matrix["data"]
    hits = np.array(heatmap["z"])
    assert heatmap["x"] == heatmap["y"] == DIGITS
    assert matrix["layout"]["xaxis"]["dtick"] == matrix["layout"]["yaxis"]["dtick"] == 1
    assert heatmap["zmax"] == (hits - np.diag(hits.diagonal())).max()  # the mistakes have all the colours
    assert (matrix["layout"]["xaxis"]["title"], matrix["layout"]["yaxis"]["title"]) == ("prediction", "label")
    assert hits.sum() == 10_000
    assert hits.trace() / 10_000 == pytest.approx(shown.task["single"]["final accuracy"], abs=1e-6)
    _, label, prediction, _ = predictions(shown).long().T
    for cell in [(4, 9), (7, 2), (0, 0)]:
        assert hits[cell] == ((label == cell[0]) & (prediction == cell[1])).sum()

    (table,) = shown.task["plots"]["per digit"]["data"]
    assert table["header"]["values"] == ["digit", "precision", "recall", "F1", "support"]
    digit, precision, recall, f1, support = table["cells"]["values"]
    assert digit == DIGITS
    assert support == hits.sum(axis=1).tolist()
    expected = np.array([hits.diagonal() / hits.sum(axis=0), hits.diagonal() / hits.sum(axis=1)])
    np.testing.assert_allclose(np.array([precision, recall], dtype=float), expected, atol=5e-5)
    np.testing.assert_allclose(np.array(f1, dtype=float), 2 / (1 / expected).sum(axis=0), atol=1e-4)


def test_debug_sample_shows_the_worst_mistakes(shown: Shown) -> None:
    (path,) = shown.task["samples"]
    assert Path(path).read_bytes() == shown.machine.outputs("mistakes.png").read_bytes()
    picture = np.asarray(Image.open(path).convert("L"), dtype=float) / 255
    assert min(picture.shape) >= 700
    _, label, prediction, confidence = predictions(shown).T
    mistakes = (label != prediction).nonzero().flatten()
    worst = mistakes[confidence[mistakes].argmax()]
    images, _ = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    tile = Image.fromarray(np.uint8(255 * (1 - picture[60:200, 10:150])))  # the first of 25
    seen = np.asarray(tile.resize((28, 28), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(seen.flatten(), images[worst].numpy().flatten())[0, 1] > 0.9


def test_console_has_every_line_once(shown: Shown) -> None:
    console = shown.task["console"]
    assert EPOCH.findall(console) == EPOCH.findall(shown.run.stdout)
    assert len(EPOCH.findall(console)) == 2
    assert console.count("Test accuracy ") == 1
    assert console.count("Model: ") == 1
    assert "\x1b" not in console
    assert "\r" not in console


def test_a_run_without_a_terminal_prints_plain_lines(shown: Shown) -> None:
    assert "\r" not in shown.run.stdout + shown.run.stderr
    assert "images/s" in shown.run.stdout


def test_a_terminal_has_a_progress_bar_that_clearml_does_not_record(machine: Machine) -> None:
    terminal, far_end = os.openpty()
    process = machine.start("pytorch_mnist.py", "--epochs", 1, "--batch-size", 512, stdout=far_end, stderr=far_end)
    os.close(far_end)
    seen = b""
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # EIO: the last writer has gone
            break
    os.close(terminal)
    assert process.wait(timeout=60) == 0, seen
    bar = re.search(rb"\r *\d+%\|.*/118 \[", seen)
    assert bar, seen
    _, _, console = read_session(machine.session())
    assert len(EPOCH.findall(console)) == 1
    assert not re.search(r"\d%\||\r|\x1b", console)


CLONE = """
import sys
from clearml import Task
clone = Task.clone(sys.argv[1])
for name, value in zip(sys.argv[2::2], sys.argv[3::2]):
    clone.set_parameter(name, value)
print(clone.id)
"""


def clone(machine: Machine, task: str, *changes: object) -> str:
    (machine.home / "clone.py").write_text(CLONE)
    return machine.run(machine.home / "clone.py", task, *changes).stdout.split()[-1]


@pytest.mark.parametrize("moved", [False, True], ids=["here", "elsewhere"])
def test_a_clone_trains_as_it_was_changed_and_shows_what_ran(shown: Shown, tmp_path: Path, moved: bool) -> None:
    """The clone is run as clearml-agent runs it: the task to take its arguments from is in CLEARML_TASK_ID."""
    machine = shown.machine
    changes = ["Args/epochs", 1, "Args/batch_size", 1000, "Args/dry_run", True, "Recipe/nesterov", False]
    task_id = clone(machine, shown.task["id"], *changes)
    script = ROOT / "pytorch_mnist.py"
    if moved:
        for name in ("clearml_client", "data"):
            shutil.copytree(ROOT / name, tmp_path / name)
        script = Path(shutil.copy(script, tmp_path))
    run = Machine(machine.home, {"CLEARML_TASK_ID": task_id}).run(script)
    assert run.returncode == 0, run.stderr
    assert "epoch 1/1 " in run.stdout
    assert "offline session" not in run.stdout
    task = machine.read_task(task_id)
    assert (task["parameters"]["Args/batch_size"], task["parameters"]["Recipe/nesterov"]) == ("1000", "False")
    assert task["parameters"].keys() == shown.task["parameters"].keys()
    assert "nesterov: False" in task["setup"]["optimizer"]


def test_a_run_costs_few_requests(stand_in: ClearMLServer, machine: Machine, few: list[object]) -> None:
    machine.configure(stand_in.configuration())

    def requests(epochs: int) -> int:
        before = len(stand_in.requests)
        run = machine.train(*few, "--epochs", epochs)
        assert run.returncode == 0, run.stderr
        # The SDK looks every two seconds whether the task was aborted: that goes by the clock, not by the epoch.
        return len([request for request in stand_in.requests[before:] if request.path != "tasks.get_all"])

    one, three = requests(1), requests(3)
    print(f"{one} requests with one epoch, {three} with three")
    assert one <= 90  # a fifth of them are the proofs of what is stored
    assert three - one <= 2 * 5
