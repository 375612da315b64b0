"""docs/make-it-yours.md, followed: its edits are made in copies of the scripts, which then run."""

import re
from pathlib import Path

import numpy as np
import pytest
from clearml_server import ClearMLServer
from conftest import ROOT, Machine, copy_script, mnist
from PIL import Image, ImageDraw
from stores import Rclone

PAGE = (ROOT / "docs/make-it-yours.md").read_text()
EDITS = re.findall(r"^\| `(.*?)` \| `(.*?)` \|", PAGE, re.MULTILINE)
FUNCTION, THREE_LINES = re.findall("```(?:python|diff)\n(.*?)\n```", PAGE, re.DOTALL)
PIES = [f"pie-{number}" for number in range(1, 13)]  # the files come as pie-1, pie-10, pie-11, pie-12, pie-2 ...

MINE = """import argparse
import torch
from clearml import Task
def main(args):
    task = Task.init("pets", "mine")
    torch.save(torch.nn.Linear(2, 1).state_dict(), "model.pt")
parser = argparse.ArgumentParser()
args = parser.parse_args()
main(args)
"""


def replace(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def apply(diff: str, text: str) -> str:
    """Make the changes of a diff, whose hunks stand between lines with @@ and are found by their words."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] != other) for other in "+-")
        text = replace(text, old, new)
    return text


def edit_example(folder: Path, classes: list[str]) -> Path:
    """Follow the page, but for the names of the classes."""
    assert len(EDITS) + len(FUNCTION.splitlines()) <= 25  # to write
    script = copy_script(folder).rename(folder / "pets.py")
    text = re.sub(r"^def load_mnist.*?(?=\n\n\n)", lambda _: FUNCTION, script.read_text(), flags=re.M | re.S)
    for old, new in [*EDITS, ('["cat", "dog"]', str(classes))]:
        text = replace(text, old, new)
    script.write_text(text)
    return script


def draw(folder: Path, classes: list[str]) -> None:
    """Draw pies, a label for each size."""
    for part, count, names in (("train", 50, classes), ("test", 15, classes)):
        for label, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for begin in range(0, 360, 360 // count):
                end, picture = begin + 360 * (label + 1) / len(classes), Image.new("RGB", (48, 40), "navy")
                ImageDraw.Draw(picture).pieslice((8, 4, 39, 35), begin, end, "gold")
                picture.save(folder / part / name / f"{begin}.png")


@pytest.mark.parametrize("classes", [["cat", "dog"], PIES], ids=len)
def test_photos_are_right_in_the_web_ui(classes: list[str], machine: Machine, online: ClearMLServer) -> None:
    script, count = edit_example(machine.home, classes), len(classes)
    draw(script.parent / "data", classes)
    run = machine.run(script, "--epochs", 4, "--batch-size", 20, "--lr", 0.1)
    task = machine.read_task(run.task)
    assert (task["project"], task["name"], task["status"]) == ("pets", "cats-and-dogs", "completed")
    files = sorted((script.parent / "data/test").glob("*/*.png"))
    rows = np.loadtxt(task["artifacts"]["predictions"]["file"], delimiter=",", skiprows=1).astype(int)[:, 1:3]
    assert [classes[label] for label in rows[:, 0]] == [file.parent.name for file in files]
    hits = np.histogram2d(rows[:, 0], rows[:, 1], np.arange(count + 1))[0].astype(int)
    assert 1.5 / count < task["single"]["accuracy"] == pytest.approx(hits.trace() / len(rows))
    (heatmap,) = task["plots"]["confusion matrix"]["data"]
    assert (heatmap["x"], heatmap["y"], heatmap["text"]) == (classes, classes, hits.tolist())
    names, _, recall, images = task["plots"]["per class"]["data"][0]["cells"]["values"]
    assert (names, images) == (classes, hits.sum(axis=1).tolist())
    assert recall == [f"{right / all_:.2%}" for right, all_ in zip(hits.diagonal(), images, strict=True)]
    (model,) = task["models"]
    assert model["labels"] == {name: label for label, name in enumerate(classes)}
    cells = np.asarray(Image.open(task["samples"][0])).reshape(count, 96, count, 96, 3)[:, ::3, :, ::3]
    for label, prediction in np.argwhere(hits):  # the cell has one of these photos
        those = [file for file, row in zip(files, rows, strict=True) if (row == (label, prediction)).all()]
        assert any((cells[label, :, prediction] == Image.open(file).resize((32, 32))).all() for file in those)


def test_a_photo_that_is_cut_off_is_named(machine: Machine) -> None:
    script = edit_example(machine.home, ["cat", "dog"])
    draw(script.parent / "data", ["cat", "dog"])
    photo = script.parent / "data/train/dog/35.png"
    photo.write_bytes(photo.read_bytes()[:100])
    assert f"error: {photo} is not a complete photo: " in machine.run(script, code=1).stderr


def test_a_class_without_test_images_counts_as_0(machine: Machine, online: ClearMLServer) -> None:
    run = machine.train("--dry-run", "--data-dir", mnist(600, 4))
    _, _, recall, images = machine.read_task(run.task)["plots"]["per class"]["data"][0]["cells"]["values"]
    assert 0 in images
    assert {recall[label] for label, count in enumerate(images) if count == 0} == {"0.00%"}


@pytest.mark.parametrize("counts", [(4, 200), (600, 7)], ids=["in the test set", "in the training set"])
def test_labels_without_a_class_end_the_run_before_the_training(counts: tuple[int, int], machine: Machine) -> None:
    """In the first images of the other set is no 9."""
    script = copy_script(machine.home)
    script.write_text(replace(script.read_text(), "range(10)]", "range(9)]"))
    run = machine.run(script, "--epochs", 1, "--data-dir", mnist(*counts), code=1)
    assert "epoch 1" not in run.stdout
    assert "error: labels 0 to 9, but there are 9 CLASSES" in run.line


@pytest.mark.parametrize(("bucket", "statuses"), [("models", ["completed"]), ("no-such-bucket", [])])
def test_three_lines_make_a_script_safe(
    bucket: str, statuses: list[str], machine: Machine, online: ClearMLServer, rclone: Rclone
) -> None:
    script = copy_script(machine.home).rename(machine.home / "mine.py")
    script.write_text(apply(THREE_LINES, MINE))
    target = f'sdk.development.default_output_uri: "s3://{rclone.host}/{bucket}"'
    machine.configure(online.configuration(), rclone.clearml_conf(), target)
    before = len(online.tasks)
    machine.run(script, code=int(not statuses))
    assert [task["status"] for task in online.tasks.values()][before:] == statuses
    stored = [rclone.get(key) for key in rclone.keys()]
    assert [path.read_bytes() in stored for path in machine.home.glob("model.pt")] == [True] * len(statuses)
