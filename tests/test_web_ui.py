"""What a run shows in the web UI, read back through the SDK: of a run with a server, and of an imported session."""

import csv
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from clearml_server import ClearMLServer, Request
from conftest import ROOT, LiveServer, Machine, Run, mnist
from PIL import Image
from reading import EPOCH, evaluate

import pytorch_mnist

DIGITS = [str(digit) for digit in range(10)]


class Shown(NamedTuple):
    """A run, and what a server has of it. Its test set is the first 1,000 images."""

    machine: Machine
    run: Run
    task: dict[str, Any]

    @property
    def accuracy(self) -> float:
        return float(self.task["single"]["final accuracy"])

    @property
    def predictions(self) -> torch.Tensor:
        """Columns index, label, prediction, confidence."""
        with open(self.task["artifacts"]["predictions"]["file"], newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["index", "label", "prediction", "confidence"]
        return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["online", "imported"])
def test_the_web_ui_shows_what_ran_and_a_clone_trains_as_it_was_changed(
    kind: str, machine: Machine, server: ClearMLServer | LiveServer, project: str
) -> None:
    machine.configure(server.configuration())
    names = ["--project-name", project, "--task-name", kind, "--tags", "red", "blue"]
    options = ["--epochs", 2, "--batch-size", 64, "--log-interval", 10, "--data-dir", mnist(1500, 1000)]
    before = len(server.requests) if isinstance(server, ClearMLServer) else 0
    run = machine.train(*names, *options, *(["--offline"] if kind == "imported" else []))
    assert run.returncode == 0, run.stderr
    if isinstance(server, ClearMLServer):
        costs_few_requests(server.requests[before:])
    printed = imported(machine, run.stdout) if kind == "imported" else run.stdout
    task_id = re.search(r"/tasks/(\w+)/", printed)
    assert task_id
    shown = Shown(machine, run, machine.read_task(task_id[1]))

    task = shown.task
    assert (task["status"], task["project"], task["name"]) == ("completed", project, kind)
    assert sorted(task["tags"]) == ["blue", "red"]
    has_the_hyperparameters(task["parameters"])
    has_the_configuration_objects(task)
    has_the_printed_figures_as_curves_and_values(shown)
    if kind == "imported":  # OutputModel does not work offline, so the model is an artifact
        model = task["artifacts"]["model"]
        assert model["size"] == machine.outputs("model.pt").stat().st_size
    else:
        (model,) = task["models"]
        has_a_model_with_its_record(shown, model)
    assert evaluate(Path(model["file"]), 1000) == pytest.approx(shown.accuracy * 100, abs=1e-4)
    has_the_predictions(shown)
    has_the_confusion_matrix_and_the_table(shown)
    has_the_picture_of_the_worst_mistakes(shown)
    has_every_line_of_the_console_once(shown)
    a_clone_trains_as_it_was_changed(shown)


def costs_few_requests(requests: list[Request]) -> None:
    """A fifth of them are the proofs of what is stored; each epoch costs one or two. Offline there are none at all."""
    # The SDK looks every two seconds whether the task was aborted: that goes by the clock, not by the epoch.
    assert len([request for request in requests if request.path != "tasks.get_all"]) <= 90


def imported(machine: Machine, printed: str) -> str:
    """What is printed by the very command that the run prints."""
    command = re.search(r"uv run (clearml-task --import-offline-session .*)", printed)
    assert command
    program, *options = shlex.split(command[1])
    path = Path(sys.executable).with_name(program)
    return subprocess.check_output([path, *options], env=machine.environment, cwd=machine.home, text=True)


def has_the_hyperparameters(parameters: dict[str, str]) -> None:
    given = {"Args/epochs": "2", "Args/batch_size": "64", "Args/lr": "0.3"}  # the last by default
    assert given.items() <= parameters.items()
    assert {name for name in parameters if not name.startswith("Args/")} == {"Recipe/shift", "Recipe/nesterov"}


def has_the_configuration_objects(task: dict[str, Any]) -> None:
    assert task["network"] == str(pytorch_mnist.Net())
    setup = task["setup"]
    assert setup["device"] == str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    assert setup["threads"] == "1"  # OMP_NUM_THREADS in conftest.py
    assert setup["torch"] == version("torch")
    assert "momentum: 0.9" in setup["optimizer"]


def has_the_printed_figures_as_curves_and_values(shown: Shown) -> None:
    curves = {(title, name): curve for title, group in shown.task["scalars"].items() for name, curve in group.items()}
    single, (*_, loss, test_loss, percent) = shown.task["single"], EPOCH.findall(shown.run.stdout)[-1]
    printed = {
        ("loss", "train"): float(loss),
        ("loss", "test"): float(test_loss),
        ("accuracy", "test"): float(percent) / 100,
    }
    for name, value in printed.items():
        assert curves[name]["x"] == [24, 48]
        assert curves[name]["y"][-1] == pytest.approx(value, abs=1e-4)
    for name in (("loss", "train batch"), ("learning rate", "OneCycleLR")):
        assert curves[name]["x"] == [10, 20, 34, 44]
    assert curves["images per second", "train"]["x"] == [24, 48]
    assert min(curves["images per second", "train"]["y"]) > 0
    assert single["final accuracy"] == pytest.approx(printed["accuracy", "test"], abs=5e-5)
    assert single["final loss"] == pytest.approx(printed["loss", "test"], abs=5e-5)
    assert f"after 2 epochs, {single['seconds']} s" in shown.run.stdout


