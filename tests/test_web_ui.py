"""What a run shows in the web UI, read back through the SDK: of a run with a server, and of an imported session."""

import csv
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, Run, mnist
from PIL import Image
from reading import EPOCH, evaluate
from torch import nn

import pytorch_mnist
from pytorch_mnist import CLASSES


@dataclass
class Shown:
    """A run, and what a server has of it."""

    machine: Machine
    run: Run
    task: dict[str, Any]

    def __post_init__(self) -> None:
        """Look at the predictions, by which all else is measured."""
        images, labels = pytorch_mnist.load_mnist(ROOT / "data", "t10k")
        self.images, self.labels = images[:1000].numpy(), labels[:1000].numpy()
        with open(self.task["artifacts"]["predictions"]["file"], newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["index", "label", "prediction", "confidence"]
        index, label, prediction, self.confidence = np.array(rows, dtype=float).T
        assert (index.tolist(), label.tolist()) == (list(range(1000)), self.labels.tolist())
        assert 1 / len(CLASSES) - 1e-6 < self.confidence.min() <= self.confidence.max() <= 1
        self.accuracy = float(self.task["single"]["accuracy"])
        assert (label == prediction).mean() == pytest.approx(self.accuracy, abs=1e-6)
        self.prediction = prediction.astype(int)
        self.hits = np.zeros((len(CLASSES), len(CLASSES)), int)
        np.add.at(self.hits, (self.labels, self.prediction), 1)


@pytest.mark.parametrize("kind", ["online", "imported"])
def test_the_web_ui_shows_what_ran_and_a_clone_trains_as_it_was_changed(
    kind: str, machine: Machine, online: ClearMLServer, tmp_path: Path
) -> None:
    project = f"project {kind}"
    options = ["--project-name", project, "--task-name", kind, "--tags", "red", "blue", "--data-dir", mnist(1500, 1000)]
    options += ["--epochs", 2, "--batch-size", 64, "--log-interval", 10]
    asked = [*online.requests]
    run = machine.train(*options, *(["--offline", "--output-uri", tmp_path] if kind == "imported" else []))
    printed = run.stdout
    if kind == "imported":
        assert asked == online.requests, "an offline run asks no server"
        printed = imported(machine, run.stdout)
    task_id = re.search(r"/tasks/(\w+)/", printed)
    assert task_id
    shown = Shown(machine, run, machine.read_task(task_id[1]))
    task = shown.task
    assert (task["status"], task["project"], task["name"]) == ("completed", project, kind)
    assert sorted(task["tags"]) == ["blue", "red"]
    assert {"Args/epochs": "2", "Args/lr": "0.3"}.items() <= task["parameters"].items()  # lr by default
    assert {name for name in task["parameters"] if not name.startswith("Args/")} == {"Augmentation/shift"}
    has_the_printed_figures_as_curves_and_values(shown)
    if kind == "imported":  # OutputModel does not work offline, so the model is an artifact
        file = Path(task["artifacts"]["model"]["file"])
        address = task["artifacts"]["model"]["metadata"]["stored"]
        assert f"Stored: {address}\n" in run.stdout
        assert Path(address.removeprefix("file://")).read_bytes() == file.read_bytes()
        assert task["network"] == str(pytorch_mnist.Net())
    else:
        file = has_a_model_with_its_record(shown)
    assert file.read_bytes() == machine.outputs("model.pt").read_bytes()
    assert evaluate(file, 1000) == pytest.approx(shown.accuracy * 100, abs=1e-4)
    has_the_confusion_matrix(shown)
    has_the_table(shown)
    has_the_picture(shown)
    has_every_line_of_the_console_once(shown)
    if kind == "online":
        a_clone_trains_as_it_was_changed(shown)


def imported(machine: Machine, printed: str) -> str:
    """What is printed by the command that the run prints, but for `uv run`."""
    options = re.search(r"^To take the session to a server: .*\bclearml-task (.*)", printed, re.MULTILINE)
    assert options
    command = [str(Path(sys.executable).with_name("clearml-task")), *shlex.split(options[1])]
    return subprocess.check_output(command, env=machine.environment, cwd=machine.home, text=True)


def has_the_printed_figures_as_curves_and_values(shown: Shown) -> None:
    groups = shown.task["scalars"].items()
    curves = {f"{title}/{name}": curve for title, group in groups for name, curve in group.items()}
    *_, loss, test_loss, percent = EPOCH.findall(shown.run.stdout)[-1]
    printed = {"loss/train": float(loss), "loss/test": float(test_loss), "accuracy/test": float(percent) / 100}
    for name, value in printed.items():
        assert curves[name]["x"] == [24, 48]
        assert curves[name]["y"][-1] == pytest.approx(value, abs=1e-4)
    assert curves["images per second/train"]["x"] == [24, 48]
    assert min(curves["images per second/train"]["y"]) > 0
    for name in ("loss/train batch", "learning rate/OneCycleLR"):
        assert curves[name]["x"] == [1, 10, 20, 30, 40, 48]  # every tenth step, the first and the last
    single = shown.task["single"]
    assert single.pop("seconds") > 0
    assert single == pytest.approx({"accuracy": printed["accuracy/test"], "loss": printed["loss/test"]}, abs=5e-5)


def has_a_model_with_its_record(shown: Shown) -> Path:
    (model,) = shown.task["models"]
    assert (model["name"], model["framework"]) == (shown.task["name"], "PyTorch")
    assert model["labels"] == {label: index for index, label in enumerate(CLASSES)}
    assert model["design"] == shown.task["network"]
    assert f"out_features={len(CLASSES)}," in model["design"]
    assert f"\nStored: {model['url']}\nResults: http" in shown.run.stdout
    assert model["url"].startswith(shown.task["output_uri"])
    assert "model" not in shown.task["artifacts"]
    return Path(model["file"])


def has_the_table(shown: Shown) -> None:
    (table,) = shown.task["plots"]["per class"]["data"]
    assert table["header"]["values"] == ["class", "precision", "recall", "images"]
    names, precision, recall, images = table["cells"]["values"]
    assert names == CLASSES
    assert images == shown.hits.sum(axis=1).tolist()
    for figures, axis in ((precision, 0), (recall, 1)):
        expected = shown.hits.diagonal() / shown.hits.sum(axis=axis).clip(min=1)
        np.testing.assert_allclose([float(text.strip("%")) / 100 for text in figures], expected, atol=5.1e-5)


def has_the_confusion_matrix(shown: Shown) -> None:
    """Every cell has its count. White is no mistake, from gold to red are mistakes, grey is what is right."""
    matrix = shown.task["plots"]["confusion matrix"]
    (heatmap,), layout = matrix["data"], matrix["layout"]
    assert heatmap["x"] == heatmap["y"] == CLASSES
    assert (layout["xaxis"]["title"], layout["yaxis"]["title"]) == ("prediction", "label")
    assert layout["xaxis"]["dtick"] == layout["yaxis"]["dtick"] == 1
    assert layout["yaxis"]["autorange"] == "reversed"
    assert (heatmap["text"], heatmap["texttemplate"]) == (shown.hits.tolist(), "%{text}")
    mistakes = shown.hits - np.diag(shown.hits.diagonal())
    top = heatmap["zmax"]
    assert (heatmap["z"] == mistakes + top * np.eye(len(mistakes))).all()
    assert heatmap["zmin"] == 0
    places, colours = zip(*heatmap["colorscale"], strict=True)
    assert colours == ("white", "gold", "red", "lightgrey")
    assert np.array(places) * top == pytest.approx([0, 1, top - 1, top])
    assert mistakes.max() < top


def has_the_picture(shown: Shown) -> None:
    """A confusion matrix of images: in each cell is one of which the network was surest, or nothing."""
    (path,) = shown.task["samples"]
    for copy in (path, shown.task["artifacts"]["mistakes"]["file"]):
        assert Path(copy).read_bytes() == shown.machine.outputs("mistakes.png").read_bytes()
    picture, count = np.asarray(Image.open(path).convert("L")), len(CLASSES)
    assert picture.shape == (84 * count, 84 * count)
    pixels = picture[::3, ::3]
    for label, prediction in np.ndindex(count, count):
        those = (shown.labels == label) & (shown.prediction == prediction)
        surest = those & (shown.confidence == shown.confidence[those].max(initial=0))
        choice = shown.images[surest, 0] if those.any() else np.full((1, 28, 28), 255)
        assert (choice == pixels[28 * label :, 28 * prediction :][:28, :28]).all(axis=(1, 2)).any()


def has_every_line_of_the_console_once(shown: Shown) -> None:
    """Plain lines: the run had no terminal."""
    console, printed = shown.task["console"], EPOCH.findall(shown.run.stdout)
    assert EPOCH.findall(console) == printed
    assert len(printed) == 2
    assert console.count("Test accuracy ") == console.count("Model: ") == 1
    assert "\x1b" not in console
    assert "\r" not in console + shown.run.stdout + shown.run.stderr


def a_clone_trains_as_it_was_changed(shown: Shown) -> None:
    """Run as clearml-agent runs it, see test_queue.py: the task to take its arguments from is in CLEARML_TASK_ID."""
    machine = shown.machine
    changes = ["Args/epochs", 2, "Args/batch_size", 1000, "Args/dry_run", True, "Augmentation/shift", 0]
    task_id = machine.run("tests/programs/clone.py", shown.task["id"], *changes).stdout.split()[-1]
    run = machine.train("--data-dir", mnist(1500, 1000), CLEARML_TASK_ID=task_id)
    assert "epoch 1/1 " in run.stdout
    assert "offline session" not in run.stdout
    task = machine.read_task(task_id)
    assert (task["parameters"]["Args/batch_size"], task["parameters"]["Augmentation/shift"]) == ("1000", "0")
    assert task["parameters"].keys() == shown.task["parameters"].keys()
    # One batch of images that nothing has shifted: the loss of a new network tells.
    torch.manual_seed(1)
    images, labels = (tensor[:1000] for tensor in pytorch_mnist.load_mnist(ROOT / "data", "train"))
    loss = nn.functional.cross_entropy(pytorch_mnist.Net()(pytorch_mnist.normalise(images)), labels).item()
    assert task["scalars"]["loss"]["train"]["y"] == pytest.approx([loss], abs=1e-4)
    has_the_confusion_matrix(replace(shown, run=run, task=task))  # of a network that has hardly learnt