def has_a_model_with_its_record(shown: Shown, model: dict[str, Any]) -> None:
    assert (model["name"], model["framework"]) == ("online", "PyTorch")
    assert model["labels"] == {digit: int(digit) for digit in DIGITS}
    assert model["design"] == str(pytorch_mnist.Net())
    metadata = {name: entry["value"] for name, entry in model["metadata"].items()}
    assert metadata.keys() == {"accuracy", "epochs", "lr", "seed"}
    assert float(metadata["accuracy"]) == pytest.approx(shown.accuracy, abs=1e-6)
    assert (metadata["epochs"], metadata["lr"]) == ("2", "0.3")
    assert f"Stored: {model['url']}" in shown.run.stdout
    assert model["url"].startswith(shown.task["output_uri"])
    assert "model" not in shown.task["artifacts"]


def has_the_predictions(shown: Shown) -> None:
    index, label, prediction, confidence = shown.predictions.T
    _, labels = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    assert index.tolist() == list(range(1000))
    assert torch.equal(label.long(), labels[:1000])
    assert (label == prediction).double().mean() == pytest.approx(shown.accuracy, abs=1e-6)
    assert 0.1 <= confidence.min() <= confidence.max() <= 1


def has_the_confusion_matrix_and_the_table(shown: Shown) -> None:
    matrix = shown.task["plots"]["confusion matrix"]
    (heatmap,) = matrix["data"]
    hits = np.array(heatmap["z"])
    assert heatmap["x"] == heatmap["y"] == DIGITS
    assert matrix["layout"]["xaxis"]["dtick"] == matrix["layout"]["yaxis"]["dtick"] == 1
    assert heatmap["zmax"] == (hits - np.diag(hits.diagonal())).max()  # the mistakes have all the colours
    assert (matrix["layout"]["xaxis"]["title"], matrix["layout"]["yaxis"]["title"]) == ("prediction", "label")
    _, label, prediction, _ = shown.predictions.numpy().astype(int).T
    counted = np.zeros((10, 10), int)
    np.add.at(counted, (label, prediction), 1)
    assert hits.tolist() == counted.tolist()

    (table,) = shown.task["plots"]["per digit"]["data"]
    assert table["header"]["values"] == ["digit", "precision", "recall", "F1", "support"]
    digit, precision, recall, f1, support = table["cells"]["values"]
    assert digit == DIGITS
    assert support == hits.sum(axis=1).tolist()
    expected = np.array([hits.diagonal() / hits.sum(axis=0), hits.diagonal() / hits.sum(axis=1)])
    np.testing.assert_allclose(np.array([precision, recall], dtype=float), expected, atol=5e-5)
    np.testing.assert_allclose(np.array(f1, dtype=float), 2 / (1 / expected).sum(axis=0), atol=1e-4)


def has_the_picture_of_the_worst_mistakes(shown: Shown) -> None:
    """As a debug sample. The first of 25 is the mistake of which the network was surest."""
    (path,) = shown.task["samples"]
    assert Path(path).read_bytes() == shown.machine.outputs("mistakes.png").read_bytes()
    picture = np.asarray(Image.open(path).convert("L"), dtype=float) / 255
    assert min(picture.shape) >= 700
    _, label, prediction, confidence = shown.predictions.T
    mistakes = (label != prediction).nonzero().flatten()
    worst = mistakes[confidence[mistakes].argmax()]
    images, _ = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
    tile = Image.fromarray(np.uint8(255 * (1 - picture[60:200, 10:150])))
    seen = np.asarray(tile.resize((28, 28), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(seen.flatten(), images[worst].numpy().flatten())[0, 1] > 0.9


def has_every_line_of_the_console_once(shown: Shown) -> None:
    """Plain lines: the run had no terminal."""
    console, printed = shown.task["console"], EPOCH.findall(shown.run.stdout)
    assert EPOCH.findall(console) == printed
    assert len(printed) == 2
    assert console.count("Test accuracy ") == console.count("Model: ") == 1
    assert "\x1b" not in console
    assert "\r" not in console + shown.run.stdout + shown.run.stderr
    assert "images/s" in shown.run.stdout


def a_clone_trains_as_it_was_changed(shown: Shown) -> None:
    """Run as clearml-agent runs it, see test_queue.py: the task to take its arguments from is in CLEARML_TASK_ID."""
    machine = shown.machine
    changes = ["Args/epochs", 1, "Args/batch_size", 1000, "Args/dry_run", True, "Recipe/nesterov", False]
    task_id = machine.run("tests/programs/clone.py", shown.task["id"], *changes).stdout.split()[-1]
    run = machine.train(CLEARML_TASK_ID=task_id)
    assert run.returncode == 0, run.stderr
    assert "epoch 1/1 " in run.stdout
    assert "offline session" not in run.stdout
    task = machine.read_task(task_id)
    assert (task["parameters"]["Args/batch_size"], task["parameters"]["Recipe/nesterov"]) == ("1000", "False")
    assert task["parameters"].keys() == shown.task["parameters"].keys()
    assert "nesterov: False" in task["setup"]["optimizer"]
